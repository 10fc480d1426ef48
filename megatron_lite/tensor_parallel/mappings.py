"""Collectives with a gradient, each with its contract: what forward does, what backward does.

All take `group=None` (also spelled `tp_group=`) for the tensor parallel group; with one rank, or no process group at
all, they are the identity.
They are built on functional collectives, so torch.compile sees through them. Activations are [s, b, h]: the sequence
is dim 0, the features are the last dim. In the papers' terms copy is f and reduce is g (Megatron-LM, Shoeybi et al.
2019, section 3); gather and reduce-scatter along the sequence are g and g-bar of Korthikanti et al. 2022, section 4.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel import collectives


def default_group(group: ProcessGroup | None, tp_group: ProcessGroup | None = None) -> ProcessGroup | None:
    """`group`, or `tp_group` (a second spelling of the same argument), or the tensor parallel group where it exists.

    Raises:
        ConfigError: both spellings with different groups.
    """
    if group is not None and tp_group is not None and group is not tp_group:
        raise ConfigError("group and tp_group are two spellings of one argument, but name different groups; keep one.")
    if group is None:
        group = tp_group
    return group if group is not None else parallel_state.get_tensor_model_parallel_group(check_initialized=False)


class _CopyToRegion(Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return input_.view_as(input_)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(grad, ctx.group), None


class _ReduceFromRegion(Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, group: ProcessGroup) -> Tensor:
        return collectives.all_reduce(input_, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return collectives.split(input_, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return collectives.all_gather(grad, ctx.dim, ctx.group), None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, dim: int, reduce_grad: bool, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.reduce_grad, ctx.group = dim, reduce_grad, group
        return collectives.all_gather(input_, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        to_shard = collectives.reduce_scatter if ctx.reduce_grad else collectives.split
        return to_shard(grad, ctx.dim, ctx.group), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return collectives.reduce_scatter(input_, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return collectives.all_gather(grad, ctx.dim, ctx.group), None, None


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any, input_: Tensor, output_splits: list[int], input_splits: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.output_splits, ctx.input_splits, ctx.group = output_splits, input_splits, group
        return collectives.all_to_all(input_, output_splits, input_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return collectives.all_to_all(grad, ctx.input_splits, ctx.output_splits, ctx.group), None, None, None


def copy_to_tensor_model_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: identity. Backward: all-reduce."""
    group = default_group(group, tp_group)
    return input_ if group is None or group_size(group) == 1 else _CopyToRegion.apply(input_, group)


def reduce_from_tensor_model_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: all-reduce. Backward: identity."""
    group = default_group(group, tp_group)
    return input_ if group is None or group_size(group) == 1 else _ReduceFromRegion.apply(input_, group)


def scatter_to_tensor_model_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: keep this rank's part of the last dim, [..., n] -> [..., n/tp]. Backward: all-gather.

    Raises:
        ConfigError: the last dim is not divisible by the group's size.
    """
    group = default_group(group, tp_group)
    if group is None or group_size(group) == 1:
        return input_
    require_divisible(input_, -1, group, "last dimension")
    return _Split.apply(input_, -1, group)


