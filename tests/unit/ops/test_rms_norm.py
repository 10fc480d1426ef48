"""RMSNorm against torch's, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops.rms_norm import rms_norm

EPSILON = 0.1


def results(function: object, dtype: torch.dtype, strided: bool) -> list[Tensor]:
    """Output and gradients of input and weight, in float64; all start from numbers that bfloat16 has."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(3, 5, 2, 96, generator=generator).bfloat16().to(dtype).requires_grad_()
    x = whole[..., 32:64] if strided else whole
    weight = torch.rand(x.size(-1), generator=generator).bfloat16().to(dtype).requires_grad_()
    grad = torch.randn(x.shape, generator=generator).bfloat16().to(dtype)
    output = function(x, weight)  # type: ignore[operator]
    assert output.dtype == dtype
    return [one.double() for one in (output, *torch.autograd.grad(output, (whole, weight), grad))]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_equals_the_formula(dtype: torch.dtype, bound: float, strided: bool) -> None:
    """Mutations: no epsilon; no mean in the gradient; weight left out of it; sums of its gradient in bfloat16."""

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight

    found = results(lambda x, weight: rms_norm(x, weight, EPSILON), dtype, strided)
    wanted = results(formula, torch.float64, strided)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()


def test_equals_torchs() -> None:
    """To the rounding of float32."""
    found = results(lambda x, weight: rms_norm(x, weight, EPSILON), torch.float32, False)
    theirs = results(lambda x, weight: F.rms_norm(x, (96,), weight, EPSILON), torch.float32, False)
    for one, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
