"""Loss scaling for float16, with its whole state on the device so that no step waits for the host.

The rule is Megatron's: `hysteresis` non-finite steps lower the scale, `growth_interval` finite steps in a row raise it
and refill the hysteresis.
"""

import torch
from torch import Tensor


class ConstantGradScaler:
    """A loss scale that never changes.

    Attributes:
        scale: float32 scalar, the factor on the loss.
    """

    def __init__(self, initial_scale: float, device: torch.device | str = "cpu") -> None:
        self.scale = torch.tensor(initial_scale, dtype=torch.float32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Nothing to learn from a step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to remember: the scale is a flag."""
        return {}


class DynamicGradScaler(ConstantGradScaler):
    """A loss scale that falls when gradients overflow and rises again after a calm while.

    Args:
        initial_scale: first value.
        min_scale: lowest value.
        growth_factor: factor on the scale when it rises, above 1.
        backoff_factor: factor on the scale when it falls, between 0 and 1.
        growth_interval: finite steps in a row before it rises.
        hysteresis: non-finite steps before it falls; they need not be in a row.
        device: where gradients live.
    """

    def __init__(
        self,
        initial_scale: float,
        min_scale: float = 1.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        assert 0.0 < min_scale <= initial_scale
        assert 0.0 < backoff_factor < 1.0 < growth_factor
        assert min(growth_interval, hysteresis) > 0
        super().__init__(initial_scale, device)
        self.min_scale = min_scale
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.growth_tracker = torch.zeros((), dtype=torch.int64, device=device)
        self.hysteresis_tracker = torch.full((), hysteresis, dtype=torch.int64, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Learn from a step: `found_inf` is 1 where some gradient was not finite, 0 otherwise (float scalar)."""
        overflow = found_inf > 0
        grown = torch.where(overflow, 0, self.growth_tracker + 1)
        raised = grown == self.growth_interval
        patience = torch.where(raised, self.hysteresis, self.hysteresis_tracker - overflow.long())
        lowered = overflow & (patience <= 0)
        scale = torch.where(lowered, (self.scale * self.backoff_factor).clamp(min=self.min_scale), self.scale)
        # In place, so that a state dict taken earlier keeps pointing at the living state.
        self.scale.copy_(torch.where(raised, scale * self.growth_factor, scale))
        self.growth_tracker.copy_(torch.where(raised, 0, grown))
        self.hysteresis_tracker.copy_(patience)

    def state_dict(self) -> dict[str, Tensor]:
        """The living tensors: load into them in place."""
        return {
            "scale": self.scale,
            "growth_tracker": self.growth_tracker,
            "hysteresis_tracker": self.hysteresis_tracker,
        }
