"""Collectives that return their result, without a gradient: the raw material of mappings and layers.

A `start_*` function launches and returns at once; its result may be read only after `wait`. What is computed between
the two overlaps the communication.
"""

import torch
import torch.distributed._functional_collectives  # registers the operators used below
from torch import Tensor
from torch.distributed import ProcessGroup

_ops = torch.ops._c10d_functional


def wait(pending: Tensor) -> Tensor:
    """The finished result of a `start_*` function."""
    return _ops.wait_tensor(pending)  # type: ignore[no-any-return]


def start_all_reduce(tensor: Tensor, group: ProcessGroup, op: str = "sum") -> Tensor:
    """Launch the elementwise reduction over the group; the input is left alone."""
    return _ops.all_reduce(tensor.contiguous(), op, group.group_name)  # type: ignore[no-any-return]


def start_all_gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Launch the concatenation along dim 0: [n, ...] -> [n * ranks, ...]."""
    return _ops.all_gather_into_tensor(tensor.contiguous(), group.size(), group.group_name)  # type: ignore[no-any-return]


def start_reduce_scatter(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Launch the sum over the group of which each rank keeps its part of dim 0: [n, ...] -> [n / ranks, ...]."""
    return _ops.reduce_scatter_tensor(tensor.contiguous(), "sum", group.size(), group.group_name)  # type: ignore[no-any-return]


def all_reduce(tensor: Tensor, group: ProcessGroup, op: str = "sum") -> Tensor:
    """Elementwise reduction ("sum" or "max") over the group."""
    return wait(start_all_reduce(tensor, group, op))


def all_gather(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenation of the ranks' tensors along `dim` (0 or -1)."""
    gathered = wait(start_all_gather(tensor, group))
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size(), dim=0), dim=dim)


def reduce_scatter(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part, along `dim` (0 or -1), of the sum over the group."""
    if dim != 0:
        tensor = torch.cat(tensor.chunk(group.size(), dim=dim), dim=0)
    return wait(start_reduce_scatter(tensor, group))


def split(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of `tensor` along `dim`; no communication."""
    return tensor.chunk(group.size(), dim=dim)[group.rank()].contiguous()


def all_to_all(tensor: Tensor, output_splits: list[int], input_splits: list[int], group: ProcessGroup) -> Tensor:
    """Send `input_splits[i]` rows to rank i and receive `output_splits[i]` rows from it."""
    return wait(_ops.all_to_all_single(tensor.contiguous(), output_splits, input_splits, group.group_name))


def start_shift(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Launch sending `tensor` to the next rank of the ring, and receiving one of the same shape from the previous."""
    assert group is not None, "one rank has nobody to send to"
    size, rank, rows = group.size(), group.rank(), tensor.size(0)
    to = [rows if peer == (rank + 1) % size else 0 for peer in range(size)]
    of = [rows if peer == (rank - 1) % size else 0 for peer in range(size)]
    return _ops.all_to_all_single(tensor.contiguous(), of, to, group.group_name)  # type: ignore[no-any-return]
