"""The global gradient norm, each logical element counted once, with one scalar all-reduce and no host synchronization.

A gradient element may live on many ranks: on every replica of data parallelism, and on every tensor parallel rank if
the parameter is not split. It is counted by the one rank that has coordinate 0 along every mesh dimension over which
the parameter is replicated; shards, which are disjoint, are counted by their holders.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# Elements whose squares may be added in float32: the result is off by 1e-7 at most.
_STRETCH = 1024


def counts_here(parameter: Tensor, mesh: DeviceMesh | None = None) -> bool:
    """Whether this rank counts its local elements of `parameter` towards a global sum.

    Args:
        parameter: a DTensor, or a plain tensor that every rank of `mesh` holds alike.
        mesh: the mesh of all ranks that see this kind of parameter (dense or expert), which the DTensor's own mesh is
            a slice of; its "pp" dimension separates different parameters. None: the DTensor's own mesh is all there is.
    """
    replicated: list[tuple[DeviceMesh, str | int]] = []
    split_over: set[str] = set()
    if isinstance(parameter, DTensor):
        own = parameter.device_mesh
        names = own.mesh_dim_names or ()
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_replicate():
                replicated.append((own, dimension))
            elif names:
                split_over.add(names[dimension])
    if mesh is not None:
        assert mesh.mesh_dim_names is not None, "the mesh of all ranks must have named dimensions"
        replicated += [(mesh, name) for name in mesh.mesh_dim_names if name != "pp" and name not in split_over]
    return all(owner_mesh.get_local_rank(dimension) == 0 for owner_mesh, dimension in replicated)


def local_sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of local tensors as a float64 scalar; 0 for none. Added in float64, within 3e-7."""
    present = [gradient for gradient in gradients if gradient.numel() > 0]
    if not present:
        return torch.zeros((), dtype=torch.float64, device=device)
    # In float32 the kernels' sums are off by 1e-5, and by how much depends on how a tensor is split.
    if device.type == "cpu":
        return torch.stack([_sum_of_squares(gradient) for gradient in present]).sum()
    return torch.stack(torch._foreach_norm(present, 2, torch.float64)).square().sum()


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """Of one tensor, in float64, but for short stretches of float32: a CPU's kernel converts all of it first.

    So float32 gradients above 5e17 count as infinite here.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    whole = gradient.numel() // _STRETCH * _STRETCH
    many, rest = gradient.flatten().split([whole, gradient.numel() - whole])
    norms = torch.linalg.vector_norm(many.view(-1, _STRETCH), dim=1, dtype=wide)
    return norms.double().square().sum() + torch.linalg.vector_norm(rest, dtype=wide).double().square()


def local_num_zeros(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Number of zero elements of local tensors as a float64 scalar (exact up to 2^53)."""
    zeros = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        zeros += gradient.numel() - torch.count_nonzero(gradient)
    return zeros


def global_grad_statistics(
    gradients: Sequence[Tensor], device: torch.device, count_zeros: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Global L2 norm of all gradients of all ranks, and the number of zeros among them if asked.

    Args:
        gradients: the local gradients that this rank counts (see `counts_here`).
        device: where the result lives.
        count_zeros: also count elements equal to zero.

    Returns:
        norm: float64 scalar; not finite if any gradient anywhere is not.
        zeros: float64 scalar, or None.

    Collectives: one all-reduce (SUM) of one or two float64 numbers over the world, so that every rank gets the same
    answer to the bit.
    """
    sums = [local_sum_of_squares(gradients, device)]
    if count_zeros:
        sums.append(local_num_zeros(gradients, device))
    total = torch.stack(sums)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total[0].sqrt(), total[1] if count_zeros else None
