"""The matrix products of the parallel layers, with communication hidden behind what is computed meanwhile."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from megatron_lite.gradient_pass import computes
from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel import collectives
from megatron_lite.tensor_parallel.mappings import require_divisible
from megatron_lite.tensor_parallel.overlapped import Way, gather_then_multiply, multiply_then_reduce_scatter


class _LinearWithAsyncCommunication(Function):
    """Forward: (all-gather along the sequence,) product. Backward: input gradient summed over the ranks.

    Only the local part of a split sequence is kept for backward: it is gathered again while the input gradient is
    computed. The sum of the input gradients (all-reduce, or reduce-scatter along the sequence) travels while the weight
    gradient is computed (Korthikanti et al. 2022, section 4.2.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sequence_parallel: bool,
        group: ProcessGroup,
        overlap: Way | None,
    ) -> Tensor:
        ctx.save_for_backward(input_, weight)
        ctx.sequence_parallel, ctx.group, ctx.has_bias = sequence_parallel, group, bias is not None
        ctx.overlap = overlap
        if overlap is not None:
            return gather_then_multiply(input_, weight, bias, group, overlap)[0]
        total_input = collectives.all_gather(input_, 0, group) if sequence_parallel else input_
        return F.linear(total_input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        input_, weight = ctx.saved_tensors
        group: ProcessGroup = ctx.group
        wants_input = ctx.needs_input_grad[0] and computes("activations")
        wants_weight = ctx.needs_input_grad[1] and computes("weights")
        wants_bias = ctx.has_bias and ctx.needs_input_grad[2] and computes("weights")
        total_input, grad_input, sum_of_grads, grad_weight = input_, None, None, None
        if ctx.sequence_parallel and wants_weight:
            total_input = collectives.start_all_gather(input_, group)
        if wants_input and not wants_weight and ctx.overlap is not None:
            grad_input = multiply_then_reduce_scatter(grad_output, weight.t(), group, ctx.overlap)
        elif wants_input:
            partial = grad_output.matmul(weight)
            start = collectives.start_reduce_scatter if ctx.sequence_parallel else collectives.start_all_reduce
            sum_of_grads = start(partial, group)
        tokens_of_grad = grad_output.reshape(-1, grad_output.size(-1))
        if wants_weight:
            if ctx.sequence_parallel:
                total_input = collectives.wait(total_input)
            grad_weight = tokens_of_grad.t().matmul(total_input.reshape(-1, total_input.size(-1)))
        grad_bias = tokens_of_grad.sum(dim=0) if wants_bias else None
        if sum_of_grads is not None:
            grad_input = sum_of_grads()
        return grad_input, grad_weight, grad_bias, None, None, None


class _LinearWithReduceScatter(Function):
    """Forward: product, summed over the ranks, of which each keeps its part of the sequence. Backward: all-gather.

    Kept for backward are the input and the weight, as without overlap. The output's gradient travels behind the product
    that makes the input gradient, and is kept whole until it has made the weight gradient; where the two are computed
    apart it travels for each.
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Tensor, group: ProcessGroup, overlap: Way) -> Tensor:
        ctx.save_for_backward(input_, weight)
        ctx.group, ctx.overlap = group, overlap
        return multiply_then_reduce_scatter(input_, weight, group, overlap)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input_, weight = ctx.saved_tensors
        wants_input = ctx.needs_input_grad[0] and computes("activations")
        wants_weight = ctx.needs_input_grad[1] and computes("weights")
        grad_input, grad_weight, total_grad = None, None, None
        if wants_input:
            grad_input, total_grad = gather_then_multiply(
                grad_output, weight.t(), None, ctx.group, ctx.overlap, keep=wants_weight
            )
        if wants_weight:
            if total_grad is None:
                total_grad = collectives.all_gather(grad_output, 0, ctx.group)
            tokens_of_grad = total_grad.reshape(-1, total_grad.size(-1))
            grad_weight = tokens_of_grad.t().matmul(input_.reshape(-1, input_.size(-1)))
        return grad_input, grad_weight, None, None


def linear_with_grad_accumulation_and_async_allreduce(
    input_: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sequence_parallel: bool = False,
    tp_group: ProcessGroup | None = None,
    overlap: Way | None = None,
) -> Tensor:
    """Product with a column shard of a weight: [..., k] x [n/tp, k] -> [..., n/tp].

    Forward: all-gather along dim 0 first under sequence parallelism. Backward: all-reduce of the input gradient, or
    reduce-scatter under sequence parallelism, overlapping the weight gradient. With one rank it is plain F.linear.
    `overlap`, under sequence parallelism alone, says how the all-gather overlaps with the product.
    """
    if tp_group is None or group_size(tp_group) == 1:
        return F.linear(input_, weight, bias)
    assert overlap is None or sequence_parallel, "without sequence parallelism there is no gather to overlap with"
    return _LinearWithAsyncCommunication.apply(  # type: ignore[no-any-return]
        input_, weight, bias, sequence_parallel, tp_group, overlap
    )


def linear_with_reduce_scatter(input_: Tensor, weight: Tensor, tp_group: ProcessGroup, overlap: Way) -> Tensor:
    """Product with a row shard of a weight, [s, b, k/tp] x [n, k/tp], summed over the ranks -> [s/tp, b, n].

    Forward: reduce-scatter along dim 0. Backward: all-gather. Both overlap with the product as `overlap` says.

    Raises:
        ConfigError: the sequence is not divisible by the group's size.
    """
    require_divisible(input_, 0, tp_group, "sequence length (dim 0)")
    return _LinearWithReduceScatter.apply(input_, weight, tp_group, overlap)  # type: ignore[no-any-return]
