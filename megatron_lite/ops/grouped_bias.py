"""The biases of several experts, each added to the rows of its own expert."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def add_grouped_bias(x: Tensor, bias: Tensor, tokens_per_expert: Tensor, factor: Tensor | None = None) -> Tensor:
    """x + bias of the row's expert [* factor of the row]: [m, n] -> [m, n] in the dtype of x.

    Computed, and the gradients of the biases summed, in at least float32; each row of these is summed in the order of
    the rows, so that it repeats bit for bit. No table [m, n] is kept for backward.

    Args:
        x: [m, n], the rows of expert 0 first, then those of expert 1, ...
        bias: [E, n].
        tokens_per_expert: [E] int64 numbers of rows.
        factor: [m], a number for each row.
    """
    return _AddGroupedBias.apply(x, bias, tokens_per_expert, factor)  # type: ignore[no-any-return]


class _AddGroupedBias(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, counts: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(bias, counts, factor)
        rows = _of_rows(bias, counts, x)
        return (x + (rows if factor is None else rows * factor.unsqueeze(1))).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias, counts, factor = ctx.saved_tensors
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        grad_factor = None
        if factor is not None:
            grad_factor = (wide * _of_rows(bias, counts, grad)).sum(1).to(factor.dtype)
            wide = wide * factor.unsqueeze(1)
        # unsafe: without comparing the sum of the counts with the rows, for which the host would wait.
        grad_bias = torch.segment_reduce(wide, "sum", lengths=counts, axis=0, unsafe=True)
        return grad, grad_bias.to(bias.dtype), None, grad_factor


def _of_rows(bias: Tensor, counts: Tensor, x: Tensor) -> Tensor:
    """Each row's bias, [E, n] -> [m, n] in at least float32."""
    table = bias.to(torch.promote_types(x.dtype, torch.float32))
    return table.repeat_interleave(counts, dim=0, output_size=x.size(0))
