"""What the framework must know of a parameter, declared once and kept on the module that owns it.

FSDP2 replaces Parameter objects and attributes on them are lost, so the declaration lives in
`module.parameter_specs[name]`. How a parameter is split, its DTensor placement says.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import device_type_of, group_rank, group_size
from megatron_lite.tensor_parallel.utils import divide


@dataclass(frozen=True)
class ParameterSpec:
    """Declaration of one parameter.

    Attributes:
        init_method: fills the full logical tensor in place from the ambient random state.
        partial_over_tp: after backward the local gradient is a partial sum over tensor parallel ranks and must be
            summed (norms, row biases and gates under sequence parallelism; q and k norms always). For an expert these
            are the expert tensor parallel ranks.
        is_expert: the parameter belongs to a routed expert (a property of the parameter, never of a size).
        apply_weight_decay: None decides by the rule "not 1-D and not a bias" on the logical shape.
        stacks_experts: dimension 0 counts experts, and `init_method` fills the tensor of one of them.
        copy_of: name of the parameter of which this is a copy in another pipeline stage (tied embeddings). Both have
            the same values always; the copy has no name of its own in checkpoints and is not counted in norms.
        row_blocks: of a fused matrix the sizes of the blocks of rows that repeat down to its end (queries, key, value
            of a query group); the first blocks of all repetitions are one matrix to the optimizer, and so on.
    """

    init_method: Callable[[Tensor], Any]
    partial_over_tp: bool = False
    is_expert: bool = False
    apply_weight_decay: bool | None = None
    stacks_experts: bool = False
    copy_of: str | None = None
    row_blocks: tuple[int, ...] | None = None


def declare_parameter(module: nn.Module, name: str, spec: ParameterSpec) -> None:
    """Attach the declaration of `module.<name>`."""
    module.__dict__.setdefault("parameter_specs", {})[name] = spec


def create_parameter(
    module: nn.Module,
    name: str,
    global_shape: tuple[int, ...],
    *,
    init_method: Callable[[Tensor], Any],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    shard_dim: int | None = None,
    group: ProcessGroup | None = None,
    partial_over_tp: bool = False,
    is_expert: bool = False,
    apply_weight_decay: bool | None = None,
    perform_initialization: bool = True,
) -> nn.Parameter:
    """Register a parameter of logical shape `global_shape` on `module`, holding this rank's shard.

    Split over `group` along `shard_dim` it is a DTensor on the group's 1-D mesh (for a group of size 1 too); replicated
    (shard_dim None) or with no process group it is a plain tensor. Unless on the meta device it is filled from the
    ambient random state by drawing the full tensor and slicing, so equal seeds give weights independent of the layout.

    Raises:
        ConfigError: the group's size does not divide the dimension.
    """
    declare_parameter(module, name, ParameterSpec(init_method, partial_over_tp, is_expert, apply_weight_decay))
    shape = list(global_shape)
    shards, shard = (1, 0) if shard_dim is None else (group_size(group), group_rank(group))
    if shard_dim is not None:
        shape[shard_dim] = divide(shape[shard_dim], shards)
    local_tensor = torch.empty(shape, dtype=dtype, device=device)
    if perform_initialization and not local_tensor.is_meta:
        with torch.no_grad():
            if shards == 1:
                init_method(local_tensor)
            else:
                assert shard_dim is not None
                full = torch.empty(global_shape, dtype=dtype, device=device)
                init_method(full)
                local_tensor.copy_(full.chunk(shards, shard_dim)[shard])
    stored = local_tensor
    if shard_dim is not None and group is not None:
        mesh = parallel_state.get_mesh_of_group(group) or _mesh_of_foreign_group(group)
        stored = DTensor.from_local(local_tensor, mesh, [Shard(shard_dim)], run_check=False)
    parameter = nn.Parameter(stored)
    module.register_parameter(name, parameter)
    return parameter


def create_expert_parameter(
    module: nn.Module,
    name: str,
    global_shape: tuple[int, ...],
    *,
    init_method: Callable[[Tensor], Any],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    shard_dim: int | None = None,
    ep_group: ProcessGroup | None = None,
    etp_group: ProcessGroup | None = None,
    tp_ep_group: ProcessGroup | None = None,
    partial_over_tp: bool = False,
    apply_weight_decay: bool | None = None,
    perform_initialization: bool = True,
) -> nn.Parameter:
    """Register the tensors of all experts, stacked to [E, ...], on `module`, holding those of this rank.

    Dimension 0 is split over `ep_group` in contiguous blocks, `shard_dim` over `etp_group`; with process groups the
    parameter is a DTensor on the 2-D mesh ("ep", "etp"), otherwise a plain tensor. Unless on the meta device it is
    filled from the ambient random state, expert after expert, so equal seeds give weights independent of the layout.

    Args:
        module: owner of the parameter.
        name: attribute of the parameter.
        global_shape: [E, ...] of all experts.
        init_method: fills the tensor of one expert.
        dtype: of the stored parameter.
        device: of the stored parameter.
        shard_dim: dimension (from 1 on) split over `etp_group`; None: every rank of that group holds it whole.
        ep_group: ranks over which the experts are distributed.
        etp_group: ranks over which each expert is split.
        tp_ep_group: both together; needed if the groups are not those of `parallel_state`.
        partial_over_tp: the local gradient is a partial sum over `etp_group`.
        apply_weight_decay: see ParameterSpec.
        perform_initialization: fill it.

    Raises:
        ConfigError: a group's size does not divide its dimension, or the groups form no mesh.
    """
    spec = ParameterSpec(init_method, partial_over_tp, True, apply_weight_decay, stacks_experts=True)
    declare_parameter(module, name, spec)
    shape = list(global_shape)
    shape[0] = divide(shape[0], group_size(ep_group))
    if shard_dim is not None:
        shape[shard_dim] = divide(shape[shard_dim], group_size(etp_group))
    stored = torch.empty(shape, dtype=dtype, device=device)
    mesh = _mesh_of_experts(ep_group, etp_group, tp_ep_group)
    if mesh is not None:
        placements = [Shard(0), Replicate() if shard_dim is None else Shard(shard_dim)]
        stored = DTensor.from_local(stored, mesh, placements, run_check=False)
    parameter = nn.Parameter(stored)
    module.register_parameter(name, parameter)
    if perform_initialization and not parameter.is_meta:
        with torch.no_grad():
            mine = _stored_experts(parameter)
            for expert in range(global_shape[0]):
                full = torch.empty(global_shape[1:], dtype=dtype, device=device)
                init_method(full)
                if expert in mine:
                    local(parameter.detach())[mine.index(expert)] = _shard_of_expert(full, parameter)
    return parameter


def _mesh_of_experts(
    ep_group: ProcessGroup | None, etp_group: ProcessGroup | None, tp_ep_group: ProcessGroup | None
) -> DeviceMesh | None:
    """The 2-D mesh ("ep", "etp") of these groups; None where there is none to split over."""
    if ep_group is not None and etp_group is not None:
        slices = [parallel_state.get_mesh_of_group(group) for group in (ep_group, etp_group)]
        if [mesh and mesh.mesh_dim_names for mesh in slices] == [("ep",), ("etp",)]:
            return parallel_state.get_expert_mesh()["ep", "etp"]
        if tp_ep_group is not None:
            device_type = device_type_of(ep_group)
            ranks = _grid_of_ranks(*(dist.get_process_group_ranks(one) for one in (ep_group, etp_group, tp_ep_group)))
            return DeviceMesh.from_group([ep_group, etp_group], device_type, mesh=ranks, mesh_dim_names=("ep", "etp"))
    if group_size(ep_group) * group_size(etp_group) == 1:
        return None
    raise ConfigError(
        f"the experts are split over groups of {group_size(ep_group)} (ep) and {group_size(etp_group)} (expt_tp) ranks "
        "that initialize_model_parallel did not make; give ep, expt_tp and tp_ep, all three, in the pg_collection."
    )


def _grid_of_ranks(ep_ranks: list[int], etp_ranks: list[int], joint_ranks: list[int]) -> Tensor:
    """The ranks of the joint group as [ep, etp], of which `ep_ranks` are a column and `etp_ranks` a row.

    Which of the two are neighbours in the joint group is the user's choice.
    """
    if len(ep_ranks) * len(etp_ranks) == len(joint_ranks):
        joint = torch.tensor(joint_ranks, device="cpu")
        for grid in (joint.view(len(ep_ranks), -1), joint.view(-1, len(ep_ranks)).t().contiguous()):
            if ep_ranks in grid.t().tolist() and etp_ranks in grid.tolist():
                return grid
    raise ConfigError(
        f"the ranks {ep_ranks} of ep and {etp_ranks} of expt_tp are no column and row of a grid of the ranks "
        f"{joint_ranks} of tp_ep; join in tp_ep the ranks of both, in the order ep x expt_tp or expt_tp x ep."
    )


def _mesh_of_foreign_group(group: ProcessGroup) -> DeviceMesh:
    device_type = device_type_of(group)
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("tp",))


def local(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter as a plain tensor through which gradients flow."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def named_parameter_specs(model: nn.Module) -> dict[str, ParameterSpec]:
    """The declaration of every parameter by its name in `model.named_parameters()` (a tied one once).

    Raises:
        ConfigError: a parameter nobody declared.
    """
    specs = {}
    for fqn, _ in model.named_parameters():
        path, _, name = fqn.rpartition(".")
        declared = getattr(model.get_submodule(path), "parameter_specs", {})
        if name not in declared:
            raise ConfigError(
                f"Parameter {fqn} has no declaration, so neither its initial value nor the reduction of its gradient "
                "is known; create it with create_parameter, or describe it with declare_parameter."
            )
        specs[fqn] = declared[name]
    return specs


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int, on_cpu: bool = False) -> None:
    """Fill every parameter so that its logical value depends on (seed, name) alone, not on the layout.

    Each logical tensor is drawn whole from a generator seeded by its name and sliced to what this rank stores: first
    the tensor (or expert) parallel shard, then FSDP's chunk. Stacked experts are drawn one by one, each from its own
    seed (name and global index), and only those of which this rank stores something. No communication; the random
    state is left as it was.

    Args:
        model: its parameters have storage; their values are replaced.
        seed: of the whole model.
        on_cpu: draw on the CPU, whose generator gives the same numbers on every machine, and copy.

    Raises:
        ConfigError: a parameter nobody declared.
    """
    specs = named_parameter_specs(model)
    for fqn, parameter in model.named_parameters():
        target = local(parameter.detach())
        device = torch.device("cpu") if on_cpu else target.device
        spec = specs[fqn]
        fqn = spec.copy_of or fqn
        if not spec.stacks_experts:
            target.copy_(_shard_of(_drawn(seed, fqn, spec, parameter.shape, target.dtype, device), parameter))
            continue
        for position, expert in enumerate(_stored_experts(parameter)):
            full = _drawn(seed, f"{fqn}.{expert}", spec, parameter.shape[1:], target.dtype, device)
            target[position] = _shard_of_expert(full, parameter)


def _drawn(
    seed: int, name: str, spec: ParameterSpec, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The logical tensor of this name, which depends on (seed, name) alone."""
    with _seeded_by_name(seed, name, device):
        full = torch.empty(shape, dtype=dtype, device=device)
        spec.init_method(full)
    return full


