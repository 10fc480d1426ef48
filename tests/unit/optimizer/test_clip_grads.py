"""The sum of squares of local gradients, which float32 is too short for."""

import pytest
import torch

from megatron_lite.optimizer.clip_grads import local_sum_of_squares

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 5000, 3_000_037])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_within_3e_7(size: int, dtype: torch.dtype) -> None:
    """Mutations: one norm in float32, which is off by 1e-4 here; the rest behind the last stretch left out."""
    gradient = (torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1e-3).to(dtype)
    wanted = gradient.double().square().sum()
    found = local_sum_of_squares([gradient, torch.zeros(3, dtype=dtype)], CPU)
    assert found.dtype == torch.float64
    assert abs(found - wanted) <= 3e-7 * wanted


def test_a_gradient_that_is_not_contiguous() -> None:
    gradient = torch.arange(6000.0).view(60, 100).t()
    assert local_sum_of_squares([gradient], CPU).item() == pytest.approx(gradient.double().square().sum().item())


def test_large_numbers_are_finite_and_what_is_not_is_not() -> None:
    """Mutation: one norm in float32, whose squares sum up to infinity."""
    large = torch.full((2_000_000,), 5e17)
    assert local_sum_of_squares([large], CPU).sqrt().item() == pytest.approx(5e17 * 2e6**0.5)
    for bad in (float("inf"), float("nan")):
        assert not local_sum_of_squares([torch.cat([torch.ones(5000), torch.tensor([bad])])], CPU).isfinite()
