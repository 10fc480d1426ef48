"""Comparing the copies of replicated tensors before a save.

torch.distributed.checkpoint stores one of several copies of a tensor and does not look at the others. If they have
drifted apart, which is always a bug, the checkpoint would hide it: the resumed run differs from the one that went on.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from megatron_lite import parallel_state
from megatron_lite.checkpoint.agreement import agreed, world
from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.model_state import local_tensor, model_tensors
from megatron_lite.distributed.tied_embeddings import tied_weights
from megatron_lite.model_chunks import ModelChunks, as_chunks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_replicas(
    model_chunks: ModelChunks,
    tp_group: dist.ProcessGroup | None = None,
    replicate_group: dist.ProcessGroup | None = None,
    etp_group: dist.ProcessGroup | None = None,
    expert_replicate_group: dist.ProcessGroup | None = None,
    data_parallel_group: dist.ProcessGroup | None = None,
    embedding_group: dist.ProcessGroup | None = None,
) -> None:
    """Check that tensors which every tensor parallel rank, or every replica of the model, holds are bit-equal.

    Routed experts differ over the tensor parallel ranks and have replicas elsewhere, so they have groups of their own.
    Buffers (the router's expert_bias) are not split over data parallel ranks as parameters are: each has a copy.

    Collective: one all-reduce (MAX) of a few bytes per tensor over each group, and one flag over the world.

    Args:
        tp_group: ranks that share the parameters which are not split over tensor parallel ranks.
        replicate_group: ranks that hold whole replicas of this rank's shards (the dimension dp_replicate).
        etp_group: ranks that share the experts' parameters which are not split over expert tensor parallel ranks.
        expert_replicate_group: ranks that hold whole replicas of this rank's experts (the dimension edp_replicate).
        data_parallel_group: ranks that hold whole copies of dense tensors that are no DTensors (all of dp x cp); None
            for those of `replicate_group`.
        embedding_group: ranks of the first and of the last pipeline stage, which hold tied embeddings each.

    Raises:
        CheckpointError: on every rank, with the names that differ and the ranks that noticed.
    """
    tensors, of_experts = model_tensors(model_chunks), _expert_names(model_chunks)
    dense = {name: tensor for name, tensor in tensors.items() if name not in of_experts}
    plain = {name: tensor for name, tensor in dense.items() if not isinstance(tensor, DTensor)}
    distributed = {name: tensor for name, tensor in dense.items() if name not in plain}
    experts = {name: tensor for name, tensor in tensors.items() if name in of_experts}
    differing = _differing(_not_split(dense, "tp"), tp_group, "tensor parallel ranks")
    differing += _differing(distributed, replicate_group, "replicas of the model")
    everybody = replicate_group if data_parallel_group is None else data_parallel_group
    differing += _differing(plain, everybody, "data parallel ranks")
    differing += _differing(_not_split(experts, "etp"), etp_group, "expert tensor parallel ranks")
    differing += _differing(experts, expert_replicate_group, "replicas of the experts")
    tied = tied_weights(as_chunks(model_chunks))
    if tied is not None and (tied.original is None or tied.copy is None):
        held = tied.original if tied.copy is None else tied.copy
        assert held is not None
        differing += _differing({"the tied embeddings": held}, embedding_group, "first and last pipeline stage")

    def complain() -> None:
        if differing:
            raise CheckpointError("\n".join(differing))

    agreed("Comparing the copies of replicated parameters", complain)


def verify_all_replicas(model_chunks: ModelChunks) -> None:
    """`verify_replicas` over the groups of `parallel_state`."""
    verify_replicas(
        model_chunks,
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_dense_mesh()["dp_replicate"].get_group(),
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_mesh()["edp_replicate"].get_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_embedding_group(check_initialized=False),
    )


def fingerprint(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits read as integers: an int64 scalar on its device, equal for bit-equal tensors."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    return tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def _differing(tensors: dict[str, Tensor], group: dist.ProcessGroup | None, whose: str) -> list[str]:
    if group is None or world()[1] == 1 or dist.get_world_size(group) == 1 or not tensors:
        return []
    mine = torch.stack([fingerprint(local_tensor(tensor)) for tensor in tensors.values()])
    # The complement reverses the order without overflow, so one MAX gives the largest and the smallest.
    extremes = torch.stack([mine, ~mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    unequal = (extremes[0] != ~extremes[1]).tolist()
    names = [name for name, differs in zip(tensors, unequal, strict=True) if differs]
    if not names:
        return []
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [
        f"the {whose} should hold equal copies of {shown}, but they differ. A gradient was not reduced, or a rank "
        "has computed something else; a checkpoint written since may hold it too."
    ]


def _expert_names(model_chunks: ModelChunks) -> set[str]:
    """The names in `model_tensors` that are declared to be of routed experts; undeclared parameters are dense."""
    chunks = as_chunks(model_chunks)
    names = set()
    for chunk in chunks:
        for prefix, module in chunk.named_modules():
            for name, spec in getattr(module, "parameter_specs", {}).items():
                if spec.is_expert:
                    names.add(f"{prefix}.{name}" if prefix else name)
    return names


def _not_split(tensors: dict[str, Tensor], dimension: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not _is_split(tensor, dimension)}


def _is_split(tensor: Tensor, dimension: str) -> bool:
    """Whether a tensor is sharded over a named mesh dimension."""
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    if dimension not in names:
        return False
    return not isinstance(tensor.placements[names.index(dimension)], Replicate)
