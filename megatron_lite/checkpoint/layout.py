"""The layout a checkpoint was saved at, to tell whether random number streams can be continued."""

from torch import nn

from megatron_lite import parallel_state
from megatron_lite.checkpoint.agreement import world
from megatron_lite.pipeline_parallel_config import PipelineConfig


def current_layout(model: nn.Module) -> dict[str, int | str]:
    """World size, device and the size of each axis of parallelism: equal means every rank plays the same part.

    How data parallel ranks shard their tensors is left out: no random number depends on it.
    """
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    layout: dict[str, int | str] = {"device": device, "world_size": world()[1]}
    if parallel_state.model_parallel_is_initialized():
        dense, expert = parallel_state.get_layout().dense, parallel_state.get_layout().expert
        layout.update({"tp": dense.tp, "cp": dense.cp, "dp": dense.dp, "pp": dense.pp})
        layout.update({"ep": expert.ep, "etp": expert.tp, "order": dense.order})
        if dense.pp > 1 and isinstance(getattr(model, "config", None), PipelineConfig):
            # Which layers, in which order, draw from a rank's streams.
            config = model.config
            layout["stages"] = f"{config.chunks_per_rank} a rank, {config.schedule}"  # type: ignore[union-attr]
    return layout


def describe_changes(saved: dict[str, int | str], current: dict[str, int | str]) -> str:
    """What differs between two layouts, in words ("tp 2 -> 1, world_size 4 -> 2"); empty if nothing."""
    names = sorted(saved.keys() | current.keys())
    return ", ".join(
        f"{name} {saved.get(name, '?')} -> {current.get(name, '?')}"
        for name in names
        if saved.get(name) != current.get(name)
    )
