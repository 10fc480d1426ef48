"""What routers count while training: recorded on the device in each forward, collected over layers and ranks at once.

Every rank of tensor x context x data parallelism routes tokens of its own, so sums over that group ("tp_dp_cp") are
those of the global batch, at every layout.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite.model_chunks import ModelChunks, as_chunks
from megatron_lite.process_groups import group_size
from megatron_lite.transformer.moe.load_balancing import sum_over

if TYPE_CHECKING:
    from megatron_lite.transformer.moe.router import TopKRouter

# Losses a router may have, and the names Megatron logs them under: divided by their coefficients, so that a balance
# loss is about 1 when experts are chosen alike.
LOSS_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}

# The columns of a router's `sums`, in float64: sums over micro-batches and this rank's tokens. `micro_batches` counts
# each micro-batch 1 / (tp x cp ranks), so that its sum over ranks is the number of micro-batches of all replicas.
SUMS = (*LOSS_NAMES, "entropy", "dropped", "tokens", "micro_batches")


def records(module: nn.Module) -> bool:
    """Whether a forward counts: in training, with a gradient to come, and not a second time inside a backward."""
    return module.training and torch.is_grad_enabled() and not is_recomputation()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, to make activations that were not kept.

    To torch.compile a constant: routers that are computed again are not compiled.
    """
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def record(router: "TopKRouter", counts: Tensor, entropy: Tensor, losses: dict[str, Tensor]) -> None:
    """Add one micro-batch to a router's sums, with no wait for the device.

    Args:
        router: whose buffers to add to.
        counts: [E] int64, choices of this rank's tokens.
        entropy: 0-dim, sum over this rank's tokens of the entropy of their scores over all experts, in nats.
        losses: this rank's shares of the losses, divided by their coefficients, by their keys in LOSS_NAMES.
    """
    router.tokens_per_expert += counts
    if router.step_tokens_per_expert is not None:
        router.step_tokens_per_expert += counts
    tokens = counts.sum().to(torch.float64) / router.topk
    fixed = {"entropy": entropy, "tokens": tokens, "micro_batches": tokens.new_full((), 1 / router.ranks_per_batch)}
    zero = tokens.new_zeros(())
    values = [(losses | fixed).get(name, zero).detach().to(torch.float64) for name in SUMS]
    router.sums += torch.stack(values)


def routers_of(model: ModelChunks) -> "list[TopKRouter]":
    """All routers of a model, or of the chunks on this rank, in order."""
    from megatron_lite.transformer.moe.router import TopKRouter  # the router uses this module

    return [module for chunk in as_chunks(model) for module in chunk.modules() if isinstance(module, TopKRouter)]


@torch.no_grad()
def collect(model: ModelChunks, group: ProcessGroup | None, pp_group: ProcessGroup | None = None) -> dict[str, float]:
    """Statistics of all MoE layers since the last call, equal on all ranks and at every layout; the sums start anew.

    (`global_load_balancing_loss`, as the loss itself, at layouts with equal data parallel x micro-batch size.)

    For each name below the mean over the layers under the name itself, and one value for each layer under
    `moe/<name without moe_>_layer_<i>`, i its layer number counted from 0:
    `load_balancing_loss`, `seq_load_balancing_loss`, `global_load_balancing_loss` and `z_loss` (those that have a
    coefficient; divided by it; mean over micro-batches), `moe_balance` (load of the fullest expert / mean load, 1 is
    perfect), `moe_dropped` (share of token-expert pairs dropped for capacity), `moe_entropy` (of a token's scores over
    all experts, in nats; at most log E).

    Args:
        model: with routers, or without (no communication then, unless there is a pipeline).
        group: all ranks that hold the same layers: tensor x data x context parallel.
        pp_group: the ranks of this pipeline, which hold different layers; None stands for this rank alone.

    Returns:
        an empty dict where there are no routers, or nothing was recorded. One all-reduce, one copy to the host, and
        with a pipeline a gather of numbers.
    """
    layers = _own_layers(routers_of(model), group)
    if group_size(pp_group) > 1:
        gathered: list[dict[int, dict[str, float]]] = [{} for _ in range(group_size(pp_group))]
        dist.all_gather_object(gathered, layers, group=pp_group)
        everywhere = {index: layer for held in gathered for index, layer in held.items()}
        layers = {index: everywhere[index] for index in sorted(everywhere)}
    names = {name: None for layer in layers.values() for name in layer}  # a dict keeps their order
    means = {}
    for name in names:
        values = [layer[name] for layer in layers.values() if name in layer]
        means[name] = math.fsum(values) / len(values)
    each = {
        f"moe/{name.removeprefix('moe_')}_layer_{index}": value
        for index, layer in layers.items()
        for name, value in layer.items()
    }
    return means | each


def _own_layers(routers: "list[TopKRouter]", group: ProcessGroup | None) -> dict[int, dict[str, float]]:
    """The statistics of each of these layers by its index, which are none where nothing was recorded."""
    if not routers:
        return {}
    rows = torch.stack([torch.cat([one.sums, one.tokens_per_expert.to(torch.float64)]) for one in routers])
    for router in routers:
        router.sums.zero_()
        router.tokens_per_expert.zero_()
    summed = sum_over(rows, group).tolist()
    return {
        _index(router, position): _of_layer(router, row)
        for position, (router, row) in enumerate(zip(routers, summed, strict=True))
    }


def _index(router: "TopKRouter", position: int) -> int:
    return position if router.layer_number is None else router.layer_number - 1


def _of_layer(router: "TopKRouter", row: list[float]) -> dict[str, float]:
    sums, loads = dict(zip(SUMS, row, strict=False)), row[len(SUMS) :]
    if sums["tokens"] == 0.0:
        return {}
    losses = {LOSS_NAMES[key]: sums[key] / sums["micro_batches"] for key in router.coefficients}
    return losses | {
        "moe_balance": max(loads) * len(loads) / math.fsum(loads),
        "moe_dropped": sums["dropped"] / (sums["tokens"] * router.topk),
        "moe_entropy": sums["entropy"] / sums["tokens"],
    }


@torch.no_grad()
def update_expert_bias(model: ModelChunks, group: ProcessGroup | None) -> None:
    """After each optimizer step: raise the bias of experts with fewer tokens than the mean, lower the others'.

    bias += rate * sign(mean count - count), counts of the step's training forwards summed over `group` (Wang et al.
    2024, algorithm 1). One all-reduce for all layers, none where no router has a bias.

    Args:
        model: any.
        group: all ranks that hold the same layers: tensor x data x context parallel.
    """
    routers = [router for router in routers_of(model) if router.step_tokens_per_expert is not None]
    if not routers:
        return
    own = [router.step_tokens_per_expert for router in routers if router.step_tokens_per_expert is not None]
    counts = sum_over(torch.stack(own), group)
    # In integers: the sign of the mean minus the count, E times as large.
    directions = (counts.sum(-1, keepdim=True) - counts * counts.size(-1)).sign()
    for router, direction, step_counts in zip(routers, directions, own, strict=True):
        assert router.expert_bias is not None
        router.expert_bias.add_(direction.to(torch.float32), alpha=router.config.moe_router_bias_update_rate)
        step_counts.zero_()
