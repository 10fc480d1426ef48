"""Data parallelism on FSDP2: every rank sees other samples, gradients are summed, and state may be split.

Nothing is averaged: the loss carries its own weight, so each reduction is a plain SUM.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from megatron_lite.data_parallel_config import DistributedDataParallelConfig
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.tensor_parallel.parameters import local

_LAYER = re.compile(r"(.*\.)?layers\.\d+")


def wrap_data_parallel(
    model: nn.Module,
    config: ModelParallelConfig,
    ddp: DistributedDataParallelConfig,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Shard `model` over its data parallel ranks, in place.

    Each transformer layer is one unit of communication. What is left (embedding, final norm, output layer; tied
    weights are one parameter) belongs to the root, which stays gathered from its forward to the end of its backward.
    The routed experts of a layer are a unit of their own, inside the layer's: their copies are on other ranks.
    Parameters are stored in `config.main_params_dtype` and computed with in `config.params_dtype`.

    With one data parallel rank there is nothing to gather or reduce, and the parameters are left as they are: FSDP2
    would copy each parameter and gradient twice (5% of a small bf16 step on a CPU), and the layers cast weights
    themselves. Dense parameters and experts are judged apart: either may have one rank and the other many.

    Args:
        model: a module whose layers are children of a container named `layers`.
        config: the dtypes.
        ddp: the sharding strategy and the dtype of the gradient reduction.
        mesh: a mesh with the dimensions "dp_replicate" and "dp_shard"; the latter has one rank under no_shard.
        expert_mesh: a mesh with the dimensions "edp_replicate" and "edp_shard"; needed if the model has experts.

    Collectives: forward all-gathers parameters over "dp_shard"; backward reduce-scatters gradients over "dp_shard" and
    all-reduces them over "dp_replicate", all as SUM. Those of experts over "edp_shard" and "edp_replicate".
    """
    ddp.validate()
    assert ddp.data_parallel_sharding_strategy != "no_shard" or mesh["dp_shard"].size() == 1, (
        "the strategy no_shard needs a mesh with one rank along dp_shard"
    )
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=config.params_dtype,
            reduce_dtype=torch.bfloat16 if ddp.grad_reduce_in_bf16 else config.main_params_dtype,
            cast_forward_inputs=False,
        )
    }
    split_parameters = ddp.data_parallel_sharding_strategy == "optim_grads_params"
    # Stages of a pipeline meet their parameters once for each micro-batch: gathered anew each time they would wait.
    split_parameters = split_parameters and config.pipeline_model_parallel_size == 1
    experts = [module for module in model.modules() if _holds_experts(module)]
    assert expert_mesh is not None or not experts, "a model with experts needs the mesh of the experts"
    if experts and expert_mesh is not None:
        _wrap_experts(experts, expert_mesh, reshard_after_forward=split_parameters, **options)
    data_parallel = _data_parallel_mesh(mesh, "dp")
    if data_parallel is not None:
        # Experts that were not wrapped have no copies on the ranks that the dense parameters are summed over.
        ignored = {parameter for module in experts for parameter in module.parameters(recurse=False)}
        options |= {"mesh": data_parallel, "ignored_params": ignored}
        for layer in [module for name, module in model.named_modules() if _LAYER.fullmatch(name)]:
            fully_shard(layer, reshard_after_forward=split_parameters, **options)
            _prefetch_experts(layer)
        fully_shard(model, reshard_after_forward=False, **options)
    for unit in _units(model):
        # Before the factor: gloo has no reduction that multiplies.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    model.data_parallel_sharding_strategy = ddp.data_parallel_sharding_strategy  # type: ignore[assignment]
    return model


def _holds_experts(module: nn.Module) -> bool:
    """Whether parameters of routed experts belong to this very module, as their declarations say."""
    return any(spec.is_expert for spec in getattr(module, "parameter_specs", {}).values())


def _data_parallel_mesh(mesh: DeviceMesh, kind: str) -> DeviceMesh | None:
    """The dimensions of `kind` ("dp" or "edp") to wrap over; None for a single rank."""
    replicas, shards = mesh[f"{kind}_replicate"].size(), mesh[f"{kind}_shard"].size()
    if replicas * shards == 1:
        return None
    return mesh[f"{kind}_shard"] if replicas == 1 else mesh[f"{kind}_replicate", f"{kind}_shard"]


