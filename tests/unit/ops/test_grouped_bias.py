"""add_grouped_bias: each row gets the bias of its expert, forward and backward."""

import pytest
import torch
from torch import Tensor

from megatron_lite.ops.grouped_bias import add_grouped_bias


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 4, 0], [0, 0, 0]])
@pytest.mark.parametrize("has_factor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_indexing_by_expert(counts: list[int], has_factor: bool, dtype: torch.dtype) -> None:
    """Mutations: the bias of the next expert; no factor in the gradient of the bias, or no gradient of the factor."""
    torch.manual_seed(0)
    experts = torch.arange(3).repeat_interleave(torch.tensor(counts))
    x, bias = (torch.randn(n, 6).to(dtype).requires_grad_() for n in (sum(counts), 3))
    factor = torch.rand(sum(counts), dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    weight = torch.randn(sum(counts), 6, dtype=torch.float64)
    inputs = [x, bias, *([factor] if has_factor else [])]

    def run(output: Tensor) -> tuple[Tensor, ...]:
        return output, *torch.autograd.grad((output * weight).sum(), inputs)

    rows = bias.double()[experts] * (factor.double()[:, None] if has_factor else 1.0)
    found = run(add_grouped_bias(x, bias, torch.tensor(counts), factor if has_factor else None))
    assert found[0].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, wanted in zip(found, run(x.double() + rows), strict=True):
        torch.testing.assert_close(one.double(), wanted.double(), rtol=tolerance, atol=tolerance)
