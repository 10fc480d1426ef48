"""Which pairs stay within an expert's capacity, against a loop over experts."""

import pytest
import torch

from megatron_lite.transformer.moe.capacity import expert_capacity, pairs_within_capacity


def test_capacity_is_the_share_of_an_expert_times_the_factor_rounded_up() -> None:
    assert expert_capacity(100, 2, 8, 1.0) == 25
    assert expert_capacity(100, 2, 8, 1.01) == 26
    assert expert_capacity(3, 1, 8, 1.0) == 1
    assert expert_capacity(10, 8, 8, 4.0) == 10, "an expert never gets more than all tokens"


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [1, 3, 20])
def test_each_expert_keeps_the_best_or_the_first(policy: str, capacity: int) -> None:
    """Fails with the sort ascending, with either sort unstable, and with capacity + 1."""
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(5)[:2] for _ in range(20)])
    probs = (torch.rand(20, 2) * 4).round() / 4  # ties
    kept = pairs_within_capacity(probs, indices, 5, capacity, policy)
    for expert in range(5):
        pairs = [(t, j) for t in range(20) for j in range(2) if indices[t, j] == expert]
        if policy == "probs":
            pairs.sort(key=lambda pair: -probs[pair])
        for place, pair in enumerate(pairs):
            assert bool(kept[pair]) == (place < capacity)
