"""Products that run while what they need, or what they make, travels (asynchronous tensor parallelism).

Under sequence parallelism each rank holds the positions [s/tp, b, ...] of its part of the sequence. Neither product has
to wait for all of the communication beside it (Wang et al. 2023, "Overlap Communication with Dependent Computation via
Decomposition in Large Deep Learning Models"):

    gather_then_multiply          [s/tp, b, k] -> [s, b, n]: the part that is here is multiplied while others arrive.
    multiply_then_reduce_scatter  [s, b, k] -> [s/tp, b, n]: the product of one part travels while the next is computed.

There are two ways, and all ranks of a group take the same, chosen once (`choose_way`):

    ring        On any backend. In step i a rank multiplies the part of rank - i, which goes on to the next rank
                meanwhile. The sum of part r begins on rank r + 1 and each rank on its way adds its own:
                ((p[r+1] + p[r+2]) + ...) + p[r], in the dtype of the product after each addition.
    symmetric   torch's operators for GPUs of one host, which read each other's memory. Products are added in the order
                of the ranks, accumulated in at least float32 and rounded once.

So a result does not depend on when messages arrive. Of two ranks the ring adds the same two numbers as a plain
reduce-scatter. Both ways multiply parts of the sequence: a library may round these products otherwise than those of the
whole.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.tensor_parallel.collectives import start_shift, wait

Way = Literal["ring", "symmetric"]
ALIGNMENT = 16
"""Bytes of which a row of operands and results must be a multiple for torch's operators; others take the ring."""
_SMALLEST_WORKSPACE = 2**20  # bytes; torch makes it larger where a product needs that

_chosen: WeakKeyDictionary[ProcessGroup, Way] = WeakKeyDictionary()


def gather_then_multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup, way: Way, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """All-gather along dim 0, then x weight^T + b: [s/tp, b, k] x [n, k] -> [s, b, n].

    Args:
        x: this rank's part of the sequence.
        weight: [n, k].
        bias: [n], or None.
        group: the ranks that split the sequence.
        way: how, see above.
        keep: also return what was gathered.

    Returns:
        The product, and the gathered [s, b, k] or None.
    """
    x = x.contiguous()
    if way == "symmetric" and _is_aligned(x, weight):
        gathered, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(
            x, [weight.t()], 0, group.group_name, return_A=keep
        )
        return product if bias is None else product.add_(bias), gathered
    ranks, rank = group.size(), group.rank()
    parts: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}
    here = x
    for step in range(ranks):
        arriving = start_shift(here, group) if step + 1 < ranks else None
        whose = (rank - step) % ranks
        products[whose] = F.linear(here, weight, bias)
        if keep:
            parts[whose] = here
        if arriving is not None:
            here = wait(arriving)
    gathered = torch.cat([parts[whose] for whose in range(ranks)]) if keep else None
    return torch.cat([products[whose] for whose in range(ranks)]), gathered


def multiply_then_reduce_scatter(x: Tensor, weight: Tensor, group: ProcessGroup, way: Way) -> Tensor:
    """x weight^T, then reduce-scatter along dim 0: [s, b, k] x [n, k] -> [s/tp, b, n].

    Args:
        x: all positions, s a multiple of the group's size.
        weight: [n, k].
        group: the ranks that split the sequence.
        way: how, see above.
    """
    if way == "symmetric" and _is_aligned(x, weight):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(  # type: ignore[no-any-return]
            x.contiguous(), weight.t(), "sum", 0, group.group_name
        )
    ranks, rank = group.size(), group.rank()
    parts = x.chunk(ranks)
    product = F.linear(parts[rank - 1], weight)
    for step in range(1, ranks):
        travelling = start_shift(product, group)
        product = F.linear(parts[(rank - 1 - step) % ranks], weight)
        product += wait(travelling)
    return product


def _is_aligned(x: Tensor, weight: Tensor) -> bool:
    return all(size * x.element_size() % ALIGNMENT == 0 for size in weight.shape)


def choose_way(group: ProcessGroup) -> Way:
    """How products of this group overlap: the same on all its ranks. The first call for a group is a collective."""
    if group not in _chosen:
        _chosen[group] = "symmetric" if has_symmetric_memory(group) else "ring"
    return _chosen[group]


def has_symmetric_memory(group: ProcessGroup) -> bool:
    """Whether all ranks can read each other's memory as torch's operators want. Collective under NCCL, else nothing.

    That takes NVIDIA GPUs, one for each rank, in one host and with access to one another, all of them visible to every
    rank, and a system that lets processes share memory. The operators' workspace is made here.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    if "cuda:nccl" not in str(dist.get_backend_config(group)):
        return False
    own = torch.cuda.current_device()
    device = torch.device("cuda", own)  # named everywhere, as models are built under torch.device("meta")
    visible = [_identity(number) for number in range(torch.cuda.device_count())]
    peers = torch.empty(group.size(), len(visible[own]), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(peers, torch.tensor([visible[own]], dtype=torch.uint8, device=device), group)
    reached = reaches(own, [tuple(peer) for peer in peers.tolist()], visible, torch.cuda.can_device_access_peer)
    if not _all(reached, device, group):
        return False
    # Imported here, as not every build of torch has it. It registers the operators.
    from torch.distributed import _symmetric_memory

    try:
        _symmetric_memory.get_symm_mem_workspace(group.group_name, _SMALLEST_WORKSPACE)
    except RuntimeError:
        return _all(False, device, group)
    return _all(True, device, group)


def reaches(
    own: int, peers: Sequence[Hashable], visible: Sequence[Hashable], can_access: Callable[[int, int], bool]
) -> bool:
    """Whether the ranks have a device each, and this rank's can read the memory of all.

    Args:
        own: number of this rank's device.
        peers: the identity of each rank's device.
        visible: the identity of each device that this process sees; those of other hosts are not among them.
        can_access: whether the device of the first number can read the memory of the second.
    """
    if len(set(peers)) < len(peers) or not set(peers) <= set(visible):
        return False
    numbers = [visible.index(peer) for peer in peers]
    return all(number == own or can_access(own, number) for number in numbers)


def _identity(number: int) -> tuple[int, ...]:
    """The device's UUID, as the codes of its characters."""
    return tuple(str(torch.cuda.get_device_properties(number).uuid).encode())


def _all(here: bool, device: torch.device, group: ProcessGroup) -> bool:
    """Whether it holds on all ranks."""
    agreed = torch.tensor(int(here), device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group)
    return bool(agreed.item())
