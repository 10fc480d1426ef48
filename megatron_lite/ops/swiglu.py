"""The gated activation of Llama and most models since, of gates and ups in one tensor, and their order in it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def swiglu(gates_and_ups: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202): [..., 2f], the gates first -> [..., f].

    Only its input is kept for backward, which computes silu again and writes both halves of the gradient in place.
    Inside torch.compile, which fuses and chooses what to keep by itself, it is the plain expression.
    """
    if torch.compiler.is_compiling():
        gate, up = gates_and_ups.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gates_and_ups)  # type: ignore[no-any-return]


def gates_then_ups(interleaved: Tensor, dim: int) -> Tensor:
    """Reorder a dimension from gate 0, up 0, gate 1, up 1, ... to all gates, then all ups."""
    dim = dim % interleaved.dim()
    return interleaved.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gates_and_ups: Tensor) -> Tensor:
        ctx.save_for_backward(gates_and_ups)
        gate, up = gates_and_ups.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gates_and_ups,) = ctx.saved_tensors
        gate, up = gates_and_ups.chunk(2, dim=-1)
        result = torch.empty_like(gates_and_ups)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=activated), gate, grad_input=grad_gate)
        return result
