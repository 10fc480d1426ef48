"""A small model with a small optimizer state, every number of which is known."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class TinyModel(nn.Module):
    """A tied pair, a norm and two buffers; building it draws no random number."""

    def __init__(self, start: float = 0.0, width: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(6, width)
            self.norm = nn.LayerNorm(width)
            self.output = nn.Linear(width, 6, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        fill(self.state_dict(), start)


class TinyOptimizer:
    """Two moments for each parameter and a step counter."""

    def __init__(self, model: nn.Module, start: float = 0.0) -> None:
        self.state: dict[str, Tensor] = {"optimizer.state.norm.weight.step": torch.zeros(())}
        for name, parameter in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                self.state[f"optimizer.state.{name}.{key}"] = torch.zeros_like(parameter)
        fill(self.state, start + 0.25)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        for name, value in state_dict.items():
            self.state[name].copy_(value)


def fill(tensors: Mapping[str, Tensor], start: float) -> None:
    """Unique numbers in every element, so that any swap or loss shows."""
    with torch.no_grad():
        for number, tensor in enumerate(tensors.values()):
            values = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
            tensor.copy_(values + 100 * number + start)


def snapshot(model: nn.Module, optimizer: TinyOptimizer | None = None) -> dict[str, Tensor]:
    """Copies of all numbers."""
    state = model.state_dict() | (optimizer.state_dict() if optimizer else {})
    return {name: value.clone() for name, value in state.items()}


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
