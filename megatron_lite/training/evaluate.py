"""Mean loss per token on held-out data, the same number at every layout."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.distributed import reshard_parameters
from megatron_lite.model_chunks import ModelChunks, as_chunks
from megatron_lite.pipeline_parallel.schedules import ForwardBackward, forward_backward_no_pipelining
from megatron_lite.training.batches import MicroBatchStream
from megatron_lite.training.step import forward_step, holds_loss, sum_over


@torch.no_grad()
def evaluate(
    model_chunks: ModelChunks,
    stream: MicroBatchStream,
    *,
    iterations: int,
    num_microbatches: int,
    dp_cp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None = None,
    forward_backward_func: ForwardBackward = forward_backward_no_pipelining,
    empty_unused_memory: bool = False,
) -> float:
    """Mean loss over the valid tokens of `iterations` global batches, on every rank.

    Sums and counts are added up on the device and reduced once. Dropout is off and no random number is drawn, so
    training goes on as if the evaluation had not happened. With `empty_unused_memory`, cached GPU memory is given back
    after each global batch.
    """
    assert iterations > 0, "evaluate needs at least one iteration"
    chunks = as_chunks(model_chunks)
    _set_training(chunks, False)
    device = next(parameter.device for chunk in chunks for parameter in chunk.parameters())
    totals = torch.zeros(2, dtype=torch.float64, device=device)

    def add_loss(number: int, losses: Tensor) -> Tensor:
        totals[0] += losses.sum(dtype=torch.float64)
        return losses.sum()

    for _ in range(iterations):
        batches = stream.next_global_batch(num_microbatches)
        forward_backward_func(forward_step, chunks, batches, add_loss, forward_only=True)
        if holds_loss(chunks):
            totals[1] += torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in batches]).sum()
        if empty_unused_memory:
            torch.cuda.empty_cache()
    for chunk in chunks:
        reshard_parameters(chunk)
    _set_training(chunks, True)
    sum_over(totals, dp_cp_group)
    sum_over(totals, pp_group)
    total_loss, tokens = totals.tolist()
    return float(total_loss / max(tokens, 1.0))


def _set_training(chunks: Sequence[nn.Module], training: bool) -> None:
    for chunk in chunks:
        chunk.train(training)
