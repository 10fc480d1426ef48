"""The parallel groups of this process: made once by `initialize_model_parallel`, asked for by Megatron's getters.

One object owns every group and mesh, so that `destroy_model_parallel` can let go of all of them. Modules take the
group of their role as an argument; the getters are the default for people who use a layer alone.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from megatron_lite import rendezvous
from megatron_lite.parallel_groups import EmbeddingRanks, ParallelGroups, make_parallel_groups
from megatron_lite.process_groups import GLOO_ON_GPU, group_rank, group_size
from megatron_lite.process_groups import ProcessGroupCollection as ProcessGroupCollection
from megatron_lite.rank_generator import ParallelLayout
from megatron_lite.rank_generator import RankGenerator as RankGenerator

_state: ParallelGroups | None = None
_owns_torch_distributed = False
# Values set by the set_* functions, which win over the groups until they are set back to None.
_overrides: dict[str, int | None] = {}
_virtual_pipeline_rank: int | None = None
_virtual_pipeline_size: int | None = None


def default_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The ranks of a pipeline that hold word embeddings: its first and last stage."""
    return sorted({pp_ranks[0], pp_ranks[-1]})


def default_position_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The ranks of a pipeline that hold position embeddings: its first stage."""
    return [pp_ranks[0]]


def local_cuda_device() -> torch.device:
    """The GPU of this process: that of LOCAL_RANK, counted around where a process sees fewer (one each, say).

    Where ranks are started by srun and LOCAL_RANK is not set, that of SLURM_LOCALID.
    """
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return torch.device("cuda", int(local_rank) % torch.cuda.device_count())


def initialize_torch_distributed(timeout_minutes: float = 30, backend: str | None = None) -> None:
    """Initialize torch.distributed from torchrun's environment, or as a world of one process without it.

    Without a `backend` NCCL where there is a GPU (see `local_cuda_device`), gloo elsewhere. Does nothing if somebody
    already has.
    """
    global _owns_torch_distributed
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    use_cuda = torch.cuda.is_available() and backend != "gloo"
    if use_cuda:
        torch.cuda.set_device(local_cuda_device())
    backend = GLOO_ON_GPU if backend == "cuda:gloo" else backend or ("nccl" if use_cuda else "gloo")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = rendezvous.join(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    _owns_torch_distributed = True


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    pipeline_model_parallel_comm_backend: str | None = None,
    *,
    context_parallel_size: int = 1,
    hierarchical_context_parallel_sizes: list[int] | None = None,
    expert_model_parallel_size: int = 1,
    num_distributed_optimizer_instances: int = 1,
    expert_tensor_parallel_size: int | None = None,
    distributed_timeout_minutes: float = 30,
    order: str = "tp-cp-ep-dp-pp",
    get_embedding_ranks: EmbeddingRanks = default_embedding_ranks,
    get_position_embedding_ranks: EmbeddingRanks = default_position_embedding_ranks,
    create_gloo_process_groups: bool = True,
) -> None:
    """Make the groups of every kind of parallelism; all processes call it with the same arguments.

    The data parallel size is what the world leaves: world / (tp * cp * pp); experts see the same ranks as
    etp x ep x edp x pp. Initializes torch.distributed if nobody has.

    Args:
        tensor_model_parallel_size: ranks over which each weight matrix is split.
        pipeline_model_parallel_size: stages.
        virtual_pipeline_model_parallel_size: model chunks per stage rank (needs more than one stage).
        pipeline_model_parallel_comm_backend: backend of the pipeline groups; None takes the default one.
        context_parallel_size: ranks over which each sequence is split.
        hierarchical_context_parallel_sizes: sizes, innermost first, whose product is the context parallel size.
        expert_model_parallel_size: ranks over which the experts are distributed.
        num_distributed_optimizer_instances: replicas of the sharded data parallel group.
        expert_tensor_parallel_size: ranks over which each expert is split; default the tensor parallel size.
        distributed_timeout_minutes: limit of every collective.
        order: axes from the fastest varying rank to the slowest.
        get_embedding_ranks: from a pipeline's ranks to those in the embedding group.
        get_position_embedding_ranks: the same for position embeddings.
        create_gloo_process_groups: with NCCL, also make gloo groups of the data parallel kinds.

    Raises:
        ParallelLayoutError: (a ConfigError and a RuntimeError) sizes that do not fit the world.
        AssertionError: called twice without `destroy_model_parallel`.
    """
    global _state, _virtual_pipeline_rank, _virtual_pipeline_size
    assert _state is None, "data parallel group is already initialized"
    initialize_torch_distributed(distributed_timeout_minutes)
    layout = ParallelLayout.from_sizes(
        dist.get_world_size(),
        tp=tensor_model_parallel_size,
        pp=pipeline_model_parallel_size,
        cp=context_parallel_size,
        ep=expert_model_parallel_size,
        etp=expert_tensor_parallel_size,
        num_distributed_optimizer_instances=num_distributed_optimizer_instances,
        order=order,
        virtual_pp=virtual_pipeline_model_parallel_size,
    )
    _state = make_parallel_groups(
        layout,
        timedelta(minutes=distributed_timeout_minutes),
        pipeline_backend=pipeline_model_parallel_comm_backend,
        hierarchical_sizes=hierarchical_context_parallel_sizes,
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
        gloo=create_gloo_process_groups,
    )
    _virtual_pipeline_size = virtual_pipeline_model_parallel_size
    _virtual_pipeline_rank = None if virtual_pipeline_model_parallel_size is None else 0


def destroy_model_parallel() -> None:
    """Forget all groups and meshes and destroy the groups made here; `initialize_model_parallel` may run again."""
    global _state, _virtual_pipeline_rank, _virtual_pipeline_size
    state, _state = _state, None
    _virtual_pipeline_rank = _virtual_pipeline_size = None
    _overrides.clear()
    if state is not None:
        state.destroy()
        _forget_meshes()


def _forget_meshes() -> None:
    """Clear what torch remembers of operations on DTensors: it holds meshes, whose groups are gone.

    Otherwise an equal mesh made later, of groups with other names, would be taken for the old one, and the threads of
    gloo's groups, each of which wakes up a hundred times a second, would live on.
    """
    # With a mesh there are DTensors: these are imported already. Not every version of torch has each of the names.
    from torch.distributed.tensor import _collective_utils, _redistribute, debug

    for owner, name in (
        (debug, "_clear_sharding_prop_cache"),
        (_redistribute, "clear_redistribute_planner_cache"),
        (_redistribute, "_gen_transform_infos"),
        (getattr(_collective_utils, "MeshTopoInfo", None), "build_from_mesh"),
    ):
        found = getattr(owner, name, None)
        clear = getattr(found, "cache_clear", found)
        if clear is not None:
            clear()


def shutdown() -> None:
    """`destroy_model_parallel`, then destroy torch.distributed too if this module initialized it."""
    global _owns_torch_distributed
    destroy_model_parallel()
    if _owns_torch_distributed and dist.is_initialized():
        dist.destroy_process_group()
    _owns_torch_distributed = False


def is_initialized() -> bool:
    """Whether the groups exist."""
    return _state is not None


def model_parallel_is_initialized() -> bool:
    """Whether the tensor, pipeline and data parallel groups exist (they are made together)."""
    return _state is not None


def _existing(what: str) -> ParallelGroups:
    assert _state is not None, f"{what} is not initialized"
    return _state


def get_group(name: str) -> ProcessGroup | list[ProcessGroup] | None:
    """The group of this rank by its name in ProcessGroupCollection; None if this rank is in none of that kind."""
    state = _existing(f"{name} group")
    return state.hierarchical or None if name == "hcp" else state.groups.get(name)


def _group(name: str, what: str, check_initialized: bool = True) -> ProcessGroup | None:
    if not check_initialized and _state is None:
        return None
    group = _existing(what).groups.get(name)
    assert group is not None or not check_initialized, f"{what} is not initialized"
    return group


def get_layout() -> ParallelLayout:
    """The rank arithmetic of the running layout."""
    return _existing("model parallel").layout


def get_dense_mesh() -> DeviceMesh:
    """Mesh of the dense layers: ("pp", "dp_replicate", "dp_shard", "tp"); dp_replicate * dp_shard = dp * cp."""
    return _existing("dense device mesh").dense_mesh


def get_expert_mesh() -> DeviceMesh:
    """Mesh of the experts: ("pp", "edp_replicate", "edp_shard", "ep", "etp")."""
    return _existing("expert device mesh").expert_mesh


def get_mesh_of_group(group: ProcessGroup | None) -> DeviceMesh | None:
    """The 1-D slice of a root mesh whose group this is (tp, etp or ep), else None.

    These three are never one object, though other kinds that hold the same ranks may share one with them.
    """
    if _state is None or group is None:
        return None
    if group is _state.groups["tp"]:
        return get_dense_mesh()["tp"]
    if group is _state.groups["expt_tp"]:
        return get_expert_mesh()["etp"]
    if group is _state.groups["ep"]:
        return get_expert_mesh()["ep"]
    return None


# Groups. Each asserts that it exists; with check_initialized=False it returns None instead.


def get_tensor_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The ranks that split this rank's weight matrices."""
    return _group("tp", "tensor model parallel group", check_initialized)