def stored_indices(parameter: Tensor) -> list[range]:
    """For each dimension the indices of the logical tensor that this rank stores; any block of them is contiguous."""
    found = []
    for dim, length in enumerate(parameter.shape):
        numbers = torch.arange(length, device="cpu").view([-1 if one == dim else 1 for one in range(parameter.ndim)])
        mine = _shard_of(numbers, parameter, only=dim).flatten()
        found.append(range(int(mine[0]), int(mine[-1]) + 1) if len(mine) else range(0))
    return found


def _stored_experts(parameter: Tensor) -> list[int]:
    """Global indices of the experts of which this rank stores (a part of) the tensor, in the order of its shard."""
    return list(stored_indices(parameter)[0])


def _shard_of_expert(full: Tensor, parameter: Tensor) -> Tensor:
    """What a rank that stores an expert stores of that expert's tensor `full`, one of those stacked in `parameter`."""
    for dim in range(1, parameter.ndim):
        full = _shard_of(full.unsqueeze(0), parameter, only=dim).squeeze(0)
    return full


def _shard_of(full: Tensor, parameter: Tensor, only: int | None = None) -> Tensor:
    """What this rank stores of the logical tensor `full`, given how `parameter` is split (along dimension `only`).

    Mesh dimensions are taken from the last to the first: tensor parallelism splits before FSDP does (`_StridedShard`).
    """
    if not isinstance(parameter, DTensor):
        return full
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh of the parameter"
    for mesh_dim in reversed(range(mesh.ndim)):
        placement = parameter.placements[mesh_dim]
        if placement.is_replicate():
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]  # Shard and _StridedShard have it, nothing else occurs
        if only is not None and dim != only:
            continue
        chunks = full.chunk(mesh.size(mesh_dim), dim)
        position = coordinate[mesh_dim]
        # torch.chunk makes fewer chunks when a dimension is too small; the ranks beyond them store nothing.
        full = chunks[position] if position < len(chunks) else full.narrow(dim, 0, 0)
    return full


@contextmanager
def _seeded_by_name(seed: int, fqn: str, device: torch.device) -> Iterator[None]:
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    own_seed = int.from_bytes(digest[:8], "little") >> 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(own_seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(own_seed)
        yield
