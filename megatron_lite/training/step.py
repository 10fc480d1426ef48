"""One training step: forward and backward over the micro-batches, then the update.

The contract (docs/architecture.md, "Gradients and loss"): every rank back-propagates weight * (sum over its own
tokens), every reduction across ranks is a SUM, and nothing averages. So the layout cannot change the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.distributed import finalize_model_grads
from megatron_lite.model_chunks import ModelChunks, as_chunks
from megatron_lite.models.gpt.future_tokens import FutureTokens
from megatron_lite.optimizer import MegatronOptimizer
from megatron_lite.pipeline_parallel.schedules import ForwardBackward, forward_backward_no_pipelining
from megatron_lite.process_groups import group_size
from megatron_lite.training.batches import FUTURE, MicroBatch
from megatron_lite.transformer.moe import auxiliary_losses
from megatron_lite.transformer.moe.statistics import update_expert_bias


@dataclass(frozen=True)
class StepOutput:
    """Results of a step, all of them scalars on the device; nothing has been read yet.

    Attributes:
        loss: mean loss per valid token of the global batch.
        mtp_losses: [depths] the same of each depth of multi-token prediction.
        grad_norm: global L2 norm of the gradient before clipping.
        found_inf: 1 where the norm was not finite and the update was skipped, else 0.
        num_zeros: zero elements of the gradient, when asked for.
        loss_scale: the scale the loss was multiplied with.
    """

    loss: Tensor
    mtp_losses: Tensor
    grad_norm: Tensor
    found_inf: Tensor
    num_zeros: Tensor | None
    loss_scale: Tensor


def forward_step(model: nn.Module, batch: MicroBatch, decoder_input: Tensor | None = None) -> Tensor:
    """Run the model, or one chunk of it, on this rank's part of a micro-batch.

    Returns:
        From a model that ends here the loss of each token, [b, s / cp], zero where the loss mask is, with multi-token
        prediction in training [1 + depths, b, s / cp]; else hidden states [s, b, h].
    """
    further = {}
    if FUTURE[0] in batch and model.training:
        further["future_tokens"] = FutureTokens(*(batch[name] for name in FUTURE))
    return model(
        batch.get("tokens"),
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch.get("labels"),
        loss_mask=batch.get("loss_mask"),
        packed_seq_params=batch.get("packed_seq_params"),
        decoder_input=decoder_input,
        **further,
    )


def holds_loss(model_chunks: Sequence[nn.Module]) -> bool:
    """Whether the model ends on this rank, so that it reads labels and computes the loss."""
    return any(getattr(chunk, "post_process", True) for chunk in model_chunks)


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Add up `tensor`, in place, over the ranks of a group; None stands for this process alone."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)


def valid_tokens(micro_batches: list[MicroBatch]) -> Tensor:
    """Tokens of this rank that have a loss: float64 [micro-batches, 1 + depths] on the device, next tokens first."""

    def count(batch: MicroBatch) -> Tensor:
        further = [batch[FUTURE[-1]].flatten(0, 1).sum(0, dtype=torch.float64)] if FUTURE[-1] in batch else []
        return torch.cat([batch["loss_mask"].sum(dtype=torch.float64).view(1), *further])

    return torch.stack([count(batch) for batch in micro_batches])


def count_tokens(micro_batches: list[MicroBatch], group: dist.ProcessGroup | None) -> Tensor:
    """Valid tokens of the global batch, at least 1: float64 [1 + depths], on the device, equal on ranks of `group`."""
    count = valid_tokens(micro_batches).sum(0)
    sum_over(count, group)
    return count.clamp_(min=1.0)


def loss_weights(
    micro_batches: list[MicroBatch],
    total_tokens: Tensor,
    data_parallel_size: int,
    per_token: bool,
    cp_group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """What the summed losses [1 + depths] of each micro-batch are multiplied with before its backward pass.

    Per token: 1 / (valid tokens of the global batch), so that every token weighs alike. Otherwise Megatron's older
    rule, the mean over micro-batches and data parallel ranks of each micro-batch's token mean. Context parallel ranks
    hold parts of the same micro-batch, so its tokens are counted over `cp_group`.
    """
    if per_token:
        return [total_tokens.reciprocal()] * len(micro_batches)
    tokens = valid_tokens(micro_batches)
    sum_over(tokens, cp_group)
    return list((tokens.clamp(min=1.0) * len(micro_batches) * data_parallel_size).reciprocal().unbind())


def train_step(
    model_chunks: ModelChunks,
    optimizer: MegatronOptimizer,
    micro_batches: list[MicroBatch],
    *,
    tp_group: dist.ProcessGroup | None,
    dp_cp_group: dist.ProcessGroup | None,
    cp_group: dist.ProcessGroup | None = None,
    pp_group: dist.ProcessGroup | None = None,
    per_token_loss: bool = True,
    mtp_loss_weights: Sequence[float] = (),
    tp_dp_cp_group: dist.ProcessGroup | None = None,
    forward_backward_func: ForwardBackward = forward_backward_no_pipelining,
    empty_unused_memory_level: int = 0,
) -> StepOutput:
    """Train on one global batch without waiting for the device.

    Args:
        model_chunks: the GPT on this rank, or its pipeline stages, each wrapped by `wrap_data_parallel`.
        optimizer: holds the masters and moments of their parameters.
        micro_batches: this rank's share of the global batch; labels and loss_mask where the model ends.
        tp_group: ranks that share each layer; sums the gradients that are partial over it.
        dp_cp_group: ranks between which tokens are split; normalizes the loss.
        cp_group: those of them that share micro-batches; None stands for this rank alone.
        pp_group: the ranks of this pipeline, all of which learn the loss; None stands for this rank alone.
        per_token_loss: see `loss_weights`.
        mtp_loss_weights: weight of the mean loss of each depth of multi-token prediction, on every rank.
        tp_dp_cp_group: ranks between which the tokens of a layer of experts are split; its counts are summed over them.
            Default the global group.
        forward_backward_func: from `get_forward_backward_func`.
        empty_unused_memory_level: from 1 on cached GPU memory that nothing is in is given back after the backward pass,
            from 2 on also after the update; both wait for the GPU.
    """
    loss_and_tokens = forward_backward(
        model_chunks,
        optimizer,
        micro_batches,
        dp_cp_group=dp_cp_group,
        cp_group=cp_group,
        per_token_loss=per_token_loss,
        mtp_loss_weights=mtp_loss_weights,
        forward_backward_func=forward_backward_func,
    )
    finalize_model_grads(model_chunks, tp_group)
    if empty_unused_memory_level >= 1:
        torch.cuda.empty_cache()
    loss_scale = optimizer.get_loss_scale().clone()
    result = optimizer.step()
    if empty_unused_memory_level >= 2:
        torch.cuda.empty_cache()
    # As in Megatron-LM also after a step that was skipped: the tokens went where they were counted all the same.
    update_expert_bias(model_chunks, _all_token_ranks() if tp_dp_cp_group is None else tp_dp_cp_group)
    losses, total_tokens = losses_of_all(*loss_and_tokens, dp_cp_group, pp_group)
    means = losses / total_tokens
    return StepOutput(means[0], means[1:], result.grad_norm, result.found_inf, result.num_zeros, loss_scale)


def forward_backward(
    model_chunks: ModelChunks,
    optimizer: MegatronOptimizer,
    micro_batches: list[MicroBatch],
    *,
    dp_cp_group: dist.ProcessGroup | None,
    cp_group: dist.ProcessGroup | None = None,
    per_token_loss: bool = True,
    mtp_loss_weights: Sequence[float] = (),
    forward_backward_func: ForwardBackward = forward_backward_no_pipelining,
) -> tuple[Tensor, Tensor]:
    """Gradients of the global batch into the model; returns (this rank's summed losses, valid tokens of all ranks).

    Both are [1 + depths], of the next token and of multi-token prediction, and zero on ranks of a pipeline where the
    model does not end. Losses that layers of experts attach to their activations count as their mean over the
    micro-batches of all data parallel ranks, beside the loss of the tokens.
    """
    optimizer.zero_grad()
    chunks = as_chunks(model_chunks)
    data_parallel_size = group_size(dp_cp_group) // group_size(cp_group)
    auxiliary_losses.begin_step(optimizer.get_loss_scale().double() / (len(micro_batches) * data_parallel_size))
    factors = torch.ones(1 + len(mtp_loss_weights), dtype=torch.float64, device=optimizer.device)
    for depth, factor in enumerate(mtp_loss_weights, start=1):
        factors[depth].fill_(factor)  # `factors[depth] = factor` would copy from the host, which waits for a GPU
    sums = torch.zeros_like(factors)
    total_tokens, weights = sums.clone(), []
    if holds_loss(chunks):
        total_tokens = count_tokens(micro_batches, dp_cp_group)
        weights = loss_weights(micro_batches, total_tokens, data_parallel_size, per_token_loss, cp_group)

    def weighted_loss(number: int, losses: Tensor) -> Tensor:
        summed = losses.reshape(len(factors), -1).sum(1)
        sums.add_(summed.detach())
        return optimizer.scale_loss((summed * (weights[number] * factors).to(summed.dtype)).sum())

    forward_backward_func(forward_step, chunks, micro_batches, weighted_loss)
    return sums, total_tokens


def losses_of_all(
    losses: Tensor, total_tokens: Tensor, dp_cp_group: dist.ProcessGroup | None, pp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """What `forward_backward` returns, of all ranks together and known to the whole pipeline."""
    sum_over(losses, dp_cp_group)
    both = torch.stack([losses, total_tokens])
    sum_over(both, pp_group)
    return both[0], both[1]


def _all_token_ranks() -> dist.ProcessGroup | None:
    return parallel_state.get_tensor_and_data_parallel_group(check_initialized=False, with_context_parallel=True)
