"""Upcycling: the experts of a new model begin as copies of the MLPs of a trained dense one (Komatsuzaki et al. 2023).

With a granularity N each dense MLP is first divided along its width into N parts, and expert e begins as part e mod N
(He et al. 2024, "Upcycling Large Language Models into Mixture of Experts"). The parts of one MLP begin with the same
router row (the paper's virtual groups), so that a token that goes to one goes to all of them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_lite.checkpoint import find_checkpoint, read_common, read_tracker
from megatron_lite.checkpoint.agreement import agreed, from_rank_zero, largest, union_of_names
from megatron_lite.checkpoint.model_state import compare_names_and_shapes, fill_copies, model_tensors
from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader, tensor_shapes
from megatron_lite.checkpoint.tensor_files import read_tensors
from megatron_lite.model_chunks import ModelChunks

# How a parameter is split is known there; initial values are cut to what a rank stores in the same way.
from megatron_lite.tensor_parallel.parameters import _shard_of, _shard_of_expert, _stored_experts, local
from megatron_lite.training.initialize import print_rank_0
from megatron_lite.transformer.moe.routing import route, route_by_sinkhorn
from megatron_lite.transformer.transformer_config import TransformerConfig

_OF_EXPERTS = re.compile(r"(.*\.layers\.\d+\.(?:transformer_layer\.)?mlp\.)(router|experts|shared_experts)\.")
_DENSE_NAMES = {
    "weight1": "linear_fc1.weight",
    "bias1": "linear_fc1.bias",
    "weight2": "linear_fc2.weight",
    "bias2": "linear_fc2.bias",
}


def dense_checkpoint(root: str, ckpt_step: int | None) -> Path | None:
    """The folder of the checkpoint in `root` if its model has no experts, else None. Collective over the world.

    Raises:
        CheckpointError: there is a checkpoint, but it cannot be read.
    """

    def find() -> str | None:
        iteration = read_tracker(root) if ckpt_step is None else ckpt_step
        if iteration is None:
            return None
        folder = find_checkpoint(root, iteration)
        has_experts = read_common(folder)["config"].get("transformer", {}).get("num_moe_experts") is not None
        return None if has_experts else str(folder)

    found = from_rank_zero(f"Finding a dense checkpoint in {root}", find)
    return None if found is None else Path(found)


@torch.no_grad()
def upcycle(folder: Path, model_chunks: ModelChunks, config: TransformerConfig) -> None:
    """Fill a model with experts from a dense checkpoint of the same architecture, at any layout.

    All but the MLPs of layers with experts is loaded as it is. Routers and shared experts keep their initial values.
    Without shared experts and dropped tokens the new model computes what the dense one did. That is exact, up to
    rounding, where the weights of a token's experts have one sum for all logits: a softmax behind the choice, sigmoid
    and sqrtsoftplus with k > 1, and a softmax over all E experts (before the choice, or sinkhorn's) with k = E > 1.
    Elsewhere the sum depends on the logits; the experts are scaled for logits of zero, so it is exact where all rows of
    the router are zero, and approximate where they are small. Collective over the world.

    Args:
        folder: of one checkpoint.
        model_chunks: initialized, and wrapped for data parallelism.
        config: of the model; moe_upcycling_granularity divides each dense MLP.

    Raises:
        CheckpointError: the checkpoint is damaged, unsafe, or of another architecture.
    """
    reader = agreed(f"Reading {folder}", lambda: SafeFileSystemReader(folder))
    own = model_tensors(model_chunks)
    shapes = {name: shape for name, shape in tensor_shapes(reader.metadata).items() if name.startswith("model.")}
    kept = {f"model.{name}": tensor for name, tensor in own.items() if not _OF_EXPERTS.match(name)}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in own.items():
        prefix, found, parameter = name.partition("experts.")
        if found and parameter in _DENSE_NAMES and _OF_EXPERTS.match(name):
            layers.setdefault(prefix, {})[parameter] = tensor
    dense = {prefix: _dense_tensors(prefix, experts, config) for prefix, experts in layers.items()}
    wanted = kept | {name: tensor for tensors in dense.values() for name, tensor in tensors.items()}
    wanted_anywhere = union_of_names(wanted)
    agreed(f"Reading {folder}", lambda: compare_names_and_shapes(wanted, wanted_anywhere, shapes, folder))
    read_tensors(reader, kept)
    fill_copies(model_chunks)
    # All ranks read together, as often as the pipeline stage with the most layers of experts.
    without = largest(len(layers)) - len(layers)
    for prefix, experts in layers.items():
        # One layer at a time: whole matrices, on every rank.
        whole = {name: torch.empty_like(tensor, device=_device(experts)) for name, tensor in dense[prefix].items()}
        read_tensors(reader, whole)
        _fill_experts(prefix, experts, whole, config)
    for _ in range(without):
        read_tensors(reader, {})
    if config.moe_upcycling_granularity > 1:
        _join_virtual_groups(own, config.moe_upcycling_granularity)
    print_rank_0(
        f" upcycled the dense model of {folder}: the MLPs of {config.num_moe_layers} layers became "
        f"{config.num_moe_experts} experts each (granularity {config.moe_upcycling_granularity})"
    )


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device


def _dense_tensors(prefix: str, experts: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The dense tensors, without storage, that the experts of a layer come from, by name in the checkpoint."""
    width, hidden = config.ffn_hidden_size or 0, config.hidden_size
    rows = 2 * width if config.gated_linear_unit else width
    sizes = {"weight1": (rows, hidden), "bias1": (rows,), "weight2": (hidden, width), "bias2": (hidden,)}
    return {
        f"model.{prefix}{_DENSE_NAMES[name]}": torch.empty(sizes[name], dtype=tensor.dtype, device="meta")
        for name, tensor in experts.items()
    }


def _fill_experts(
    prefix: str, experts: Mapping[str, Tensor], dense: Mapping[str, Tensor], config: TransformerConfig
) -> None:
    """Write to each expert that this rank stores its part of the dense MLP.

    The rows of a gated fc1 are interleaved, so that equal stretches of rows hold matching gates and ups.
    """
    parts, scale = config.moe_upcycling_granularity, _scale(config)
    for name, parameter in experts.items():
        whole = dense[f"model.{prefix}{_DENSE_NAMES[name]}"]
        if name == "bias2":
            slices = [whole * (scale / parts)] * parts  # each part adds it
        elif name == "weight2":
            slices = [part * scale for part in whole.chunk(parts, dim=1)]
        else:
            slices = list(whole.chunk(parts, dim=0))
        for position, expert in enumerate(_stored_experts(parameter)):
            local(parameter)[position] = _shard_of_expert(slices[expert % parts], parameter)


def _scale(config: TransformerConfig) -> float:
    """Factor on the second layer that undoes the weights, as they are with a router that knows nothing yet.

    At logits of zero the k weights are alike, and the parts of an MLP are k / N of the chosen experts each: together
    they get 1/N of the sum. Groups of experts and the expert bias change the choice alone.
    """
    logits = torch.zeros(1, config.num_moe_experts or 1, dtype=torch.float64, device="cpu")
    if "sinkhorn" in config.balance_types:
        weights, _ = route_by_sinkhorn(logits, config.moe_router_topk, balance=False)
    else:
        weights, _ = route(
            logits,
            config.moe_router_topk,
            score_function=config.moe_router_score_function,
            pre_softmax=config.moe_router_pre_softmax,
            scaling_factor=config.moe_router_topk_scaling_factor,
        )
    return config.moe_upcycling_granularity / weights.sum().item()


def _join_virtual_groups(own: Mapping[str, Tensor], parts: int) -> None:
    """Give the `parts` experts that make up one dense MLP the same row of the router's last matrix."""
    for name, tensor in own.items():
        if re.search(r"\.mlp\.router\.(down\.)?weight$", name):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
            rows = whole[: whole.size(0) // parts].repeat_interleave(parts, dim=0)
            local(tensor).copy_(_shard_of(rows, tensor))
