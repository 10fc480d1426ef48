"""Losses that balance the load of the experts, each as this rank's share: the shares of all ranks sum to the loss.

Symbols: E experts, k experts of each token, T tokens of the micro-batch over its tensor x context parallel ranks, b its
sequences. Counts have no gradient and are summed over ranks; scores are of this rank's own tokens. So a share's
gradient is that of the whole loss with respect to this rank's scores, and gradients are summed, as all others are.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel import collectives
from megatron_lite.transformer.moe.moe_config import BALANCE_LOSSES as BALANCE_LOSSES


@torch.no_grad()
def tokens_per_expert(indices: Tensor, num_experts: int) -> Tensor:
    """How often each sequence's tokens chose each expert: [s, b, k] -> [b, E] int64."""
    sequences = indices.size(1)
    offsets = torch.arange(sequences, device=indices.device).view(1, -1, 1) * num_experts
    counts = torch.zeros(sequences * num_experts, dtype=torch.int64, device=indices.device)
    flat = (indices + offsets).flatten()
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(sequences, num_experts)


def sum_over(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of a tensor without gradient over the ranks of `group`."""
    return counts if group is None or group_size(group) == 1 else collectives.all_reduce(counts, group)


def balance_share(score_sums: Tensor, counts: Tensor, topk: int, tokens: float, counted_tokens: float) -> Tensor:
    """E * sum_e f_e P_e, with f_e = count_e / (k counted_tokens) and P_e = score_sum_e / tokens: 1 for perfect balance.

    The balance loss of the Switch Transformer (Fedus et al. 2021, equations 4 to 6), for k experts of each token.

    Args:
        score_sums: [..., E], sums of normalized scores over this rank's own tokens.
        counts: [..., E], choices of all ranks' tokens, no gradient.
        topk: k.
        tokens: among which the scores are averaged, those of all ranks.
        counted_tokens: those that `counts` counts.

    Returns:
        this rank's share, summed over the leading dimensions too: 0-dim.
    """
    # Of no tokens at all the loss is 0, and so are the sums.
    factor = counts.size(-1) / (topk * max(tokens, 1) * max(counted_tokens, 1))
    return (score_sums * counts.to(score_sums.dtype)).sum() * factor


def z_loss_share(logits: Tensor, tokens: int) -> Tensor:
    """Sum over own tokens of logsumexp(logits)^2 / tokens (Zoph et al. 2022, "ST-MoE", equation 5): 0-dim.

    Args:
        logits: [..., E] of this rank's tokens.
        tokens: those of all ranks.
    """
    return logits.logsumexp(-1).square().sum() / max(tokens, 1)