def _wrap_experts(experts: list[nn.Module], expert_mesh: DeviceMesh, **options: Any) -> None:
    data_parallel = _data_parallel_mesh(expert_mesh, "edp")
    if data_parallel is None:
        return
    shards = expert_mesh["edp_shard"].size()
    for module in experts:
        fully_shard(module, mesh=data_parallel, shard_placement_fn=lambda p: _even_split(p, shards), **options)
        if hasattr(module, "forward_dispatched"):
            register_fsdp_forward_method(module, "forward_dispatched")


def _prefetch_experts(layer: nn.Module) -> None:
    """Gather a layer's experts with the layer: later the host waits for counts before it gets to them."""
    experts: list[FSDPModule] = []
    for module in layer.modules():
        if _holds_experts(module) and isinstance(module, FSDPModule):
            experts.append(module)
    if isinstance(layer, FSDPModule) and experts:
        layer.set_modules_to_forward_prefetch(experts)


def _even_split(parameter: Tensor, shards: int) -> Shard:
    """The first dimension that splits evenly: a rank may have fewer experts than there are shards."""
    sizes = local(parameter).shape
    return Shard(next((dim for dim, size in enumerate(sizes) if size % shards == 0), 0))


def set_is_last_microbatch(model: nn.Module, is_last_microbatch: bool) -> None:
    """Announce whether the next forward and backward is the last of this step; a module not wrapped is left alone.

    Before the last one, gradients accumulate in the reduction's dtype: whole and on this rank (no_shard, optim), or
    split after a reduce-scatter, with the replicas summed at the end (optim_grads, optim_grads_params). Gathered
    parameters are kept for the next micro-batch unless the strategy splits them.
    """
    strategy = getattr(model, "data_parallel_sharding_strategy", None)
    for unit in _units(model):
        # Each unit on its own: experts may be wrapped where the root is not.
        synchronize = is_last_microbatch or strategy in ("optim_grads", "optim_grads_params")
        unit.set_requires_gradient_sync(synchronize, recurse=False)
        unit.set_requires_all_reduce(is_last_microbatch, recurse=False)
        unit.set_reshard_after_backward(is_last_microbatch or strategy == "optim_grads_params", recurse=False)


def begin_pipelined_step(model: nn.Module) -> None:
    """Before a stage of a pipeline works on the micro-batches of a step: all of it stays on this rank.

    Parameters stay gathered and gradients accumulate whole, whatever the strategy, until `reduce_gradients`: forward
    and backward passes of several micro-batches mix, and some schedules compute gradients of weights after the
    backward pass that FSDP2 watches.
    """
    for unit in _units(model):
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_is_last_backward(False)


def accumulate_gradients(model: nn.Module) -> None:
    """Add up the gradients of gathered parameters in the reduction's dtype, as FSDP2 does at the end of a backward."""
    for _, groups in _states(model):
        for group in groups:
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def reduce_gradients(model: nn.Module) -> None:
    """The one reduction of a step's gradients over data parallel ranks; parameters are shards again behind it.

    Collectives: for each unit, last to first, what its backward would do without pipelining (`wrap_data_parallel`).
    """
    for unit in _units(model):
        unit.set_requires_gradient_sync(True, recurse=False)
        unit.set_requires_all_reduce(True, recurse=False)
        unit.set_reshard_after_backward(True, recurse=False)
        unit.set_is_last_backward(True)
    states = _states(model)
    for _, groups in reversed(states):
        for group in groups:
            group.post_backward()
    for state, _ in states:
        if state._is_root:
            state._root_post_backward_final_callback()


def _states(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """FSDP2's state of each unit, with its groups of parameters. torch has no public way to reduce after backward."""
    states: list[Any] = [unit._get_fsdp_state() for unit in _units(model)]
    return [(state, list(state._fsdp_param_groups)) for state in states]


def reshard_parameters(model: nn.Module) -> None:
    """Free gathered parameters, so that `model.named_parameters()` are the stored shards.

    Needed after a forward without a backward (evaluation), which leaves parameters gathered: they would go stale if
    the shards changed before the next training step, as by loading a checkpoint.
    """
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
