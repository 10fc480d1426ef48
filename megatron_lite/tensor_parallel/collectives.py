"""Collectives that return their result, without a gradient: the raw material of mappings and layers.

A `start_*` function launches and returns at once; its result may be read only after `wait`, and that of a reduction is
what the function it returns gives. What is computed between the two overlaps the communication.

On a CPU reductions are exchanges of what is to be added, added up in the order of the ranks. gloo's own take two to
eight times as long: its reduce-scatter is an all-reduce, and that goes around the ranks twice.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed._functional_collectives  # registers the operators used below
from torch import Tensor
from torch.distributed import ProcessGroup

_ops = torch.ops._c10d_functional
# Bytes that more than two ranks exchange whole; larger tensors go around in parts.
_EXCHANGED_WHOLE = 2**16


def wait(pending: Tensor) -> Tensor:
    """The finished result of a `start_*` function."""
    return _ops.wait_tensor(pending)  # type: ignore[no-any-return]


def exchanges(tensor: Tensor) -> bool:
    """Whether reductions of this tensor are exchanges."""
    return tensor.device.type == "cpu"


def start_all_reduce(tensor: Tensor, group: ProcessGroup, op: str = "sum") -> Callable[[], Tensor]:
    """Launch the elementwise reduction over the group; the input is left alone. Returns what waits for the result."""
    assert op in ("sum", "max"), f"{op} is not implemented"
    tensor, ranks = tensor.contiguous(), group.size()
    whole = ranks == 2 or tensor.numel() * tensor.element_size() <= _EXCHANGED_WHOLE
    if not exchanges(tensor) or not whole:
        return functools.partial(wait, _ops.all_reduce(tensor, op, group.group_name))
    flat = tensor.view(1, -1)
    if ranks != 2:
        splits = [1] * ranks
        received = _ops.all_to_all_single(flat.repeat(ranks, 1), splits, splits, group.group_name)
        return lambda: _reduced(wait(received), op).view_as(tensor)
    splits = [group.rank(), 1 - group.rank()]  # nothing to itself
    received = _ops.all_to_all_single(flat, splits, splits, group.group_name)
    add = torch.maximum if op == "max" else torch.add
    return lambda: add(tensor, wait(received).view_as(tensor))


def start_all_gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Launch the concatenation along dim 0: [n, ...] -> [n * ranks, ...]."""
    return _ops.all_gather_into_tensor(tensor.contiguous(), group.size(), group.group_name)  # type: ignore[no-any-return]


def start_reduce_scatter(tensor: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Launch the sum over the group of which each rank keeps its part of dim 0: [n, ...] -> [n / ranks, ...]."""
    tensor, ranks = tensor.contiguous(), group.size()
    if not exchanges(tensor):
        return functools.partial(wait, _ops.reduce_scatter_tensor(tensor, "sum", ranks, group.group_name))
    splits = [tensor.size(0) // ranks] * ranks
    received = _ops.all_to_all_single(tensor, splits, splits, group.group_name)
    return lambda: _reduced(wait(received).unflatten(0, (ranks, -1)), "sum")


def _reduced(of_ranks: Tensor, op: str) -> Tensor:
    """[ranks, ...] -> [...]."""
    return of_ranks.amax(0) if op == "max" else of_ranks.sum(0, dtype=of_ranks.dtype)


def all_reduce(tensor: Tensor, group: ProcessGroup, op: str = "sum") -> Tensor:
    """Elementwise reduction ("sum" or "max") over the group."""
    return start_all_reduce(tensor, group, op)()


def all_gather(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenation of the ranks' tensors along `dim` (0 or -1)."""
    gathered = wait(start_all_gather(tensor, group))
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size(), dim=0), dim=dim)


def reduce_scatter(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part, along `dim` (0 or -1), of the sum over the group."""
    if dim != 0:
        tensor = torch.cat(tensor.chunk(group.size(), dim=dim), dim=0)
    return start_reduce_scatter(tensor, group)()


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
