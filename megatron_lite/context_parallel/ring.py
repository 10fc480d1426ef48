"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel round the ranks while each computes.

Forward: in step i a rank attends to the keys of rank - i, and meanwhile sends them on. Backward: the keys travel once
more, and behind them their gradients, to which each rank adds its part, until they are home. With one rank this is
attention to packed documents, without communication.

Bytes a rank sends per layer, with K = keys and values of one rank, 2 s/cp b g d numbers of w bytes:
forward (cp - 1) K w; backward (cp - 1) K w and, the gradients being float32 on their way, (cp - 1) K 4.
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
from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel.collectives import start_shift, wait


def ring_forward(
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
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        query: [s, b, n, d], s the tokens of this rank.
        key, value: [s, b, g, d].
        sinks: [n] the score of one more key of each head, whose value is zero; [0] for none.
        plan: `blocks.attention_blocks` of this rank.
        scale: factor on the scores.
        backend: one of ops.attention_block.BACKENDS.
        window: how many keys before its own a query sees; -1 for all. Others only without a ring, for one rank.
        group: the ring, in the order in which the sequence was split; None for one rank.

    Returns:
        Output [s, b, n, d], and the logarithm of the softmax's denominator [s, b, n].
    """
    running = RunningAttention(query, scale, backend, window)
    steps = group_size(group)
    # Two buffers: the keys in use, and those that arrive meanwhile.
    here = torch.stack((key, value))
    for step in range(steps):
        arriving = start_shift(here, group) if step + 1 < steps else None
        running.add(here, of_step(plan, step))
        if arriving is not None:
            here = wait(arriving)
    return running.finish(sinks)


def ring_backward(
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
    """Gradients of query [s, b, n, d], key and value [s, b, g, d], and sinks [n].

    Args:
        grad: gradient of the output, [s, b, n, d].
        out, log_sum: what ring_forward returned.
        query, key, value, sinks, plan, scale, backend, window, group: as in ring_forward.
    """
    gradient = AttentionGradient(grad, query, out, log_sum, scale, backend, window)
    steps = group_size(group)
    here = torch.stack((key, value))
    own: Tensor | None = None  # gradient of this rank's keys from its own queries
    travelling: Tensor | None = None  # on its way here: gradient of the keys in `here`, from the ranks they visited
    for step in range(steps):
        arriving = start_shift(here, group) if step + 1 < steps else None
        part = torch.zeros_like(here, dtype=gradient.grad_query.dtype)
        gradient.add(here, of_step(plan, step), part)
        if step == 0:
            own = part
        else:
            if travelling is not None:
                part += wait(travelling)
            travelling = start_shift(part, group)
        del part
        if arriving is not None:
            here = wait(arriving)
    assert own is not None
    if travelling is not None:
        own += wait(travelling)  # the last step sent each gradient to the rank behind: the keys' own
    # An operator's results must not share memory.
    grad_key, grad_value = (part.to(key.dtype, copy=True) for part in own)
    grad_sinks = gradient_of_sinks(sinks, grad, out, log_sum)
    return gradient.grad_query.to(query.dtype), grad_key, grad_value, grad_sinks
