"""Two runs of the same model at different layouts, compared by their records.

tools/compare_layouts.py is the command; recording.py makes the records. Gradients and weights are put together whole.
Of hidden states two numbers a token are kept, the L2 norm and the projection on a fixed random vector: enough to see a
difference, and small.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS, LABELS, LOSSES = "the tokens read", "the labels read", "the loss of each token"
_AROUND_LAYERS = (TOKENS, "embedding", "decoder.layers", "decoder.final_layernorm", "mtp.layers", LABELS, LOSSES)


class Precision(NamedTuple):
    """How far apart two correct layouts may be.

    Attributes:
        bound: largest relative deviation that is rounding.
        noise: share of the largest gradient of the model to which smaller ones are compared: some are zero, and what is
            there is rounding (the bias of a key norm moves all scores of a query alike).
        weights_count: a deviation of weights tells something. Not in low precision: Adam divides a gradient by its
            size, so an element whose gradient is rounding moves by a whole learning rate, in either direction.
    """

    bound: float
    noise: float
    weights_count: bool


PRECISIONS = {
    "fp64": Precision(1e-9, 1e-4, True),
    "fp32": Precision(1e-4, 1e-2, False),
    "bf16": Precision(5e-2, 1e-1, False),
}


@dataclass
class LayoutRecord:
    """What one layout computed.

    Attributes:
        losses, grad_norms: of each step.
        initial: fingerprint of each parameter's first value.
        outputs: name of a module -> float64 [samples, s, k] numbers of each token in the first step.
        gradients: of the first step by parameter name, whole, before clipping.
        weights: after the last step.
        unequal: sentences about tensors of which several ranks hold copies that differ.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write to a file."""
        torch.save({one.name: getattr(self, one.name) for one in dataclasses.fields(self)}, path)

    @classmethod
    def read(cls, path: Path) -> "LayoutRecord":
        """What `save` wrote."""
        return cls(**torch.load(path, weights_only=True))


class Deviation(NamedTuple):
    """How much something differs, relative to its size, and where most."""

    name: str
    value: float
    where: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two records side by side.

    Attributes:
        precision: the bound, and what counts.
        losses, grad_norms: of each step.
        initial: parameters whose first values are not equal bit for bit.
        outputs: in the order of computation.
        gradients, weights: of each parameter, largest first.
        unequal: sentences about copies on several ranks of one side.
    """

    precision: Precision
    losses: list[Deviation]
    grad_norms: list[Deviation]
    initial: list[str]
    outputs: list[Deviation]
    gradients: list[Deviation]
    weights: list[Deviation]
    unequal: list[str]

    @property
    def first_difference(self) -> Deviation | None:
        """The first output, in the order of computation, that differs by more than the bound."""
        return next((one for one in self.outputs if not one.value <= self.precision.bound), None)

    @property
    def is_rounding(self) -> bool:
        """Whether all that counts deviates by no more than the bound, and the ranks of each side agree."""
        counted = [*self.losses, *self.grad_norms, *self.outputs, *self.gradients]
        counted += self.weights if self.precision.weights_count else []
        return not self.initial and not self.unequal and all(one.value <= self.precision.bound for one in counted)


def compare(left: LayoutRecord, right: LayoutRecord, precision: Precision) -> Comparison:
    """Deviations of two records from each other. What only one of them has deviates infinitely."""
    names = sorted(left.outputs.keys() | right.outputs.keys(), key=order_of_computation)
    return Comparison(
        precision,
        [Deviation(f"loss, step {n}", _of_numbers(*pair)) for n, pair in _steps(left.losses, right.losses)],
        [
            Deviation(f"gradient norm, step {n}", _of_numbers(*pair))
            for n, pair in _steps(left.grad_norms, right.grad_norms)
        ],
        [name for name in left.initial | right.initial if left.initial.get(name) != right.initial.get(name)],
        [_of_outputs(name, left.outputs.get(name), right.outputs.get(name)) for name in names],
        _of_tensors(left.gradients, right.gradients, precision.noise),
        _of_tensors(left.weights, right.weights, 1.0),
        [f"left: {one}" for one in left.unequal] + [f"right: {one}" for one in right.unequal],
    )


def order_of_computation(name: str) -> tuple[int, ...]:
    """Sorts names of outputs in the order in which a token passes them."""
    layer = re.fullmatch(r"decoder\.layers\.(\d+)(\.\w+)?", name)
    if layer is not None:
        return _AROUND_LAYERS.index("decoder.layers"), int(layer[1]), (".self_attention", ".mlp", None).index(layer[2])
    further = re.fullmatch(r"mtp\.layers\.(\d+)", name)
    if further is not None:
        return _AROUND_LAYERS.index("mtp.layers"), int(further[1])
    return (_AROUND_LAYERS.index(name),)


def _steps(left: Sequence[float], right: Sequence[float]) -> Iterator[tuple[int, tuple[float, float]]]:
    return enumerate(zip(left, right, strict=True), 1)


def _of_numbers(left: float, right: float) -> float:
    if not (math.isfinite(left) and math.isfinite(right)):
        return math.inf
    return abs(left - right) / max(abs(left), abs(right)) if left != right else 0.0


def _of_outputs(name: str, left: Tensor | None, right: Tensor | None) -> Deviation:
    """The token that differs most; each kind of number relative to its largest in all tokens."""
    if left is None or right is None or left.shape != right.shape:
        return Deviation(name, math.inf, "one side has none of this size")
    scale = torch.maximum(left.abs(), right.abs()).amax(dim=(0, 1)).clamp(min=torch.finfo(torch.float64).tiny)
    of_tokens = ((left - right).abs() / scale).nan_to_num(nan=math.inf).amax(dim=-1)
    sample, position = divmod(int(of_tokens.argmax()), of_tokens.size(1))
    value = of_tokens.max().item()
    return Deviation(name, value, f"most in sample {sample}, position {position}" if value else "")


def _of_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor], noise: float) -> list[Deviation]:
    """Largest difference of each tensor, relative to its largest element, or to `noise` times that of all tensors."""
    largest = max((_largest(tensor) for side in (left, right) for tensor in side.values()), default=0.0)
    found = []
    for name in dict.fromkeys([*left, *right]):
        ours, theirs = left.get(name), right.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            found.append(Deviation(name, math.inf, "one side has none of this shape"))
            continue
        difference = _largest(ours.double() - theirs.double())
        value = difference / max(_largest(ours), _largest(theirs), noise * largest) if difference else 0.0
        found.append(Deviation(name, math.inf if math.isnan(value) else value))
    return sorted(found, key=lambda one: -one.value)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
