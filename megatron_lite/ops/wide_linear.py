"""A linear layer computed in a wider dtype than its input has."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_lite.gradient_pass import computes


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in the dtype of `weight`: [..., in] x [out, in] -> [..., out]; x is kept for backward as it came."""
    return _WideLinear.apply(x, weight)  # type: ignore[no-any-return]


class _WideLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.to(weight.dtype) @ weight.t()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] and computes("activations") else None
        grad_weight = None
        if ctx.needs_input_grad[1] and computes("weights"):
            grad_weight = grad.reshape(-1, grad.size(-1)).t() @ x.to(weight.dtype).reshape(-1, x.size(-1))
        return grad_x, grad_weight
