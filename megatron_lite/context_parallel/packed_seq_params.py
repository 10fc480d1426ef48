"""Packed sequences: several documents behind one another in one row of tokens, each attending to itself only."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_lite.context_parallel.blocks import as_tensor, attention_blocks
from megatron_lite.context_parallel.sharding import SequenceLayout
from megatron_lite.errors import ConfigError


@dataclass
class PackedSeqParams:
    """Where the documents of a packed row of t tokens are; the same on every context parallel rank.

    The names are Megatron's. "Real" lengths count tokens, "padded" ones also the padding behind each document, so
    document i begins at cu_seqlens_q_padded[i] and has cu_seqlens_q[i+1] - cu_seqlens_q[i] tokens. All lengths are of
    whole sequences, before the context parallel split.

    Attributes:
        qkv_format: "thd" for packed rows, "sbhd" for a batch of plain sequences (all other fields are then ignored).
        cu_seqlens_q: int32 [documents + 1], cumulative real lengths.
        cu_seqlens_kv: the same for keys; must equal cu_seqlens_q.
        cu_seqlens_q_padded: int32 [documents + 1], cumulative padded lengths; default the real ones.
        cu_seqlens_kv_padded: the same for keys.
        max_seqlen_q: longest document; it is informative, the layout is taken from cu_seqlens.
        max_seqlen_kv: the same for keys.
        cu_seqlens_split: int32, boundaries of the stretches of which each context parallel rank holds chunks r and
            2 cp - 1 - r (sharding.py). Default: each padded document. The data loader gives whole sequences, whose
            documents may have any length.
    """

    qkv_format: str = "thd"
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    cu_seqlens_split: Tensor | None = None

    def __post_init__(self) -> None:
        if self.qkv_format not in ("thd", "sbhd"):
            raise ConfigError(f"qkv_format is {self.qkv_format!r}, but it must be 'thd' (packed) or 'sbhd' (batch).")
        if self.qkv_format == "thd" and self.cu_seqlens_q is None:
            raise ConfigError("qkv_format is 'thd', but cu_seqlens_q, which says where the documents are, is None.")

    @property
    def is_packed(self) -> bool:
        """Whether documents are to be kept apart."""
        return self.qkv_format == "thd"

    @cached_property
    def layout(self) -> SequenceLayout:
        """The same as numbers on the host. Reads the device once if cu_seqlens are there; keep them on the CPU.

        Raises:
            ConfigError: cumulative lengths that do not fit each other.
        """
        assert self.cu_seqlens_q is not None, "checked at construction"
        real = self.cu_seqlens_q.tolist()
        padded = real if self.cu_seqlens_q_padded is None else self.cu_seqlens_q_padded.tolist()
        for name in ("cu_seqlens_kv", "cu_seqlens_kv_padded"):
            keys, queries = getattr(self, name), getattr(self, name.replace("kv", "q"))
            if keys is not None and (queries is None or not torch.equal(keys, queries)):
                raise ConfigError(f"{name} differs from that of the queries, but self-attention has both from one row.")
        lengths = [end - start for start, end in itertools.pairwise(real)]
        room = [end - start for start, end in itertools.pairwise(padded)]
        if real[:1] != [0] or padded[:1] != [0] or len(real) != len(padded) or any(length < 0 for length in lengths):
            raise ConfigError(
                f"cu_seqlens_q is {real} and its padded form {padded}, but both must begin with 0, never fall, and "
                "have one entry more than there are documents."
            )
        for number, (length, space) in enumerate(zip(lengths, room, strict=True)):
            if length > space:
                raise ConfigError(
                    f"Document {number} has {length} tokens in cu_seqlens_q, but only {space} in cu_seqlens_q_padded; "
                    "real lengths must not exceed padded ones."
                )
        split = padded if self.cu_seqlens_split is None else self.cu_seqlens_split.tolist()
        if split[:1] != [0] or sorted(split) != split or split[-1] < padded[-1]:
            raise ConfigError(
                f"cu_seqlens_split is {split}, but it must begin with 0, never fall, and hold all {padded[-1]} tokens."
            )
        documents = tuple((start, start + length) for start, length in zip(padded[:-1], lengths, strict=True))
        return SequenceLayout(tuple(dict.fromkeys(split)), documents)

    @cached_property
    def _plans(self) -> dict[tuple[int, int, bool], Tensor]:
        return {}

    def plan(self, cp_size: int, cp_rank: int, causal: bool) -> Tensor:
        """The blocks one rank computes (blocks.as_tensor), worked out when first asked for."""
        place = (cp_size, cp_rank, causal)
        if place not in self._plans:
            self._plans[place] = as_tensor(attention_blocks(self.layout, *place))
        return self._plans[place]


def get_padding(
    seq_len: int,
    cp_size: int,
    tp_size: int,
    has_sp: bool,
    decoder_tp_comm_overlap: bool = False,
    decoder_seq_len: int | None = None,
    fp8_enabled: bool = False,
    fp8_recipe: str | None = None,
) -> int:
    """How many tokens to append so that a sequence can be split over the ranks.

    Args:
        seq_len: tokens of the sequence.
        cp_size: context parallel size; above 1 the length must be a multiple of 2 cp, with has_sp of 2 cp tp.
        tp_size: tensor parallel size.
        has_sp: sequence parallelism is on; without CP the length must be a multiple of tp.
        decoder_tp_comm_overlap: with has_sp, pad to decoder_seq_len, because the overlapped kernels want that length.
        decoder_seq_len: see decoder_tp_comm_overlap.
        fp8_enabled: with neither CP nor SP, the length must be a multiple of 16 (32 for the recipe "mxfp8").
        fp8_recipe: see fp8_enabled.

    Raises:
        ConfigError: a size below 1, or decoder_tp_comm_overlap without a decoder_seq_len that holds the sequence.
    """
    if seq_len < 0 or cp_size < 1 or tp_size < 1:
        raise ConfigError(
            f"seq_len is {seq_len}, cp_size {cp_size} and tp_size {tp_size}, but a length is at least 0 and a size at "
            "least 1."
        )
    if has_sp and decoder_tp_comm_overlap:
        if decoder_seq_len is None or decoder_seq_len < seq_len:
            raise ConfigError(
                f"decoder_seq_len is {decoder_seq_len}, but with decoder_tp_comm_overlap the sequence ({seq_len} "
                f"tokens) is padded to it: give {seq_len} or more."
            )
        return decoder_seq_len - seq_len
    if cp_size > 1:
        factor = 2 * cp_size * (tp_size if has_sp else 1)
    elif has_sp:
        factor = tp_size
    elif fp8_enabled:
        factor = 32 if fp8_recipe == "mxfp8" else 16
    else:
        factor = 1
    return -seq_len % factor


def get_packed_seq_params(
    tokens: Tensor, img_seq_len: int, padding_needed: int, cp_size: int, use_packed_sequence: bool = False
) -> PackedSeqParams:
    """The PackedSeqParams of a batch of equally long padded sequences, each of which becomes a document.

    Args:
        tokens: [b, s], padding included.
        img_seq_len: further tokens per sequence that are not in `tokens` (image embeddings).
        padding_needed: how many of each sequence's s + img_seq_len tokens are padding at its end; see get_padding.
        cp_size: context parallel size.
        use_packed_sequence: pack also without context parallelism.

    Returns:
        qkv_format "thd" if cp_size > 1 or use_packed_sequence, else "sbhd".

    Raises:
        ConfigError: more padding than tokens.
    """
    batch, padded = tokens.size(0), tokens.size(1) + img_seq_len
    valid = padded - padding_needed
    if padding_needed < 0 or valid < 0:
        raise ConfigError(
            f"padding_needed is {padding_needed}, but it must be between 0 and the sequence's {padded} tokens."
        )

    def cumulative(length: int) -> Tensor:
        return torch.arange(batch + 1, dtype=torch.int32, device="cpu") * length

    return PackedSeqParams(
        qkv_format="thd" if cp_size > 1 or use_packed_sequence else "sbhd",
        cu_seqlens_q=cumulative(valid),
        cu_seqlens_kv=cumulative(valid),
        cu_seqlens_q_padded=cumulative(padded),
        cu_seqlens_kv_padded=cumulative(padded),
        max_seqlen_q=valid,
        max_seqlen_kv=valid,
    )