def gather_from_tensor_model_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: all-gather along the last dim, [..., n/tp] -> [..., n]. Backward: split.

    For outputs that every rank uses alike, so that their gradient is the same on all of them.
    """
    group = default_group(group, tp_group)
    return input_ if group is None or group_size(group) == 1 else _Gather.apply(input_, -1, False, group)


def scatter_to_sequence_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: keep this rank's part of the sequence, [s, ...] -> [s/tp, ...]. Backward: all-gather.

    Raises:
        ConfigError: the sequence is not divisible by the group's size.
    """
    group = default_group(group, tp_group)
    if group is None or group_size(group) == 1:
        return input_
    require_divisible(input_, 0, group, "sequence length (dim 0)")
    return _Split.apply(input_, 0, group)


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    group: ProcessGroup | None = None,
    *,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Forward: all-gather along the sequence, [s/tp, ...] -> [s, ...]. Backward: reduce-scatter, or split.

    Args:
        input_: this rank's part of the sequence.
        tensor_parallel_output_grad: the ranks use the result for different work, so their gradients are summed
            (reduce-scatter); False if all compute the same with it (split).
        group: default the tensor parallel group.
        tp_group: the same.

    Raises:
        ConfigError: a group in the place of `tensor_parallel_output_grad`.
    """
    if not isinstance(tensor_parallel_output_grad, bool):
        raise ConfigError(
            f"tensor_parallel_output_grad is {tensor_parallel_output_grad!r}, but it must be True or False; "
            "give a process group as tp_group=..."
        )
    group = default_group(group, tp_group)
    if group is None or group_size(group) == 1:
        return input_
    return _Gather.apply(input_, 0, tensor_parallel_output_grad, group)


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: reduce-scatter along the sequence, [s, ...] -> [s/tp, ...]. Backward: all-gather.

    Raises:
        ConfigError: the sequence is not divisible by the group's size.
    """
    group = default_group(group, tp_group)
    if group is None or group_size(group) == 1:
        return input_
    require_divisible(input_, 0, group, "sequence length (dim 0)")
    return _ReduceScatter.apply(input_, 0, group)


def all_gather_last_dim_from_tensor_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: all-gather along the last dim. Backward: reduce-scatter along it."""
    group = default_group(group, tp_group)
    return input_ if group is None or group_size(group) == 1 else _Gather.apply(input_, -1, True, group)


def reduce_scatter_last_dim_to_tensor_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Forward: reduce-scatter along the last dim. Backward: all-gather along it.

    Raises:
        ConfigError: the last dim is not divisible by the group's size.
    """
    group = default_group(group, tp_group)
    if group is None or group_size(group) == 1:
        return input_
    require_divisible(input_, -1, group, "last dimension")
    return _ReduceScatter.apply(input_, -1, group)


def all_to_all(
    group: ProcessGroup | None,
    input_: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
) -> Tensor:
    """Forward: all-to-all of rows (dim 0). Backward: all-to-all the other way.

    Args:
        group: the ranks that exchange.
        input_: [rows, ...], ordered by destination.
        output_split_sizes: rows received from each rank; None for equal parts.
        input_split_sizes: rows sent to each rank; None for equal parts.
    """
    group = default_group(group)
    if group is None or group_size(group) == 1:
        return input_
    size = group_size(group)
    if output_split_sizes is None or input_split_sizes is None:
        require_divisible(input_, 0, group, "number of rows")
    equal = [input_.size(0) // size] * size
    return _AllToAll.apply(input_, output_split_sizes or equal, input_split_sizes or equal, group)


def all_to_all_sp2hp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """From split tokens to split features: [t/tp, h] -> [t, h/tp]. Backward: the reverse."""
    group = default_group(group)
    if group is None or group_size(group) == 1:
        return input_
    require_divisible(input_, -1, group, "last dimension")
    by_destination = torch.cat(input_.reshape(-1, input_.size(-1)).chunk(group_size(group), dim=-1), dim=0)
    return all_to_all(group, by_destination)


def all_to_all_hp2sp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """From split features to split tokens: [t, h/tp] -> [t/tp, h]. Backward: the reverse."""
    group = default_group(group)
    if group is None or group_size(group) == 1:
        return input_
    exchanged = all_to_all(group, input_.reshape(-1, input_.size(-1)))
    return torch.cat(exchanged.chunk(group_size(group), dim=0), dim=-1)


def require_divisible(input_: Tensor, dim: int, group: ProcessGroup, what: str) -> None:
    """Refuse a tensor that the ranks of a group cannot split evenly along `dim`; `what` names that size."""
    size, ranks = input_.size(dim), group_size(group)
    if size % ranks:
        raise ConfigError(
            f"The {what} is {size}, but must be a multiple of the group's size ({ranks}) to be split; "
            f"pad it to {(size // ranks + 1) * ranks}."
        )