def get_pipeline_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The stages of this rank's pipeline."""
    return _group("pp", "pipeline_model parallel group", check_initialized)


def get_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """All ranks that hold one copy of the model: tensor x pipeline."""
    return _group("mp", "model parallel group", check_initialized)


def get_context_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The ranks that share this rank's sequences."""
    return _group("cp", "context parallel group", check_initialized)


def get_context_parallel_global_ranks() -> list[int]:
    """Global ranks of the context parallel group, in group order."""
    return _existing("context parallel group").ranks["cp"]


def get_hierarchical_context_parallel_groups(check_initialized: bool = True) -> list[ProcessGroup]:
    """The levels of the context parallel group, innermost first."""
    if _state is None and not check_initialized:
        return []
    groups = _existing("hierarchical context parallel groups").hierarchical
    assert groups or not check_initialized, "hierarchical context parallel groups are not initialized"
    return groups


def _data_kind(with_context_parallel: bool, partial_data_parallel: bool) -> str:
    if partial_data_parallel:
        assert with_context_parallel, "Partial data parallel groups include context parallelism"
        return "intra_dp_cp"
    return "dp_cp" if with_context_parallel else "dp"


def get_data_parallel_group(
    with_context_parallel: bool = False, partial_data_parallel: bool = False, check_initialized: bool = True
) -> ProcessGroup | None:
    """The ranks with the same shard of the model and other data; `partial_*`: of one optimizer instance."""
    return _group(_data_kind(with_context_parallel, partial_data_parallel), "data parallel group", check_initialized)


