"""One training step: forward and backward over the micro-batches, then the update.

The contract (docs/architecture.md, "Gradients and loss"): every rank back-propagates weight * (sum over its own
tokens), every reduction across ranks is a SUM, and nothing averages. So the layout cannot change the gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.distributed import finalize_model_grads, set_is_last_microbatch
from megatron_lite.optimizer import MegatronOptimizer
from megatron_lite.process_groups import group_size
from megatron_lite.training.batches import MicroBatch
from megatron_lite.transformer.moe import auxiliary_losses
from megatron_lite.transformer.moe.statistics import update_expert_bias


@dataclass(frozen=True)
class StepOutput:
    """Results of a step, all of them scalars on the device; nothing has been read yet.

    Attributes:
        loss: mean loss per valid token of the global batch.
        grad_norm: global L2 norm of the gradient before clipping.
        found_inf: 1 where the norm was not finite and the update was skipped, else 0.
        num_zeros: zero elements of the gradient, when asked for.
        loss_scale: the scale the loss was multiplied with.
    """

    loss: Tensor
    grad_norm: Tensor
    found_inf: Tensor
    num_zeros: Tensor | None
    loss_scale: Tensor


def micro_batch_losses(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Loss of each of this rank's tokens of a micro-batch, [b, s / cp], zero where the loss mask is."""
    return model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch.get("packed_seq_params"),
    )


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Add up `tensor`, in place, over the ranks of a group; None stands for this process alone."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)


def count_tokens(micro_batches: list[MicroBatch], group: dist.ProcessGroup | None) -> Tensor:
    """Valid tokens of the global batch, at least 1: a float64 scalar on the device, equal on all ranks of `group`."""
    count = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in micro_batches]).sum()
    sum_over(count, group)
    return count.clamp_(min=1.0)


def loss_weights(
    micro_batches: list[MicroBatch],
    total_tokens: Tensor,
    data_parallel_size: int,
    per_token: bool,
    cp_group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """What the summed loss of each micro-batch is multiplied with before its backward pass.

    Per token: 1 / (valid tokens of the global batch), so that every token weighs alike. Otherwise Megatron's older
    rule, the mean over micro-batches and data parallel ranks of each micro-batch's token mean. Context parallel ranks
    hold parts of the same micro-batch, so its tokens are counted over `cp_group`.
    """
    if per_token:
        return [total_tokens.reciprocal()] * len(micro_batches)
    tokens = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in micro_batches])
    sum_over(tokens, cp_group)
    return list((tokens.clamp(min=1.0) * len(micro_batches) * data_parallel_size).reciprocal().unbind())


def train_step(
    model: nn.Module,
    optimizer: MegatronOptimizer,
    micro_batches: list[MicroBatch],
    *,
    tp_group: dist.ProcessGroup | None,
    dp_cp_group: dist.ProcessGroup | None,
    cp_group: dist.ProcessGroup | None = None,
    per_token_loss: bool = True,
    tp_dp_cp_group: dist.ProcessGroup | None = None,
) -> StepOutput:
    """Train on one global batch without waiting for the device.

    Args:
        model: a GPT wrapped by `wrap_data_parallel`.
        optimizer: holds the masters and moments of its parameters.
        micro_batches: this rank's share of the global batch.
        tp_group: ranks that share each layer; sums the gradients that are partial over it.
        dp_cp_group: ranks between which tokens are split; normalizes the loss.
        cp_group: those of them that share micro-batches; None stands for this rank alone.
        per_token_loss: see `loss_weights`.
        tp_dp_cp_group: ranks between which the tokens of a layer of experts are split; its counts are summed over them.
            Default the global group.
    """
    loss, total_tokens = forward_backward(
        model,
        optimizer,
        micro_batches,
        dp_cp_group=dp_cp_group,
        cp_group=cp_group,
        per_token_loss=per_token_loss,
    )
    finalize_model_grads(model, tp_group)
    loss_scale = optimizer.get_loss_scale().clone()
    result = optimizer.step()
    # As in Megatron-LM also after a step that was skipped: the tokens went where they were counted all the same.
    update_expert_bias(model, _all_token_ranks() if tp_dp_cp_group is None else tp_dp_cp_group)
    sum_over(loss, dp_cp_group)
    return StepOutput(loss / total_tokens, result.grad_norm, result.found_inf, result.num_zeros, loss_scale)


def forward_backward(
    model: nn.Module,
    optimizer: MegatronOptimizer,
    micro_batches: list[MicroBatch],
    *,
    dp_cp_group: dist.ProcessGroup | None,
    cp_group: dist.ProcessGroup | None = None,
    per_token_loss: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of the global batch into the model; returns (this rank's summed loss, valid tokens of all ranks).

    Losses that layers of experts attach to their activations count as their mean over the micro-batches of all data
    parallel ranks, beside the loss of the tokens.
    """
    optimizer.zero_grad()
    total_tokens = count_tokens(micro_batches, dp_cp_group)
    data_parallel_size = group_size(dp_cp_group) // group_size(cp_group)
    weights = loss_weights(micro_batches, total_tokens, data_parallel_size, per_token_loss, cp_group)
    loss = torch.zeros_like(total_tokens)
    auxiliary_losses.begin_step(optimizer.get_loss_scale().double() / (len(micro_batches) * data_parallel_size))
    for number, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True), start=1):
        set_is_last_microbatch(model, number == len(micro_batches))
        summed = micro_batch_losses(model, batch).sum()
        loss += summed.detach()
        optimizer.scale_loss(summed * weight.to(summed.dtype)).backward()
    return loss, total_tokens


def _all_token_ranks() -> dist.ProcessGroup | None:
    return parallel_state.get_tensor_and_data_parallel_group(check_initialized=False, with_context_parallel=True)
