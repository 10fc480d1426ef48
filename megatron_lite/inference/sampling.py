"""Choosing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config_field import Validated, knob


@dataclass
class SamplingConfig(Validated):
    """How the next token is drawn; the defaults draw from the model's own distribution."""

    temperature: float = knob(1.0, "Divides the logits: below 1 is bolder, 0 always takes the likeliest token.")
    top_k: int = knob(0, "Draw among this many of the likeliest tokens only; 0 means all.")
    top_p: float = knob(0.0, "Draw among the fewest tokens whose probabilities reach this sum; 0 means all.")
    seed: int = knob(1234, "Seed of the draws.")

    def violations(self) -> list[str]:
        """Every broken rule, one sentence each."""
        found = super().violations()
        if self.temperature < 0.0:
            found.append(f"temperature is {self.temperature}, but must not be negative: write 0 or more.")
        if self.top_k < 0:
            found.append(f"top_k is {self.top_k}, but must not be negative: write 0 for all tokens.")
        if not 0.0 <= self.top_p <= 1.0:
            found.append(f"top_p is {self.top_p}, but must be between 0 and 1: write 0 for all tokens.")
        return found


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token for each sequence.

    Top-p ("nucleus") is that of Holtzman et al. 2020, applied after the temperature and among the top k.

    Args:
        logits: [b, V], any floating dtype.
        generator: source of the draws, on the device of the logits.

    Returns:
        [b] int64.
    """
    if config.temperature == 0.0 or config.top_k == 1:
        return logits.argmax(dim=-1)
    scores = logits.float() / config.temperature
    if config.top_k:
        kth = scores.topk(min(config.top_k, scores.size(-1)), dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if 0.0 < config.top_p < 1.0:
        probabilities = _keep_nucleus(probabilities, config.top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest likeliest tokens that reach `top_p` together; at least one stays. [b, V] -> [b, V]."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)
