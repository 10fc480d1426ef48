"""wide_linear: F.linear of a cast input, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops.wide_linear import wide_linear


@pytest.mark.parametrize("shape", [(8,), (5, 8), (3, 2, 8), (0, 8)])
@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_equals_a_linear_layer_of_the_cast_input(
    shape: tuple[int, ...], narrow: torch.dtype, wide: torch.dtype
) -> None:
    """Mutations: the product in the input's dtype; either gradient left out, transposed, or in the wrong dtype."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(narrow).requires_grad_(), torch.randn(4, 8).to(wide).requires_grad_()
    factor = torch.randn(*shape[:-1], 4).to(wide)

    def run(output: Tensor) -> tuple[Tensor, ...]:
        return output, *torch.autograd.grad((output * factor).sum(), [x, weight])

    for found, wanted in zip(run(wide_linear(x, weight)), run(F.linear(x.to(wide), weight)), strict=True):
        torch.testing.assert_close(found, wanted)
