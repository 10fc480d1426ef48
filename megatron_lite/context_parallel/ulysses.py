"""All-to-all attention (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509): split heads instead of tokens.

Before the attention each rank gives away most heads of its tokens and gets its own heads of all tokens; behind it the
reverse. So any attention can stand between, but there must be heads enough.

Bytes a rank sends per layer: forward (cp - 1)/cp of queries, keys, values and output, (2 n + 2 g) s/cp b d numbers;
backward the same. With fewer key/value heads than ranks they are repeated first, and g counts the repeated ones.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.context_parallel.sharding import zigzag_positions
from megatron_lite.errors import ConfigError
from megatron_lite.host_copies import copy_to_device
from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel.mappings import all_to_all


class _Reorder(torch.autograd.Function):
    """Forward: rows in the order `index`. Backward: in the order `inverse`, also as a lookup."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


@functools.lru_cache(maxsize=16)
def order_of_group(stretches: tuple[int, ...], cp_size: int, ranks: range, device: torch.device) -> Tensor:
    """Where the rows of several ranks, put behind one another, have to go to stand in the order of the sequence.

    int64 [2, rows]: row i of the ordered tensor is row order[0, i] of the concatenation, and order[1] is the inverse.
    Neighbouring ranks that divide cp evenly hold together just what one rank of a coarser split would. All layers share
    one tensor, also where they keep it for backward.
    """
    with torch.inference_mode(False):  # training may come later, and want to keep what an evaluation found
        order = torch.cat([zigzag_positions(stretches, cp_size, rank) for rank in ranks]).argsort()
        return copy_to_device(torch.stack((order, order.argsort())), device)


def scatter_heads(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: all-to-all from split tokens to split heads, [s, b, n, d] -> [s * size, b, n / size, d]. Backward: back.

    Args:
        query: [s, b, n, d].
        key, value: [s, b, g, d]; with fewer heads than ranks, each is repeated.
        order: of order_of_group; None for one rank, where nothing happens.
        group: the ranks that exchange.

    Raises:
        ConfigError: the heads cannot be divided between the ranks.
    """
    if order is None:
        return query, key, value
    size = group_size(group)
    check_heads(query.size(2), key.size(2), size)
    if key.size(2) < size:
        key, value = (x.repeat_interleave(size // x.size(2), dim=2) for x in (key, value))
    # What rank i gets lies together: its heads of all three tensors, in one exchange.
    parts = torch.cat([x.unflatten(2, (size, -1)) for x in (query, key, value)], dim=3)
    rows = all_to_all(group, parts.movedim(2, 0).flatten(0, 1).contiguous())
    heads = [x.size(2) // size for x in (query, key, value)]
    query, key, value = _Reorder.apply(rows, order[0], order[1]).split(heads, dim=2)
    return query, key, value


def gather_heads(out: Tensor, order: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """The inverse of scatter_heads for the output: [s * size, b, n / size, d] -> [s, b, n, d]."""
    if order is None:
        return out
    rows: Tensor = all_to_all(group, _Reorder.apply(out, order[1], order[0]))
    return rows.unflatten(0, (group_size(group), -1)).movedim(0, 2).flatten(2, 3)


def check_heads(heads: int, key_heads: int, size: int) -> None:
    """Refuse heads that `size` ranks cannot share.

    Raises:
        ConfigError: naming both numbers and what would do.
    """
    if heads % size or (key_heads % size and size % key_heads):
        raise ConfigError(
            f"cp_comm_type a2a divides {heads} query heads and {key_heads} key/value heads (of one tensor parallel "
            f"rank) between {size} ranks, but {size} must divide the query heads, and divide the key/value heads or "
            "be a multiple of them; use --cp-comm-type p2p, or a2a+p2p with a smaller first size."
        )