def get_data_parallel_group_gloo(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> ProcessGroup | None:
    """The data parallel group on gloo, for host tensors."""
    return _group(f"{_data_kind(with_context_parallel, partial_data_parallel)}_gloo", "data parallel group-gloo")


def get_embedding_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The stages that hold the (tied) word embeddings."""
    return _group("embd", "embedding group", check_initialized)


def get_position_embedding_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The stages that hold the position embeddings."""
    return _group("pos_embd", "position embedding group", check_initialized)


def get_tensor_and_data_parallel_group(
    check_initialized: bool = True, with_context_parallel: bool = False
) -> ProcessGroup | None:
    """Tensor x data (x context) ranks of this stage."""
    kind = "tp_dp_cp" if with_context_parallel else "tp_dp"
    return _group(kind, "tensor and data parallel group", check_initialized)


def get_tensor_and_context_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Tensor x context ranks: all that hold parts of the same sequences."""
    return _group("tp_cp", "tensor and context parallel group", check_initialized)


def get_expert_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The ranks over which the experts are distributed."""
    return _group("ep", "expert model parallel group", check_initialized)


def get_expert_tensor_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The ranks that split each expert's matrices."""
    return _group("expt_tp", "Expert tensor parallel group", check_initialized)


def get_expert_tensor_and_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Expert tensor x expert ranks."""
    return _group("tp_ep", "Expert tensor and model parallel group", check_initialized)


def get_expert_tensor_model_pipeline_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Expert tensor x expert x pipeline ranks."""
    return _group("tp_ep_pp", "Expert tensor-model-pipeline parallel group", check_initialized)


def get_expert_data_parallel_group(
    check_initialized: bool = True, partial_expert_data_parallel: bool = False
) -> ProcessGroup | None:
    """The ranks with the same shard of the same experts; `partial_*`: of one optimizer instance."""
    kind = "intra_expt_dp" if partial_expert_data_parallel else "expt_dp"
    return _group(kind, "Expert data parallel group", check_initialized)


def get_expert_data_parallel_group_gloo(partial_expert_data_parallel: bool = False) -> ProcessGroup | None:
    """The expert data parallel group on gloo, for host tensors."""
    kind = "intra_expt_dp" if partial_expert_data_parallel else "expt_dp"
    return _group(f"{kind}_gloo", "Expert data parallel group-gloo")


def get_intra_distributed_optimizer_instance_group(check_initialized: bool = True) -> ProcessGroup | None:
    """All ranks of one distributed optimizer instance."""
    return _group("intra_dist_opt", "intra distributed optimizer instance group", check_initialized)


def get_inter_distributed_optimizer_instance_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The same (expert) shard in every distributed optimizer instance."""
    return _group("inter_dist_opt", "inter distributed optimizer instance group", check_initialized)


# Sizes and ranks. A value set by set_* wins over the group.


def _override(name: str, value: int | None) -> None:
    if value is None:
        _overrides.pop(name, None)
    else:
        _overrides[name] = value


def _size(name: str, group: Callable[[], ProcessGroup | None]) -> int:
    value = _overrides.get(f"{name}_size")
    return group_size(group()) if value is None else value


def _rank(name: str, group: Callable[[], ProcessGroup | None]) -> int:
    value = _overrides.get(f"{name}_rank")
    return group_rank(group()) if value is None else value


def get_tensor_model_parallel_world_size() -> int:
    """Tensor parallel size."""
    return _size("tp", get_tensor_model_parallel_group)


def get_tensor_model_parallel_rank() -> int:
    """This rank's place in the tensor parallel group."""
    return _rank("tp", get_tensor_model_parallel_group)


def set_tensor_model_parallel_world_size(world_size: int | None) -> None:
    """Override the tensor parallel size; None restores it."""
    _override("tp_size", world_size)


def set_tensor_model_parallel_rank(rank: int | None) -> None:
    """Override the tensor parallel rank; None restores it."""
    _override("tp_rank", rank)


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor parallel group."""
    return _existing("tensor model parallel group").ranks["tp"][0]


def get_model_parallel_src_rank() -> int:
    """Global rank of the first member of the model parallel group."""
    return _existing("model parallel group").ranks["mp"][0]


def get_pipeline_model_parallel_world_size() -> int:
    """Number of pipeline stages."""
    return _size("pp", get_pipeline_model_parallel_group)


def get_pipeline_model_parallel_rank() -> int:
    """This rank's stage."""
    return _rank("pp", get_pipeline_model_parallel_group)


def set_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Override the number of stages; None restores it."""
    _override("pp_size", world_size)


def set_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Override the stage; None restores it."""
    _override("pp_rank", rank)


def get_pipeline_model_parallel_first_rank() -> int:
    """Global rank of the first stage."""
    return _existing("pipeline_model parallel group").ranks["pp"][0]


def get_pipeline_model_parallel_last_rank() -> int:
    """Global rank of the last stage."""
    return _existing("pipeline_model parallel group").ranks["pp"][-1]


def get_pipeline_model_parallel_next_rank() -> int:
    """Global rank of the stage after this one, the first after the last."""
    ranks = _existing("pipeline_model parallel group").ranks["pp"]
    return ranks[(get_pipeline_model_parallel_rank() + 1) % len(ranks)]


def get_pipeline_model_parallel_prev_rank() -> int:
    """Global rank of the stage before this one, the last before the first."""
    ranks = _existing("pipeline_model parallel group").ranks["pp"]
    return ranks[(get_pipeline_model_parallel_rank() - 1) % len(ranks)]


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """The model chunk being built or run, or None without virtual stages."""
    return _virtual_pipeline_rank


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Say which model chunk is being built or run."""
    global _virtual_pipeline_rank
    _virtual_pipeline_rank = rank


def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Model chunks per pipeline rank, or None without virtual stages."""
    return _virtual_pipeline_size


def set_virtual_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Set the number of model chunks per pipeline rank."""
    global _virtual_pipeline_size
    _virtual_pipeline_size = world_size


def _is_virtual_stage(stage: int, ignore_virtual: bool, vp_stage: int | None) -> bool:
    if ignore_virtual or _virtual_pipeline_size is None or _virtual_pipeline_size == 1:
        return True
    assert vp_stage is not None, "vp_stage is needed to tell a virtual pipeline stage (ignore_virtual=False)"
    return vp_stage == stage % _virtual_pipeline_size


def is_pipeline_first_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank (and with ignore_virtual=False, its chunk `vp_stage`) holds the embedding."""
    return _is_virtual_stage(0, ignore_virtual, vp_stage) and get_pipeline_model_parallel_rank() == 0


def is_pipeline_last_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank (and with ignore_virtual=False, its chunk `vp_stage`) holds the output layer."""
    last = get_pipeline_model_parallel_world_size() - 1
    return _is_virtual_stage(-1, ignore_virtual, vp_stage) and get_pipeline_model_parallel_rank() == last


def is_rank_in_embedding_group(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank (and with ignore_virtual=False, its chunk `vp_stage`) holds word embeddings."""
    ranks = _existing("embedding group").ranks.get("embd", [])
    if dist.get_rank() not in ranks:
        return False
    if ignore_virtual:
        return True
    stage = get_pipeline_model_parallel_rank()
    if stage == 0:
        return is_pipeline_first_stage(ignore_virtual, vp_stage)
    if stage == get_pipeline_model_parallel_world_size() - 1:
        return is_pipeline_last_stage(ignore_virtual, vp_stage)
    return True


def is_rank_in_position_embedding_group() -> bool:
    """Whether this rank holds position embeddings."""
    return dist.get_rank() in _existing("position embedding group").ranks.get("pos_embd", [])


def get_data_parallel_world_size(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Data parallel size."""
    return _size("dp", lambda: get_data_parallel_group(with_context_parallel, partial_data_parallel))


def get_data_parallel_rank(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """This rank's place in the data parallel group."""
    return _rank("dp", lambda: get_data_parallel_group(with_context_parallel, partial_data_parallel))


def set_data_parallel_rank(rank: int | None) -> None:
    """Override the data parallel rank; None restores it."""
    _override("dp_rank", rank)


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first member of the data parallel group."""
    return _existing("data parallel group").ranks["dp_cp" if with_context_parallel else "dp"][0]


def get_context_parallel_world_size() -> int:
    """Context parallel size."""
    return _size("cp", get_context_parallel_group)


def get_context_parallel_rank() -> int:
    """This rank's place in the context parallel group."""
    return _rank("cp", get_context_parallel_group)


def get_tensor_and_context_parallel_world_size() -> int:
    """Tensor x context parallel size."""
    return _size("tp_cp", get_tensor_and_context_parallel_group)


def get_tensor_and_context_parallel_rank() -> int:
    """This rank's place in the tensor x context group."""
    return _rank("tp_cp", get_tensor_and_context_parallel_group)


def get_expert_model_parallel_world_size() -> int:
    """Expert parallel size."""
    return _size("ep", get_expert_model_parallel_group)


def get_expert_model_parallel_rank() -> int:
    """This rank's place in the expert parallel group."""
    return _rank("ep", get_expert_model_parallel_group)


def set_expert_model_parallel_world_size(world_size: int | None) -> None:
    """Override the expert parallel size; None restores it."""
    _override("ep_size", world_size)


def set_expert_model_parallel_rank(rank: int | None) -> None:
    """Override the expert parallel rank; None restores it."""
    _override("ep_rank", rank)


def get_expert_model_parallel_src_rank() -> int:
    """Global rank of the first member of the expert parallel group."""
    return _existing("expert model parallel group").ranks["ep"][0]


def get_expert_tensor_parallel_world_size() -> int:
    """Expert tensor parallel size."""
    return _size("expt_tp", get_expert_tensor_parallel_group)


def get_expert_tensor_parallel_rank() -> int:
    """This rank's place in the expert tensor parallel group."""
    return _rank("expt_tp", get_expert_tensor_parallel_group)


def set_expert_tensor_parallel_world_size(world_size: int | None) -> None:
    """Override the expert tensor parallel size; None restores it."""
    _override("expt_tp_size", world_size)


def set_expert_tensor_parallel_rank(rank: int | None) -> None:
    """Override the expert tensor parallel rank; None restores it."""
    _override("expt_tp_rank", rank)


def get_expert_tensor_and_model_parallel_world_size() -> int:
    """Expert tensor x expert size."""
    return _size("tp_ep", get_expert_tensor_and_model_parallel_group)


def get_expert_tensor_and_model_parallel_rank() -> int:
    """This rank's place in the expert tensor x expert group."""
    return _rank("tp_ep", get_expert_tensor_and_model_parallel_group)


def get_expert_data_parallel_world_size(partial_expert_data_parallel: bool = False) -> int:
    """Expert data parallel size."""
    return _size("expt_dp", lambda: get_expert_data_parallel_group(True, partial_expert_data_parallel))


def get_expert_data_parallel_rank(partial_expert_data_parallel: bool = False) -> int:
    """This rank's place in the expert data parallel group."""
    return _rank("expt_dp", lambda: get_expert_data_parallel_group(True, partial_expert_data_parallel))


def get_all_ranks() -> str:
    """This rank's coordinates as "tp_dp_cp_pp_ep"."""
    coordinates = (
        get_tensor_model_parallel_rank(),
        get_data_parallel_rank(),
        get_context_parallel_rank(),
        get_pipeline_model_parallel_rank(),
        get_expert_model_parallel_rank(),
    )
    return "_".join(str(coordinate) for coordinate in coordinates)
