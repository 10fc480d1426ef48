"""The gated activation of Llama and most models since, of gates and ups in one tensor, and their order in it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def swiglu(gates_and_ups: Tensor, interleaved: bool = False) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202): [..., 2f] in the order of `split_gates` -> [..., f].

    Only its input is kept for backward, which computes silu again and writes both parts of the gradient in place.
    Inside torch.compile, which fuses and chooses what to keep by itself, it is the plain expression.
    """
    if torch.compiler.is_compiling():
        gate, up = split_gates(gates_and_ups, interleaved)
        return F.silu(gate) * up
    return _SwiGLU.apply(gates_and_ups, interleaved)  # type: ignore[no-any-return]


def split_gates(gates_and_ups: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the gates and of the ups of [..., 2f]: all gates and then all ups, or gate 0, up 0, gate 1, up 1, ..."""
    if interleaved:
        gate, up = gates_and_ups.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        gate, up = gates_and_ups.chunk(2, dim=-1)
    return gate, up


def gates_then_ups(interleaved: Tensor, dim: int) -> Tensor:
    """Reorder a dimension from gate 0, up 0, gate 1, up 1, ... to all gates, then all ups."""
    dim = dim % interleaved.dim()
    return interleaved.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gates_and_ups: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(gates_and_ups)
        ctx.interleaved = interleaved
        gate, up = split_gates(gates_and_ups, interleaved)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gates_and_ups,) = ctx.saved_tensors
        gate, up = split_gates(gates_and_ups, ctx.interleaved)
        result = torch.empty_like(gates_and_ups)
        grad_gate, grad_up = split_gates(result, ctx.interleaved)
        activated = F.silu(gate)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=activated), gate, grad_input=grad_gate)
        return result, None
