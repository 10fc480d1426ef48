"""Scaled dot product attention: masks, sliding windows, sinks, packed documents, context parallelism."""

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lite.context_parallel import PackedSeqParams, SequenceLayout
from megatron_lite.context_parallel.attention import ContextParallelism
from megatron_lite.errors import ConfigError
from megatron_lite.host_copies import copy_to_device
from megatron_lite.ops.attention_block import attention, choose_backend
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.layers import local_in_dtype
from megatron_lite.tensor_parallel.parameters import create_parameter
from megatron_lite.tensor_parallel.random import get_cuda_rng_tracker
from megatron_lite.transformer.attention_masks import visible_positions, with_sinks
from megatron_lite.transformer.enums import AttnMaskType
from megatron_lite.transformer.module import MegatronModule, tensor_parallel_group
from megatron_lite.transformer.transformer_config import TransformerConfig, cp_comm_type_of, normal_init, uses_window

_BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "fused": [SDPBackend.CUDNN_ATTENTION],
    "unfused": [SDPBackend.MATH],
    "local": [SDPBackend.MATH],
}
# Without cuDNN, which torch prefers on Hopper: with a mask its gradient of the queries can be NaN at lengths that leave
# 64 when divided by 128 (https://github.com/pytorch/pytorch/issues/196678, torch 2.11 to 2.13).
_UNDER_A_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class DotProductAttention(MegatronModule):
    """softmax(query key^T * scale + mask) value, for the heads of this tensor parallel rank.

    Parameters: with softmax_type learnable, softmax_offset [n], split over the tensor parallel ranks like the heads:
    the score of a sink (Xiao et al. 2023, arXiv:2309.17453), one more key of each head whose value is zero. With
    off-by-one that score is 0.

    The softmax is computed in float32 (float64 for float64 input) by every backend. Dropout on the probabilities
    draws from the model parallel stream, because the heads differ between tensor parallel ranks.

    Under context parallelism each rank brings its part of the sequence (context_parallel/sharding.py) and gets the
    attention of its queries to the whole sequence; cp_comm_type says how the ranks exchange what that takes.

    Args:
        config: supplies attention_dropout, window_size, window_attn_skip_freq, softmax_type, softmax_scale,
            attention_backend.
        layer_number: number of the layer, counted from 1; decides about the sliding window.
        attn_mask_type: default causal for self-attention and no_mask for cross-attention.
        attention_type: "self" or "cross".
        attention_dropout: default config.attention_dropout.
        softmax_scale: default config.softmax_scale, else 1 / sqrt(d).
        cp_comm_type: "p2p", "all_gather", "a2a" or "a2a+p2p"; default the layer's in config.cp_comm_type.
        pg_collection: process groups, of which tp, cp and hcp count; default the global ones.

    Raises:
        ConfigError: an unknown attention_type, a sliding window or attention dropout that cp_comm_type cannot do, or
            context parallel groups that differ from config.context_parallel_size.
    """

    config: TransformerConfig
    softmax_offset: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        if attention_type not in ("self", "cross"):
            raise ConfigError(f"attention_type is {attention_type!r}, but it must be 'self' or 'cross'.")
        if attn_mask_type is None:
            attn_mask_type = AttnMaskType.causal if attention_type == "self" else AttnMaskType.no_mask
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.window_size = config.window_size if uses_window(config, layer_number) else None
        self.whole_attention: Callable[..., Tensor] | None = None
        """Attends to whole sequences where torch's SDPA does not: (query, key, value, causal, scale, window_size)."""
        self._create_sinks(tensor_parallel_group(pg_collection))
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp", "hcp"])
        self.context = ContextParallelism.of(cp_comm_type or cp_comm_type_of(config, layer_number), groups)
        self._check_context()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, n, d]; packed rows of t tokens [t, 1, n, d] or [t, n, d]. Under context parallelism sq and t
                count the tokens of this rank.
            key: [sk, b, g, d] with g dividing n: head i uses group i // (n / g). Packed as the query.
            value: [sk, b, g, d].
            attention_mask: bool, True where attention is forbidden, broadcastable to [b, n, sq, sk]. A causal mask
                type forbids later positions too, so the mask may leave them out.
            attn_mask_type: overrides the type given at construction.
            attention_bias: not supported, must be None.
            packed_seq_params: where the documents are in the tokens of the b sequences, one behind the other; each
                token sees its own document only.

        Returns:
            [sq, b, n * d]; for [t, n, d] [t, n * d]. A query that may look nowhere gives zeros.

        Raises:
            ConfigError: attention_bias is given, the mask is not boolean or comes with what makes it unusable, shapes
                do not fit each other, or the tokens are not those of packed_seq_params.
        """
        packed = packed_seq_params if packed_seq_params is not None and packed_seq_params.is_packed else None
        scale = 1.0 / math.sqrt(query.size(-1)) if self.softmax_scale is None else self.softmax_scale
        self._check_inputs(query, key, value, attention_mask, attention_bias, packed)
        causal = (attn_mask_type or self.attn_mask_type).is_causal
        if packed is None:
            context = self._attend_sequences(query, key, value, attention_mask, causal, scale)
        elif query.dim() == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            context = self._attend_row(query, key, value, packed, causal, scale).squeeze(1)
        else:
            length, batch = query.shape[:2]
            query, key, value = (x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in (query, key, value))
            row = self._attend_row(query, key, value, packed, causal, scale)
            context = row.view(batch, length, *row.shape[2:]).transpose(0, 1)
        return context.flatten(-2)

    def _attend_sequences(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        """Plain sequences: [sq, b, n, d] -> [sq, b, n, d]."""
        sinks = self.sinks(query)
        by_blocks = mask is None and self._gains_by_blocks(query, key, value, sinks, causal)
        if self.context.size == 1 and not by_blocks:
            return self._attend(query, key, value, sinks, mask, causal, scale)
        whole = functools.partial(self._attend, mask=None, causal=causal, scale=scale)
        return self._attend_context(query, key, value, sinks, None, causal, scale, None if by_blocks else whole)

    def _attend_row(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, causal: bool, scale: float
    ) -> Tensor:
        """Packed documents: [t, 1, n, d] -> [t, 1, n, d]."""
        whole = functools.partial(self._attend_documents, layout=packed.layout, causal=causal, scale=scale)
        whole_if = None if self._fits_blocks(causal) else whole
        return self._attend_context(query, key, value, self.sinks(query), packed, causal, scale, whole_if)

    def _attend_context(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        packed: PackedSeqParams | None,
        causal: bool,
        scale: float,
        attend_whole: Callable[..., Tensor] | None,
    ) -> Tensor:
        backend = choose_backend(query, self.config.attention_backend)
        window = -1 if self.window_size is None else self.window_size[0]
        if window >= query.size(0) * query.size(1) * self.context.size - 1:
            window = -1  # hides nothing
        return self.context.attend(
            query, key, value, packed, causal, scale, backend, attend_whole, sinks=sinks, window=window
        )

    def _gains_by_blocks(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, causal: bool) -> bool:
        """Whether whole sequences are better attended to in one block: with sinks, or a window on CUDA's flash kernel.

        Otherwise torch's SDPA is as good or better. It also checks shapes, and broadcasts some that blocks cannot do.
        """
        if query.size(0) != key.size(0) or not _heads_fit(query, key, value) or not self._fits_blocks(causal):
            return False
        hides = self.window_size is not None and 0 <= self.window_size[0] < key.size(0) * self.context.size - 1
        kernel = choose_backend(query, self.config.attention_backend)
        return sinks is not None or (hides and kernel in ("flash", "cudnn") and self.whole_attention is None)

    def _takes_whole_attention(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
        """Whether `whole_attention` is there and can do it: no dropout, and no fewer queries than keys if causal."""
        if self.whole_attention is None or (self.attention_dropout > 0.0 and self.training):
            return False
        return _heads_fit(query, key, value) and (not causal or query.size(0) == key.size(0))

    def _fits_blocks(self, causal: bool) -> bool:
        """Whether attention in blocks can do it: no dropout, and windows under a causal mask only."""
        drops = self.attention_dropout > 0.0 and self.training
        return not drops and (self.window_size is None or causal)

    def sinks(self, query: Tensor) -> Tensor | None:
        """The scores [n] of the sinks of this rank's heads; None where there are none."""
        if self.config.softmax_type == "vanilla":
            return None
        if self.softmax_offset is None:
            return torch.zeros(query.size(-2), device=query.device)
        return local_in_dtype(self.softmax_offset, query.dtype)

    def _create_sinks(self, group: torch.distributed.ProcessGroup | None) -> None:
        if self.config.softmax_type != "learnable":
            self.register_parameter("softmax_offset", None)
            return
        create_parameter(
            self,
            "softmax_offset",
            (self.config.num_attention_heads,),
            init_method=normal_init(self.config.init_method_std),
            dtype=self.config.main_params_dtype,
            device=torch.device("cpu") if self.config.use_cpu_initialization else None,
            shard_dim=0,
            group=group,
            perform_initialization=self.config.perform_initialization,
        )

    def prepare(self, packed_seq_params: PackedSeqParams) -> None:
        """Work out the blocks of packed rows before they are needed inside a compiled layer."""
        self.context.plan(0, packed_seq_params, self.attn_mask_type.is_causal)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Attention of whole sequences by torch's SDPA: [sq, b, n, d] -> [sq, b, n, d].

        On a CPU the kernel behind it is called by ourselves where it can be: `attention_block` knows how it is fast.
        """
        lengths = query.size(0), key.size(0)
        plain = mask is None and sinks is None and self._needs_no_mask(*lengths, causal)
        dropout = self.attention_dropout if self.training else 0.0
        triangle = causal and lengths[0] > 1
        backend = choose_backend(query, self.config.attention_backend)
        if sinks is None and mask is None and self._takes_whole_attention(query, key, value, causal):
            assert self.whole_attention is not None, "it takes them"
            return self.whole_attention(query, key, value, causal, scale, self.window_size)
        if backend == "flash_cpu" and plain and dropout == 0.0 and min(lengths) > 0 and _heads_fit(query, key, value):
            return attention(query, key, value, triangle, scale, backend)
        visible = None if plain else visible_positions(*lengths, causal, self.window_size, query.device)
        if visible is not None and mask is not None:
            visible = visible & ~mask
        if visible is not None and sinks is not None:
            key, value = (F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)) for x in (key, value))
            visible = with_sinks(visible, sinks, query.dtype)
        stream = get_cuda_rng_tracker().fork() if dropout > 0.0 else contextlib.nullcontext()
        kernels = sdpa_kernels(query.device, self.config.attention_backend, visible is not None)
        # Not in an ExitStack, which torch.compile cannot follow.
        with stream, sdpa_kernel(kernels) if kernels else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=visible,
                dropout_p=dropout,
                is_causal=plain and triangle,
                scale=scale,
                enable_gqa=key.size(2) != query.size(2),
            )
        return context.permute(2, 0, 1, 3)

    def _attend_documents(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layout: SequenceLayout,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Packed documents by an explicit mask, for what the blocks cannot do: [t, 1, n, d] -> [t, 1, n, d]."""
        document = copy_to_device(layout.document_of_token(), query.device)
        rows = layout.equal_rows()
        query, key, value = (x.view(rows, -1, *x.shape[2:]).transpose(0, 1) for x in (query, key, value))
        document = document.view(rows, 1, -1)
        forbidden = (document.unsqueeze(-1) != document.unsqueeze(-2)) | (document < 0).unsqueeze(-1)
        out = self._attend(query, key, value, sinks, forbidden, causal, scale)
        return out.transpose(0, 1).flatten(0, 1).unsqueeze(1)

    def _check_context(self) -> None:
        if self.config.context_parallel_size != self.context.size:
            raise ConfigError(
                f"context_parallel_size is {self.config.context_parallel_size}, but the context parallel group has "
                f"{self.context.size} ranks; give initialize_model_parallel the same context_parallel_size."
            )
        if not self.context.sees_whole_sequences() and (self.window_size is not None or self.attention_dropout > 0.0):
            raise ConfigError(
                f"window_size is {self.window_size} and attention_dropout {self.attention_dropout}, but with "
                f"cp_comm_type {self.context.comm_type} a rank sees the sequence in blocks, where neither is "
                "supported; use cp_comm_type a2a, or leave them out."
            )

    def _check_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        packed: PackedSeqParams | None,
    ) -> None:
        if bias is not None:
            raise ConfigError("attention_bias is given, but DotProductAttention supports masks only; pass None.")
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigError(
                f"attention_mask has dtype {mask.dtype}, but it must be torch.bool, True where attention is forbidden."
            )
        if mask is not None and (self.context.size > 1 or packed is not None):
            raise ConfigError(
                "attention_mask is given with context parallelism or packed sequences, which keep documents apart "
                "without a mask; pass packed_seq_params instead."
            )
        if self.context.size == 1 and packed is None:
            return  # torch's SDPA checks the rest
        _check_shapes(query, key, value, packed is not None)
        if packed is None:
            return
        length, batch = query.size(0) * self.context.size, query.size(1) if query.dim() == 4 else 1
        if packed.layout.stretches[-1] != length * batch:
            raise ConfigError(
                f"packed_seq_params describes {packed.layout.stretches[-1]} tokens, but there are {batch} sequences of "
                f"{length} ({query.size(0)} on each of {self.context.size} context parallel ranks); its lengths are "
                "those of whole sequences, with padding."
            )
        if not set(range(0, length * batch, length)) <= set(packed.layout.stretches):
            raise ConfigError(
                f"packed_seq_params is split at {packed.layout.stretches}, but each of the {batch} sequences of "
                f"{length} tokens must be split by itself; give cu_seqlens_split."
            )

    def _needs_no_mask(self, query_length: int, key_length: int, causal: bool) -> bool:
        """Whether SDPA's own triangle (or no mask at all) says what may be seen."""
        left, right = self.window_size or (-1, -1)
        reaches_back = left < 0 or left >= key_length - 1
        reaches_on = causal or right < 0 or right >= key_length - 1
        return reaches_back and reaches_on and (not causal or query_length in (1, key_length))


