"""Mean loss per token on held-out data, the same number at every layout."""

import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.distributed import reshard_parameters
from megatron_lite.training.batches import MicroBatchStream
from megatron_lite.training.step import micro_batch_losses, sum_over


@torch.no_grad()
def evaluate(
    model: nn.Module,
    stream: MicroBatchStream,
    *,
    iterations: int,
    num_microbatches: int,
    dp_cp_group: dist.ProcessGroup | None,
) -> float:
    """Mean loss over the valid tokens of `iterations` global batches.

    Sums and counts are added up on the device and reduced once. Dropout is off and no random number is drawn, so
    training goes on as if the evaluation had not happened.
    """
    model.eval()
    totals: torch.Tensor | None = None
    for _ in range(iterations):
        for batch in stream.next_global_batch(num_microbatches):
            losses = micro_batch_losses(model, batch)
            pair = torch.stack([losses.sum(dtype=torch.float64), batch["loss_mask"].sum(dtype=torch.float64)])
            totals = pair if totals is None else totals + pair
    reshard_parameters(model)
    model.train()
    assert totals is not None, "evaluate needs at least one iteration"
    sum_over(totals, dp_cp_group)
    total_loss, tokens = totals.tolist()
    return total_loss / max(tokens, 1.0)
