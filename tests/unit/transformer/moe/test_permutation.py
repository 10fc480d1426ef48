"""Index work of the dispatch: order, padding, sums and their gradients."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from megatron_lite.transformer.moe import permutation as permutation_module
from megatron_lite.transformer.moe.permutation import (
    Permutation,
    gather_rows,
    gather_slots,
    group_slots,
    pad_groups,
    sum_rows,
)

KEYS = torch.tensor([2, 0, 3, 2, 0, 2])  # six slots of three tokens; key 3 goes nowhere, key 1 is not chosen


def test_slots_are_ordered_by_key_and_then_as_they_came() -> None:
    order, counts = group_slots(KEYS, 3)
    assert order.tolist() == [1, 4, 0, 3, 5, 2]
    assert counts.tolist() == [2, 0, 3]


def test_many_equal_keys_keep_their_order() -> None:
    """Fails with an unstable sort."""
    order, counts = group_slots(torch.arange(5000) % 2, 2)
    assert torch.equal(order, torch.cat([torch.arange(0, 5000, 2), torch.arange(1, 5000, 2)]))
    assert counts.tolist() == [2500, 2500]


def test_padding_gives_every_key_its_rows() -> None:
    order, counts = group_slots(KEYS, 3)
    assert pad_groups(order, counts, 4).view(3, 4).tolist() == [[1, 4, 6, 6], [6, 6, 6, 6], [0, 3, 5, 6]]


def permutations() -> dict[str, Permutation]:
    order, counts = group_slots(KEYS, 3)
    return {
        "complete": Permutation.from_slots(order, 3, 2),
        "some slots without a row": Permutation.from_slots(order[:5], 3, 2, idle_slots=True),
        "some rows empty": Permutation.from_slots(pad_groups(order, counts, 4), 3, 2, empty_rows=True, idle_slots=True),
        "no rows": Permutation.from_slots(order[:0], 3, 2, idle_slots=True),
    }


@pytest.mark.parametrize("name", list(permutations()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gather_and_sum_are_products_with_a_matrix_of_zeros_and_ones(name: str, dtype: torch.dtype) -> None:
    """Forward and backward: with M [rows, t] they are M x and M^T x. Fails with one index table used for the other."""
    permutation = permutations()[name]
    slots = permutation.slots
    matrix = torch.zeros(len(slots), 3, dtype=torch.float64)
    for row, slot in enumerate(slots.tolist()):
        if slot < 6:
            matrix[row, slot // 2] = 1.0
    torch.manual_seed(0)
    # Small integers: exact in every dtype.
    tokens = torch.randint(-8, 8, (3, 5)).to(dtype).requires_grad_()
    rows = torch.randint(-8, 8, (len(slots), 5)).to(dtype).requires_grad_()

    def check(ours: Tensor, expected: Tensor) -> None:
        assert ours.dtype == dtype
        assert torch.equal(ours.double(), expected)

    check(gather_rows(tokens, permutation), matrix @ tokens.double())
    check(sum_rows(rows, permutation), matrix.T @ rows.double())
    gradient = torch.autograd.grad(gather_rows(tokens, permutation), tokens, rows.detach())[0]
    check(gradient, matrix.T @ rows.double())
    gradient = torch.autograd.grad(sum_rows(rows, permutation), rows, tokens.detach())[0]
    check(gradient, matrix @ tokens.double())


@pytest.mark.parametrize("name", list(permutations()))
def test_values_of_slots_find_their_rows(name: str) -> None:
    permutation = permutations()[name]
    values = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2).requires_grad_()
    expected = [0.0 if slot == 6 else slot + 1.0 for slot in permutation.slots.tolist()]
    placed = gather_slots(values, permutation)
    assert placed.tolist() == expected
    gradient = torch.autograd.grad(placed, values, placed.detach())[0].flatten()
    assert gradient.tolist() == [slot + 1.0 if slot + 1.0 in expected else 0.0 for slot in range(6)]


def test_sums_over_slots_round_once() -> None:
    """In bfloat16 256 + 1 + 1 is 258 if added in float32, 256 if rounded each time."""
    permutation = Permutation.from_slots(torch.arange(3), 1, 3)
    assert sum_rows(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16), permutation).item() == 258.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_gpu_compiles_sums_alike(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by an embedding_bag, which no kernel can be part of. Mutation: chosen on a CPU too."""
    order, _ = group_slots(torch.arange(96) % 5, 5)
    permutation = Permutation.from_slots(order, 12, 8)
    rows = torch.randn(96, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    exact = sum_rows(rows.double(), permutation)
    found = permutation_module._sum_of_slots(rows, permutation.inverse, 8)
    assert found.dtype == dtype
    rounding = 1e-14 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=1e-6 if dtype != torch.float64 else 1e-14)

    calls: list[torch.device] = []
    monkeypatch.setattr(permutation_module, "_sum_of_slots", lambda rows, *_: calls.append(rows.device) or rows)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    permutation_module._sum(rows, permutation)
    with FakeTensorMode():
        permutation_module._sum(torch.empty(96, 16, device="cuda"), permutation)
    assert [device.type for device in calls] == ["cuda"]
