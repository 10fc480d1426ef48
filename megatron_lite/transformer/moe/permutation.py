"""Moving tokens into the order of their experts and summing them back: pure index work, no communication.

Each of t tokens has `width` slots, one for each time it is sent somewhere (k choices, times the copies of an expert).
Slot j of token i has the number i * width + j. Rows are slots in another order, grouped by a key (an expert).

Within a key, slots keep the order of their numbers, that is, of their tokens. So the rows of an expert are in a defined
order, and sums over a token's slots are taken in the order of the slots; nothing depends on the timing of threads.
Nothing here waits for the device: every size is known to the host, from shapes or from the caller.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class Permutation:
    """Which slot stands in which row.

    Attributes:
        slots: int64 [rows]; the slot in each row; num_tokens * width marks an empty row.
        inverse: int64 [num_tokens * width]; the row of each slot; `rows` marks a slot that has none.
        num_tokens: number of tokens t.
        width: slots of each token.
        empty_rows: there may be rows without a slot.
        idle_slots: there may be slots without a row.
    """

    slots: Tensor
    inverse: Tensor
    num_tokens: int
    width: int
    empty_rows: bool
    idle_slots: bool

    @classmethod
    def from_slots(
        cls, slots: Tensor, num_tokens: int, width: int, *, empty_rows: bool = False, idle_slots: bool = False
    ) -> "Permutation":
        """The permutation whose rows hold `slots`; no slot may stand in two rows."""
        rows, num_slots = slots.numel(), num_tokens * width
        # The last cell catches the empty rows.
        inverse = slots.new_full((num_slots + 1,), rows)
        inverse.scatter_(0, slots, torch.arange(rows, device=slots.device))
        return cls(slots, inverse[:num_slots], num_tokens, width, empty_rows, idle_slots)

    @property
    def of_slots(self) -> "Permutation":
        """The same rows, for tensors with one entry per slot instead of one per token."""
        return replace(self, num_tokens=self.num_tokens * self.width, width=1)


def group_slots(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Slots ordered by key, and how many have each key.

    Args:
        keys: integers [slots] in 0..num_keys; num_keys itself means nowhere, and comes last.
        num_keys: number of keys that are counted.

    Returns:
        order: int64 [slots]; by key, and within a key as they came.
        counts: int64 [num_keys].
    """
    ordered, order = torch.sort(keys, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_keys + 1, dtype=keys.dtype, device=keys.device))
    return order, bounds.diff()


def pad_groups(order: Tensor, counts: Tensor, capacity: int) -> Tensor:
    """Give each key exactly `capacity` rows: int64 [keys * capacity], with len(order) in those that stay empty.

    Args:
        order: int64 [slots], slots ordered by key.
        counts: int64 [keys], at most `capacity` each.
        capacity: rows of a key.
    """
    position = torch.arange(capacity, device=order.device)
    start = counts.cumsum(0) - counts
    slots = order[(start[:, None] + position).clamp(max=order.numel() - 1)]
    return torch.where(position < counts[:, None], slots, order.numel()).flatten()


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _gather(tokens, permutation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.permutation), None


class _SumRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum(rows, permutation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.permutation), None


def gather_rows(tokens: Tensor, permutation: Permutation) -> Tensor:
    """Forward: each row gets its token, [t, h] -> [rows, h], an empty row zeros. Backward: sum_rows."""
    return _GatherRows.apply(tokens, permutation)  # type: ignore[no-any-return]


def sum_rows(rows: Tensor, permutation: Permutation) -> Tensor:
    """Forward: the sum of each token's rows, in the order of its slots, [rows, h] -> [t, h]. Backward: gather_rows."""
    return _SumRows.apply(rows, permutation)  # type: ignore[no-any-return]


def gather_slots(values: Tensor, permutation: Permutation) -> Tensor:
    """Forward: each row gets the value of its slot, [t, width] -> [rows], an empty row 0. Backward: the reverse."""
    return gather_rows(values.reshape(-1, 1), permutation.of_slots).squeeze(1)


def _gather(tokens: Tensor, permutation: Permutation) -> Tensor:
    index = permutation.slots if permutation.width == 1 else permutation.slots // permutation.width
    return (_with_zero_row(tokens) if permutation.empty_rows else tokens).index_select(0, index)


def _sum(rows: Tensor, permutation: Permutation) -> Tensor:
    rows = _with_zero_row(rows) if permutation.idle_slots else rows
    index, width = permutation.inverse, permutation.width
    if width == 1 or rows.size(0) == 0:
        return rows.index_select(0, index)
    if rows.is_cuda and torch.compiler.is_compiling():
        return _sum_of_slots(rows, index, width)
    # A sum of looked-up rows in one operator, which adds in float32 and never holds [t, width, h].
    offsets = torch.arange(0, index.numel(), width, device=index.device)
    return torch.embedding_bag(rows.contiguous(), index, offsets)[0]


def _sum_of_slots(rows: Tensor, index: Tensor, width: int) -> Tensor:
    """The same for torch.compile, which makes one kernel of it and what is before and behind it."""
    return rows.index_select(0, index).unflatten(0, (-1, width)).sum(1)


def _with_zero_row(tokens: Tensor) -> Tensor:
    """One row of zeros behind the others, for the indices that mean nothing."""
    return torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])
