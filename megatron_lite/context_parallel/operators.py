"""Ring and gather attention as operators of torch.

A compiled layer carries each as one call, communication included, with the plan as a tensor, so that packed sequences
of another shape do not compile it again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_lite.context_parallel.all_gather import gathered_backward, gathered_forward
from megatron_lite.context_parallel.blocks import as_blocks
from megatron_lite.context_parallel.ring import ring_backward, ring_forward
from megatron_lite.process_groups import group_size


def _operator(
    name: str, forward_: Callable[..., tuple[Tensor, Tensor]], backward_: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    """A pair of functions of this package as the operator megatron_lite::`name`, with its gradient."""

    @torch.library.custom_op(f"megatron_lite::{name}", mutates_args=())
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        plan: Tensor,
        scale: float,
        backend: str,
        window: int,
        group: str,
    ) -> tuple[Tensor, Tensor]:
        return forward_(query, key, value, sinks, as_blocks(plan), scale, backend, window, _group(group))

    @torch.library.custom_op(f"megatron_lite::{name}_backward", mutates_args=())
    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        out: Tensor,
        log_sum: Tensor,
        plan: Tensor,
        scale: float,
        backend: str,
        window: int,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = (grad, query, key, value, sinks, out, log_sum)
        return backward_(*tensors, as_blocks(plan), scale, backend, window, _group(group))  # type: ignore[return-value]

    @forward.register_fake
    def _(query, key, value, sinks, plan, scale, backend, window, group):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=wide)

    @backward.register_fake
    def _(grad, query, key, value, sinks, *others):  # type: ignore[no-untyped-def]
        return tuple(x.new_empty(x.shape) for x in (query, key, value, sinks))

    def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        query, key, value, sinks, plan, *ctx.how = inputs
        ctx.save_for_backward(query, key, value, sinks, *output, plan)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
        query, key, value, sinks, *others = ctx.saved_tensors
        wanted = sinks if ctx.needs_input_grad[3] else sinks.new_empty(0)
        *grads, grad_sinks = backward(grad, query, key, value, wanted, *others, *ctx.how)
        return *grads, grad_sinks if ctx.needs_input_grad[3] else None, None, None, None, None, None

    forward.register_autograd(differentiate, setup_context=save)

    def attend(*tensors_and_settings: Any, group: ProcessGroup | None) -> Tensor:
        return forward(*tensors_and_settings, _name(group))[0]

    return attend


# (query, key, value, sinks, plan, scale, backend, window, group=...) -> [s, b, n, d], all as in ring.ring_forward, but
# the plan is a tensor (blocks.as_tensor).
ring_attention = _operator("ring_attention", ring_forward, ring_backward)
gathered_attention = _operator("gathered_attention", gathered_forward, gathered_backward)


def _name(group: ProcessGroup | None) -> str:
    """The name under which an operator finds the group again; empty for this rank alone."""
    return "" if group is None or group_size(group) == 1 else group.group_name


def _group(name: str) -> ProcessGroup | None:
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]
