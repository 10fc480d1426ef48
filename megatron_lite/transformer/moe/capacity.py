"""Capacity: how many tokens an expert takes from one rank, and which ones are dropped beyond it.

Capacity counts the tokens of one rank, so what is dropped depends on how tokens are split over ranks: with a capacity
factor results differ from layout to layout, by nature. Without one nothing is dropped, and they do not.
"""

import math

import torch
from torch import Tensor

from megatron_lite.transformer.moe.permutation import group_slots


def expert_capacity(num_tokens: int, topk: int, num_experts: int, capacity_factor: float) -> int:
    """Pairs of (token, expert) that one expert takes from one rank: ceil(t k / E * factor), at most t."""
    return min(math.ceil(num_tokens * topk / num_experts * capacity_factor), num_tokens)


def pairs_within_capacity(probs: Tensor, indices: Tensor, num_experts: int, capacity: int, drop_policy: str) -> Tensor:
    """Which choices are kept when each expert takes at most `capacity` tokens.

    Args:
        probs: [t, k] weights of the chosen experts.
        indices: int64 [t, k] the chosen experts; a token chooses an expert at most once.
        num_experts: number of experts E.
        capacity: tokens of each expert.
        drop_policy: "probs" keeps the most probable tokens of an expert (of equal ones the first), "position" the
            first ones.

    Returns:
        bool [t, k]; nothing waits for the device.
    """
    experts = indices.flatten()
    by_preference = torch.arange(experts.numel(), device=experts.device)
    if drop_policy == "probs":
        by_preference = probs.detach().flatten().argsort(descending=True, stable=True)
    order, counts = group_slots(experts[by_preference], num_experts)
    order = by_preference[order]
    start = counts.cumsum(0) - counts
    place = torch.arange(order.numel(), device=order.device) - start[experts[order]]
    return torch.empty_like(place, dtype=torch.bool).scatter_(0, order, place < capacity).view_as(indices)
