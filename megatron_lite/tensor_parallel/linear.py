"""The matrix product of the column-parallel layer, with communication hidden behind the weight gradient."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel import collectives


class _LinearWithAsyncCommunication(Function):
    """Forward: (all-gather along the sequence,) product. Backward: input gradient summed over the ranks.

    Only the local part of a split sequence is kept for backward: it is gathered again while the input gradient is
    computed. The sum of the input gradients (all-reduce, or reduce-scatter along the sequence) travels while the weight
    gradient is computed (Korthikanti et al. 2022, section 4.2.2).
    """

    @staticmethod
    def forward(
        ctx: Any, input_: Tensor, weight: Tensor, bias: Tensor | None, sequence_parallel: bool, group: ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(input_, weight)
        ctx.sequence_parallel, ctx.group, ctx.has_bias = sequence_parallel, group, bias is not None
        total_input = collectives.all_gather(input_, 0, group) if sequence_parallel else input_
        return F.linear(total_input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        input_, weight = ctx.saved_tensors
        group: ProcessGroup = ctx.group
        wants_input, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wants_bias = ctx.has_bias and ctx.needs_input_grad[2]
        total_input, sum_of_grads, grad_weight = input_, None, None
        if ctx.sequence_parallel and wants_weight:
            total_input = collectives.start_all_gather(input_, group)
        if wants_input:
            partial = grad_output.matmul(weight)
            start = collectives.start_reduce_scatter if ctx.sequence_parallel else collectives.start_all_reduce
            sum_of_grads = start(partial, group)
        tokens_of_grad = grad_output.reshape(-1, grad_output.size(-1))
        if wants_weight:
            if ctx.sequence_parallel:
                total_input = collectives.wait(total_input)
            grad_weight = tokens_of_grad.t().matmul(total_input.reshape(-1, total_input.size(-1)))
        grad_bias = tokens_of_grad.sum(dim=0) if wants_bias else None
        grad_input = None if sum_of_grads is None else sum_of_grads()
        return grad_input, grad_weight, grad_bias, None, None


def linear_with_grad_accumulation_and_async_allreduce(
    input_: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sequence_parallel: bool = False,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Product with a column shard of a weight: [..., k] x [n/tp, k] -> [..., n/tp].

    Forward: all-gather along dim 0 first under sequence parallelism. Backward: all-reduce of the input gradient, or
    reduce-scatter under sequence parallelism, overlapping the weight gradient. With one rank it is plain F.linear.
    """
    if tp_group is None or group_size(tp_group) == 1:
        return F.linear(input_, weight, bias)
    return _LinearWithAsyncCommunication.apply(input_, weight, bias, sequence_parallel, tp_group)  # type: ignore[no-any-return]
