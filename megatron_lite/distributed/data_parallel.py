"""Data parallelism on FSDP2: every rank sees other samples, gradients are summed, and state may be split.

Nothing is averaged: the loss carries its own weight, so each reduction is a plain SUM.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_lite.distributed.config import DistributedDataParallelConfig
from megatron_lite.model_parallel_config import ModelParallelConfig

_LAYER = re.compile(r"(.*\.)?layers\.\d+")


def wrap_data_parallel(
    model: nn.Module, config: ModelParallelConfig, ddp: DistributedDataParallelConfig, mesh: DeviceMesh
) -> nn.Module:
    """Shard `model` over its data parallel ranks, in place.

    Each transformer layer is one unit of communication. What is left (embedding, final norm, output layer; tied
    weights are one parameter) belongs to the root, which stays gathered from its forward to the end of its backward.
    Parameters are stored in `config.main_params_dtype` and computed with in `config.params_dtype`.

    With one data parallel rank there is nothing to gather or reduce, and the model is returned as it is: FSDP2 would
    copy each parameter and gradient twice (5% of a small bf16 step on a CPU), and the layers cast weights themselves.

    Args:
        model: a module whose layers are children of a container named `layers`.
        config: the dtypes.
        ddp: the sharding strategy and the dtype of the gradient reduction.
        mesh: a mesh with the dimensions "dp_replicate" and "dp_shard"; the latter has one rank under no_shard.

    Collectives: forward all-gathers parameters over "dp_shard"; backward reduce-scatters gradients over "dp_shard" and
    all-reduces them over "dp_replicate", all as SUM.
    """
    ddp.validate()
    replicas, shards = mesh["dp_replicate"].size(), mesh["dp_shard"].size()
    assert ddp.data_parallel_sharding_strategy != "no_shard" or shards == 1, (
        "the strategy no_shard needs a mesh with one rank along dp_shard"
    )
    if replicas * shards == 1:
        return model
    data_parallel = mesh["dp_shard"] if replicas == 1 else mesh["dp_replicate", "dp_shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=config.params_dtype,
        reduce_dtype=torch.bfloat16 if ddp.grad_reduce_in_bf16 else config.main_params_dtype,
        cast_forward_inputs=False,
    )
    split_parameters = ddp.data_parallel_sharding_strategy == "optim_grads_params"
    layers = [module for name, module in model.named_modules() if _LAYER.fullmatch(name)]
    for layer in layers:
        fully_shard(layer, mesh=data_parallel, mp_policy=policy, reshard_after_forward=split_parameters)
    fully_shard(model, mesh=data_parallel, mp_policy=policy, reshard_after_forward=False)
    for unit in _units(model):
        # Before the factor: gloo has no reduction that multiplies.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    model.data_parallel_sharding_strategy = ddp.data_parallel_sharding_strategy  # type: ignore[assignment]
    return model


def set_is_last_microbatch(model: nn.Module, is_last_microbatch: bool) -> None:
    """Announce whether the next forward and backward is the last of this step; a module not wrapped is left alone.

    Before the last one, gradients accumulate in the reduction's dtype: whole and on this rank (no_shard, optim), or
    split after a reduce-scatter, with the replicas summed at the end (optim_grads, optim_grads_params). Gathered
    parameters are kept for the next micro-batch unless the strategy splits them.
    """
    if not isinstance(model, FSDPModule):
        return
    strategy = model.data_parallel_sharding_strategy
    model.set_requires_gradient_sync(is_last_microbatch or strategy in ("optim_grads", "optim_grads_params"))
    model.set_requires_all_reduce(is_last_microbatch)
    model.set_reshard_after_backward(is_last_microbatch or strategy == "optim_grads_params")


def reshard_parameters(model: nn.Module) -> None:
    """Free gathered parameters, so that `model.named_parameters()` are the stored shards.

    Needed after a forward without a backward (evaluation), which leaves parameters gathered: they would go stale if
    the shards changed before the next training step, as by loading a checkpoint.
    """
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