def sdpa_kernels(device: torch.device, requested: str, masked: bool) -> list[SDPBackend]:
    """The kernels SDPA may choose from; empty for all of them."""
    if requested in _BACKENDS:
        return _BACKENDS[requested]
    return _UNDER_A_MASK if masked and device.type == "cuda" else []


def _heads_fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether every query head has a key head and a value head, all of one width."""
    return (
        key.shape == value.shape
        and query.shape[1:-2] == key.shape[1:-2]
        and query.size(-1) == key.size(-1)
        and query.size(-2) % key.size(-2) == 0
    )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> None:
    """What the kernels of blocks take for granted. CPU's would read other memory where it does not hold."""
    q, k, v = (list(x.shape) for x in (query, key, value))
    if len(q) != 4 and not (packed and len(q) == 3):
        raise ConfigError(
            f"query has the shape {q}, but it must be [s, b, n, d] (with packed_seq_params also [t, n, d])."
        )
    if q[0] != k[0]:
        raise ConfigError(
            f"There are {q[0]} queries and {k[0]} keys, but with context parallelism or packed sequences both are of "
            "the same tokens; attend without them to keys of another length."
        )
    if k != v or len(k) != len(q) or k[1:-2] != q[1:-2] or k[-1] != q[-1] or k[-2] < 1 or q[-2] % k[-2]:
        raise ConfigError(
            f"query, key and value have the shapes {q}, {k} and {v}, but keys and values must have one shape, which "
            "differs from that of the queries in the number of heads only, and this must divide theirs."
        )
