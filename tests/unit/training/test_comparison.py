"""Two records of what layouts computed: put together from parts, compared, and the first difference found."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.training.comparison import (
    LOSSES,
    PRECISIONS,
    TOKENS,
    LayoutRecord,
    compare,
    order_of_computation,
)
from megatron_lite.training.recording import put_together

FP64 = PRECISIONS["fp64"]
NAMES = [TOKENS, "embedding", "decoder.layers.0.self_attention", "decoder.layers.0.mlp", "decoder.layers.0", LOSSES]


def record() -> LayoutRecord:
    """Of two samples with three tokens, one layer and two parameters."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return LayoutRecord(
        losses=[2.0, 1.5],
        grad_norms=[0.5, 0.25],
        initial={"a": 11, "b": 12},
        outputs={name: drawn(2, 3, 1 if name == LOSSES else 2) for name in NAMES},
        gradients={"a": drawn(4, 4), "b": drawn(4)},
        weights={"a": drawn(4, 4), "b": drawn(4)},
    )


def test_equal_records_are_equal() -> None:
    comparison = compare(record(), record(), FP64)
    assert comparison.is_rounding
    assert comparison.first_difference is None
    assert [one.value for one in comparison.outputs + comparison.gradients + comparison.weights] == [0.0] * 10


def test_rounding_is_no_difference_and_more_than_rounding_is() -> None:
    """Mutation: bounds that are absolute; the weights here are small."""
    for factor, equal in ((1 + 1e-12, True), (1 + 1e-7, False)):
        for kind in ("losses", "grad_norms", "outputs", "gradients", "weights"):
            left, right = record(), record()
            values = getattr(right, kind)
            if isinstance(values, list):
                values[-1] *= factor
            else:
                values[next(iter(values))] *= factor
            assert compare(left, right, FP64).is_rounding is equal, kind


def test_first_difference_is_in_the_order_of_computation() -> None:
    """Mutation: order of the dictionary or of names, or the largest difference."""
    left, right = record(), record()
    right.outputs["decoder.layers.0"] += 1.0
    right.outputs[LOSSES] *= 1.5
    right.outputs["decoder.layers.0.mlp"][1, 2, 0] += 1e-3
    right.outputs = {name: right.outputs[name] for name in sorted(right.outputs)}
    found = compare(left, right, FP64).first_difference
    assert found is not None
    assert found.name == "decoder.layers.0.mlp"
    assert found.where == "most in sample 1, position 2"


def test_modules_are_ordered_as_a_token_passes_them() -> None:
    names = [
        *("the tokens read", "embedding"),
        *("decoder.layers.2.self_attention", "decoder.layers.2.mlp", "decoder.layers.2"),
        *("decoder.layers.10.self_attention", "decoder.layers.10.mlp", "decoder.layers.10"),
        *("decoder.final_layernorm", "mtp.layers.2", "mtp.layers.10", "the labels read", "the loss of each token"),
    ]
    assert sorted(sorted(names), key=order_of_computation) == names


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["losses", "outputs", "gradients", "weights"])
def test_what_is_not_a_number_differs(value: float, kind: str) -> None:
    """On one side or on both. Mutation: comparisons with NaN that are False by accident."""
    broken = record()
    values = getattr(broken, kind)
    if isinstance(values, list):
        values[0] = value
    else:
        values[next(iter(values))].view(-1)[0] = value
    for other in (record(), copy.deepcopy(broken)):
        assert not compare(broken, other, FP64).is_rounding
        assert not compare(other, broken, FP64).is_rounding


def test_what_one_side_lacks_differs() -> None:
    for kind in ("outputs", "gradients", "weights", "initial"):
        left, right = record(), record()
        getattr(right, kind).popitem()
        assert not compare(left, right, FP64).is_rounding, kind
        assert not compare(right, left, FP64).is_rounding, kind
    other_shape = record()
    other_shape.gradients["a"] = other_shape.gradients["a"][:2]
    comparison = compare(record(), other_shape, FP64)
    assert comparison.gradients[0] == ("a", math.inf, "one side has none of this shape")


def test_gradients_that_are_rounding_themselves_are_compared_with_the_others() -> None:
    """Such as that of the bias of a key norm, which is zero in exact arithmetic."""
    left, right = record(), record()
    left.gradients["b"], right.gradients["b"] = torch.full((4,), 1e-17), torch.full((4,), -1e-17)
    assert compare(left, right, FP64).is_rounding
    right.gradients["b"] = torch.full((4,), 1e-9)
    assert not compare(left, right, FP64).is_rounding


def test_weights_count_in_float64_alone() -> None:
    left, right = record(), record()
    right.weights["a"] += 1.0
    for name, precision in PRECISIONS.items():
        comparison = compare(left, right, precision)
        assert comparison.is_rounding == (name != "fp64")
        assert comparison.weights[0].name == "a"  # shown all the same


def test_parts_are_put_together() -> None:
    """Parts of several ranks and micro-batches, one of them twice."""
    whole = torch.arange(12, dtype=torch.float64).view(2, 3, 2)
    flat = whole.view(6, 2)
    parts = [torch.tensor(numbers) for numbers in ([5, 0], [1, 4], [2, 3], [4, 1], [])]
    pieces = [(numbers.long(), flat[numbers.long()]) for numbers in parts]
    together, apart = put_together(pieces, 2, 3)
    assert torch.equal(together, whole)
    assert apart == 0.0
    missing, _ = put_together(pieces[:2], 2, 3)
    assert missing.isnan().all(dim=-1).tolist() == [[False, False, True], [True, False, False]]


def test_copies_on_several_ranks_that_differ_are_told() -> None:
    """Relative to the largest value, whichever rank is first. Mutation: the last one wins silently."""
    numbers = torch.arange(3)
    values = torch.tensor([[1.0], [-4.0], [2.0]], dtype=torch.float64)
    other = values.clone()
    other[0] += 1e-3
    for pieces in ([(numbers, values), (numbers, other)], [(numbers, other), (numbers, values)]):
        assert put_together(pieces, 1, 3)[1] == pytest.approx(1e-3 / 4)
    other[0] = math.nan
    assert put_together([(numbers, values), (numbers, other)], 1, 3)[1] == math.inf


def test_ranks_of_a_side_that_disagree_are_a_difference() -> None:
    left, right = record(), record()
    right.unequal = ["ranks differ"]
    comparison = compare(left, right, FP64)
    assert not comparison.is_rounding
    assert comparison.unequal == ["right: ranks differ"]


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    written = record()
    written.unequal = ["something"]
    written.save(tmp_path / "record.pt")
    read = LayoutRecord.read(tmp_path / "record.pt")
    assert {one.value for one in compare(written, read, FP64).gradients} == {0.0}
    assert read.outputs.keys() == written.outputs.keys()
    assert (read.losses, read.grad_norms, read.initial) == (written.losses, written.grad_norms, written.initial)
    assert read.unequal == ["something"]
