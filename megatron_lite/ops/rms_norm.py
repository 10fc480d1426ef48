"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) in few passes over memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least float32: [..., h] -> [..., h].

    torch has one kernel for it on GPUs, and torch.compile makes one. On a CPU its own is many operations, which forward
    and backward take twice as long as these.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.size(-1),), weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        scale = squares.div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x scale and g = grad weight: scale (g - n mean(g n)), and the sum of grad n over the rows."""
        x, weight, scale = ctx.saved_tensors
        normalized = x * scale
        by_normalized = grad * normalized
        grad_weight = by_normalized.flatten(0, -2).sum(0)
        mean = torch.mv(by_normalized.flatten(0, -2), weight.to(by_normalized.dtype)).div_(x.size(-1))
        grad_x = (grad * weight).to(normalized.dtype)
        grad_x.sub_(normalized.mul_(mean.view_as(scale))).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
