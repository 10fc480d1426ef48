"""Attention to the keys and values of all ranks at once, as Llama 3 does it (arXiv:2407.21783, section 3.3.2).

The blocks are those of the ring, but the keys come in one all-gather before them. Nothing overlaps, and for the time
of one layer's attention a rank holds the keys of the whole sequence; not longer, as backward gathers them again.

Bytes a rank sends per layer: those of the ring. Keys and values of one rank are K = 2 s/cp b g d numbers of w bytes;
forward (cp - 1) K w; backward (cp - 1) K w and, for the reduce-scatter of float32 gradients, (cp - 1) K 4.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.context_parallel.block_attention import (
    AttentionGradient,
    RunningAttention,
    gradient_of_sinks,
    of_step,
)
from megatron_lite.context_parallel.blocks import Block
from megatron_lite.process_groups import group_rank, group_size
from megatron_lite.tensor_parallel.collectives import all_gather, reduce_scatter


def gathered_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    plan: list[Block],
    scale: float,
    backend: str,
    window: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks; arguments and results as in ring.ring_forward."""
    running = RunningAttention(query, scale, backend, window)
    size, rank = group_size(group), group_rank(group)
    gathered = _gather(key, value, group)
    for step in range(size):
        running.add(gathered[(rank - step) % size], of_step(plan, step))
    return running.finish(sinks)


def gathered_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    out: Tensor,
    log_sum: Tensor,
    plan: list[Block],
    scale: float,
    backend: str,
    window: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks; arguments and results as in ring.ring_backward."""
    gradient = AttentionGradient(grad, query, out, log_sum, scale, backend, window)
    size, rank = group_size(group), group_rank(group)
    gathered = _gather(key, value, group)
    grads = torch.zeros_like(gathered, dtype=gradient.grad_query.dtype)
    for step in range(size):
        source = (rank - step) % size
        gradient.add(gathered[source], of_step(plan, step), grads[source])
    own = grads[0] if group is None else reduce_scatter(grads, 0, group)[0]
    # An operator's results must not share memory.
    grad_key, grad_value = (part.to(key.dtype, copy=True) for part in own)
    grad_sinks = gradient_of_sinks(sinks, grad, out, log_sum)
    return gradient.grad_query.to(query.dtype), grad_key, grad_value, grad_sinks


def _gather(key: Tensor, value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Keys and values of all ranks: [s, b, g, d] each -> [cp, 2, s, b, g, d]."""
    own = torch.stack((key, value)).unsqueeze(0)
    return own if group is None else all_gather(own, 0, group)
