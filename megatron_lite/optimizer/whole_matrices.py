"""Work on whole matrices of which every rank holds a shard, each matrix on one of these ranks.

The ranks send their shards of a matrix to its owner, which works on it and sends back what each rank stores. So many
ranks work on as many matrices at a time, and nothing is computed twice by ranks that share shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megatron_lite.tensor_parallel.collectives import all_to_all


@dataclass(frozen=True)
class Split:
    """That a dimension of a tensor is cut as torch.chunk does it, one chunk for each rank of a mesh dimension.

    Attributes:
        mesh: of the tensor.
        mesh_dim: its dimension.
        dim: the dimension, counted from the last one (-1, -2).
        length: of the dimension before the cut.
    """

    mesh: DeviceMesh
    mesh_dim: int
    dim: int
    length: int

    @property
    def group(self) -> ProcessGroup:
        """The ranks; looked up, because a process that holds a group to its end may not end cleanly."""
        return self.mesh.get_group(self.mesh_dim)

    def lengths(self) -> list[int]:
        """Of the chunks, in the order of the ranks; torch.chunk makes fewer than asked for, the others are empty."""
        ranks = self.mesh.size(self.mesh_dim)
        chunk = -(-self.length // ranks)
        return [max(0, min(chunk, self.length - rank * chunk)) for rank in range(ranks)]


def matrix_splits(parameter: Tensor) -> tuple[Split, ...]:
    """How the matrices of a parameter, [rows, columns] or stacked [..., rows, columns], are split: last cut first.

    FSDP cuts what tensor parallelism has cut before, so its ranks are the first to be joined. Whole matrices of a stack
    on different ranks (expert parallelism) are no split.
    """
    if not isinstance(parameter, DTensor):
        return ()
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh of the parameter"
    found: list[Split] = []
    shape = list(parameter.shape)
    for mesh_dim in reversed(range(mesh.ndim)):
        placement = parameter.placements[mesh_dim]
        if placement.is_replicate():
            continue
        dim = placement.dim - parameter.ndim  # type: ignore[attr-defined]  # Shard and _StridedShard have it
        if dim < -2 or mesh.size(mesh_dim) == 1:
            continue
        split = Split(mesh, mesh_dim, dim, shape[dim])
        shape[dim] = split.lengths()[coordinate[mesh_dim]]
        found.insert(0, split)
    return tuple(found)


def in_rounds(splits: Mapping[str, tuple[Split, ...]], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in batches for `work_on_whole`: one matrix for each rank that shares them, of like size.

    Args:
        splits: name -> how it is split. All ranks that share one must give the same names in the same order.
        sizes: name -> elements of the whole tensor.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in splits:
        alike.setdefault(tuple(split.group.group_name for split in splits[name]), []).append(name)
    for names in alike.values():
        ranks = prod(split.mesh.size(split.mesh_dim) for split in splits[names[0]])
        names.sort(key=lambda name: -sizes[name])
        yield from (names[start : start + ranks] for start in range(0, len(names), ranks))


def work_on_whole(
    shards: Mapping[str, Tensor], splits: Mapping[str, tuple[Split, ...]], work: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """This rank's shards of work(name, whole tensor), which has the shape of the whole tensor.

    Args:
        shards: name -> shard; all of one dtype, split over the same groups.
        splits: name -> how it is split, last cut first.
        work: called for the tensors that this rank owns.

    Collectives: over each group of the splits two all-to-alls, which move each element once to its owner and back.
    """
    names = list(shards)
    if not names or not splits[names[0]]:
        return {name: work(name, shard) for name, shard in shards.items()}
    cuts = {name: splits[name][0] for name in names}
    group = cuts[names[0]].group
    ranks = range(group.size())
    owned = [names[rank :: len(ranks)] for rank in ranks]
    mine = owned[group.rank()]
    shapes = [[_with_length(shards[name].shape, cuts[name], rank) for name in mine] for rank in ranks]
    nothing = shards[names[0]].new_empty(0)
    received = _exchange([[shards[name] for name in theirs] for theirs in owned], shapes, group, nothing)
    whole = {name: torch.cat(parts, cuts[name].dim) for name, *parts in zip(mine, *received, strict=True)}
    done = work_on_whole(whole, {name: splits[name][1:] for name in mine}, work)
    chunks = [done[name].split(cuts[name].lengths(), cuts[name].dim) for name in mine]
    back = [[of_matrix[rank] for of_matrix in chunks] for rank in ranks]
    returned = _exchange(back, [[shards[name].shape for name in theirs] for theirs in owned], group, nothing)
    return dict(zip(chain(*owned), chain(*returned), strict=True))


def _with_length(shape: torch.Size, cut: Split, rank: int) -> torch.Size:
    """The shape of `rank`'s chunk, given that of another one."""
    sizes = list(shape)
    sizes[cut.dim] = cut.lengths()[rank]
    return torch.Size(sizes)


def _exchange(
    outgoing: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], group: ProcessGroup, nothing: Tensor
) -> list[list[Tensor]]:
    """Send the tensors outgoing[i] to rank i; receive from it tensors of shapes[i]. One all-to-all.

    `nothing`, an empty tensor, gives dtype and device to a rank that sends none.
    """
    flat = torch.cat([nothing, *(tensor.reshape(-1) for theirs in outgoing for tensor in theirs)])
    sent = [sum(tensor.numel() for tensor in theirs) for theirs in outgoing]
    counts = [[shape.numel() for shape in of_rank] for of_rank in shapes]
    received = all_to_all(flat, [sum(of_rank) for of_rank in counts], sent, group)
    parts = iter(received.split([count for of_rank in counts for count in of_rank]))
    return [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]
