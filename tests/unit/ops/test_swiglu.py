"""SwiGLU as one operation against the plain expression."""

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.ops.swiglu import swiglu


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_expression(dtype: torch.dtype, interleaved: bool) -> None:
    """Mutations: gates and ups exchanged; the gradient of the gate without up; ups first in the gradient."""
    x = torch.randn(3, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    grad = torch.linspace(-1, 1, 5, dtype=dtype).expand(3, 4, 5)
    gate, up = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    found = swiglu(x, interleaved)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    ours, theirs = (torch.autograd.grad(output, x, grad)[0] for output in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_what_is_kept_for_backward() -> None:
    """Its input alone. Mutation: keep the activation too."""
    kept = []
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
