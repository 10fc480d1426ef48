"""Which tokens each context parallel rank holds, and which of them attend to each other.

A stretch of tokens (a sequence, or a padded document) is cut into 2 cp chunks, and rank r holds chunks r and
2 cp - 1 - r. So each rank holds an early and a late chunk, and under a causal mask all have the same work. A rank's
tokens always stand in the order of the whole:

    cp 2, 8 tokens in one stretch        rank 0: 0 1 6 7     rank 1: 2 3 4 5
    cp 2, 8 tokens in two stretches      rank 0: 0 3 4 7     rank 1: 1 2 5 6
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection, group_rank, group_size


@dataclass(frozen=True)
class SequenceLayout:
    """The structure of one row of t tokens, the same on every rank.

    Attributes:
        stretches: boundaries 0 = u_0 < u_1 < ... = t; the tokens from u_i to u_(i+1) are cut into 2 cp chunks.
        documents: (start, end) of tokens that attend to each other, in order, each inside one stretch. Tokens outside
            all documents are padding.
    """

    stretches: tuple[int, ...]
    documents: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, length: int) -> "SequenceLayout":
        """One sequence of `length` tokens, one document."""
        return cls((0, length), ((0, length),))

    def document_of_token(self) -> Tensor:
        """The number of each token's document, int64 [t]; -1 for padding."""
        numbers = torch.full((self.stretches[-1],), -1, device="cpu")
        for number, (start, end) in enumerate(self.documents):
            numbers[start:end] = number
        return numbers

    def equal_rows(self) -> int:
        """How many rows the tokens can be seen as without cutting a stretch."""
        lengths = {end - start for start, end in itertools.pairwise(self.stretches)}
        return len(self.stretches) - 1 if len(lengths) == 1 else 1

    def documents_with_stretch(self) -> list[tuple[int, int, int, int]]:
        """(start, end, stretch start, stretch end) of each document that has tokens.

        Raises:
            ConfigError: a document that crosses the end of its stretch.
        """
        found, stretch = [], 0
        for start, end in self.documents:
            if end <= start:
                continue
            while stretch + 2 < len(self.stretches) and self.stretches[stretch + 1] <= start:
                stretch += 1
            low, high = self.stretches[stretch], self.stretches[stretch + 1]
            if start < low or end > high:
                raise ConfigError(
                    f"The document of tokens {start} to {end} is not inside one stretch of the context parallel split "
                    f"({low} to {high}); documents must be in order, and end where their stretch does or before."
                )
            found.append((start, end, low, high))
        return found


def zigzag_positions(stretches: Sequence[int], cp_size: int, cp_rank: int) -> Tensor:
    """Positions, in the whole row and in its order, of the tokens that one rank holds: int64 [t / cp].

    Raises:
        ConfigError: a stretch that cannot be cut into 2 cp equal chunks.
    """
    if cp_size == 1:
        return torch.arange(stretches[-1], device="cpu")
    parts = []
    for start, end in itertools.pairwise(stretches):
        chunk = chunk_length(end - start, cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk, device="cpu"))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def chunk_length(length: int, cp_size: int) -> int:
    """Tokens in each of the 2 cp chunks of a stretch of `length` tokens.

    Raises:
        ConfigError: the chunks would differ.
    """
    chunks = 2 * cp_size
    if length % chunks:
        below, above = length // chunks * chunks, (length // chunks + 1) * chunks
        raise ConfigError(
            f"The sequence length is {length}, but sequence length must be divisible by cp_size * 2 ({chunks}): use "
            f"{f'{below} or ' if below else ''}{above}, or pad with --pad-to-multiple (packed documents that are split "
            "one by one: with get_padding, and say so in cu_seqlens_q_padded)."
        )
    return length // chunks


def split_sequence(
    whole: Tensor, dim: int, cp_size: int, cp_rank: int, stretches: Sequence[int] | None = None
) -> Tensor:
    """This rank's tokens along `dim`: [..., t, ...] -> [..., t / cp, ...].

    Args:
        whole: the same on all ranks.
        dim: the dimension of the tokens.
        cp_size: number of context parallel ranks.
        cp_rank: this one.
        stretches: as in SequenceLayout; default one stretch.

    Raises:
        ConfigError: stretches of another length, or that cannot be cut into 2 cp equal chunks.
    """
    stretches = stretches or (0, whole.size(dim))
    if stretches[-1] != whole.size(dim):
        raise ConfigError(
            f"The stretches end at {stretches[-1]}, but dimension {dim} has {whole.size(dim)} tokens; split the whole "
            "row, with the padding of its documents."
        )
    if cp_size == 1:
        return whole
    positions = zigzag_positions(stretches, cp_size, cp_rank)
    return whole.index_select(dim, positions.to(whole.device))


def unsplit_sequence(parts: Sequence[Tensor], dim: int, stretches: Sequence[int] | None = None) -> Tensor:
    """The inverse of split_sequence: all ranks' parts, by rank, -> the whole [..., t, ...]."""
    if len(parts) == 1:
        return parts[0]
    together = torch.cat(list(parts), dim=dim)
    stretches = stretches or (0, together.size(dim))
    order = torch.cat([zigzag_positions(stretches, len(parts), rank) for rank in range(len(parts))]).argsort()
    return together.index_select(dim, order.to(together.device))


SEQUENCE_DIMS = {"attention_mask": 2}
"""Where the tokens of a batch's tensors are, if not in dim 1; of a mask [b, 1, s, s] the queries are split."""


def get_batch_on_this_cp_rank(
    batch: Mapping[str, Tensor | None], cp_group: ProcessGroup | None = None
) -> dict[str, Tensor | None]:
    """This rank's part of a batch: tokens, labels, loss_mask, position_ids [b, s] -> [b, s / cp].

    Labels are shifted and positions counted before, in the whole sequence. Of an attention_mask [b, 1, s, s] the rows
    (queries) are split. What is None stays None.

    Args:
        batch: the same on all ranks of the group.
        cp_group: default the global context parallel group; without one this process is alone.

    Raises:
        ConfigError: the sequence length is not divisible by cp_size * 2.
    """
    if cp_group is None:
        cp_group = ProcessGroupCollection.use_mpu_process_groups(["cp"]).cp
    size, rank = group_size(cp_group), group_rank(cp_group)
    return {
        name: None if tensor is None else split_sequence(tensor, SEQUENCE_DIMS.get(name, 1), size, rank)
        for name, tensor in batch.items()
    }
