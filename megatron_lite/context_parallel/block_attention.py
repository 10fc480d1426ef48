"""Running the blocks of a plan: forward into one running result, backward from the finished one."""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.context_parallel.blocks import Block
from megatron_lite.host_copies import copy_to_device
from megatron_lite.ops.attention_block import Lengths, attention_block, attention_block_backward, merge

_BLOCKS_PER_CALL = 512
"""The backward kernel's workspace has 128 rows more for each block of a call."""


class RunningAttention:
    """The attention of this rank's queries to the keys seen so far.

    Attributes:
        out: [s, b, n, d], in the queries' dtype as long as each query saw one block, then in float32 (float64).
        log_sum: [s, b, n], the logarithm of the softmax's denominator; -inf for a query that saw nothing.
    """

    def __init__(self, query: Tensor, scale: float, backend: str, window: int = -1) -> None:
        self.query, self.scale, self.backend, self.window = query, scale, backend, window
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        self.log_sum = torch.full(query.shape[:-1], -math.inf, dtype=self.wide, device=query.device)
        self.is_empty = True

    def add(self, keys_values: Tensor, blocks: list[Block]) -> None:
        """Attend to further keys and values [2, sk, b, g, d]. Each query is in one of the blocks at most."""
        key, value = keys_values
        if not self.is_empty:
            self.out = self.out.to(self.wide)
        for call in calls(blocks, self.backend, self.query.device):
            rows, columns = call.rows, call.columns
            result = attention_block(
                self.query[rows],
                key[columns],
                value[columns],
                call.causal,
                self.scale,
                self.backend,
                call.lengths,
                self.window,
            )
            if not self.is_empty:
                before = self.out[rows], self.log_sum[rows]
                merge(*before, *result)
                result = before
            self.out[rows], self.log_sum[rows] = result  # onto itself where `before` is a view: torch does nothing
        self.is_empty = False

    def finish(self, sinks: Tensor) -> tuple[Tensor, Tensor]:
        """(out in the dtype of the queries, log_sum); a query that saw nothing has zeros.

        A sink [n] is one more key whose value is zero: it takes part in the denominator only. [0] stands for none.
        """
        if sinks.numel():
            sinks = sinks.to(self.log_sum.dtype)
            self.out = self.out * (self.log_sum - sinks).sigmoid().unsqueeze(-1)
            self.log_sum = torch.logaddexp(self.log_sum, sinks)
        return self.out.to(self.query.dtype), self.log_sum


def gradient_of_sinks(sinks: Tensor, grad: Tensor, out: Tensor, log_sum: Tensor) -> Tensor:
    """The gradient of RunningAttention.finish's sinks, [n] (or [0]), given that of the output and what it returned.

    Of a softmax d score_i = p_i (d p_i - sum_j p_j d p_j), where d p = 0 for a key whose value is zero, and the sum is
    that of grad * out.
    """
    if not sinks.numel():
        return torch.zeros_like(sinks)
    wide = log_sum.dtype
    dot = (grad.to(wide) * out.to(wide)).sum(-1)
    return -((sinks.to(wide) - log_sum).exp() * dot).flatten(0, -2).sum(0).to(sinks.dtype)


class AttentionGradient:
    """The gradient of this rank's queries, gathered block by block."""

    def __init__(
        self,
        grad: Tensor,
        query: Tensor,
        out: Tensor,
        log_sum: Tensor,
        scale: float,
        backend: str,
        window: int = -1,
    ) -> None:
        self.grad, self.query, self.out, self.log_sum = grad, query, out, log_sum
        self.scale, self.backend, self.window = scale, backend, window
        self.grad_query = torch.zeros(
            query.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device
        )

    def add(self, keys_values: Tensor, blocks: list[Block], grads: Tensor) -> None:
        """Add the queries' part to `grads`, the gradient of keys and values [2, sk, b, g, d], and theirs to them."""
        key, value = keys_values
        grad_key, grad_value = grads
        for call in calls(blocks, self.backend, self.query.device):
            rows, columns = call.rows, call.columns
            dq, dk, dv = attention_block_backward(
                self.grad[rows],
                self.query[rows],
                key[columns],
                value[columns],
                self.out[rows],
                self.log_sum[rows],
                call.causal,
                self.scale,
                self.backend,
                call.lengths,
                self.window,
            )
            # No row is in two blocks of a step, neither as query nor as key.
            self.grad_query[rows] += dq
            grad_key[columns] += dk
            grad_value[columns] += dv


class Call(NamedTuple):
    """What one call of a kernel computes: one block, or several packed one behind the other.

    Attributes:
        rows, columns: of its queries and keys: a slice, or int64 indices where the blocks leave gaps.
        causal: as in Block.
        lengths: of the blocks, on the device; None for one block.
    """

    rows: slice | Tensor
    columns: slice | Tensor
    causal: bool
    lengths: Lengths | None


def calls(blocks: list[Block], backend: str, device: torch.device) -> list[Call]:
    """The calls for the blocks of one step, which all have the same `causal`.

    CUDA's kernels take many blocks at once, and the device does not wait for the host to start each.
    """
    if len(blocks) < 2 or backend not in ("flash", "cudnn"):
        return [
            Call(slice(block.q_start, block.q_end), slice(block.k_start, block.k_end), bool(block.causal), None)
            for block in blocks
        ]
    parts = (blocks[start : start + _BLOCKS_PER_CALL] for start in range(0, len(blocks), _BLOCKS_PER_CALL))
    return [_packed_call(tuple(part), device) for part in parts]


@functools.lru_cache(maxsize=64)
def _packed_call(blocks: tuple[Block, ...], device: torch.device) -> Call:
    """One call for several blocks; kept, because all layers of a micro-batch make the same."""
    queries = [(block.q_start, block.q_end) for block in blocks]
    keys = [(block.k_start, block.k_end) for block in blocks]
    lengths = Lengths(
        _cumulative(queries, device),
        _cumulative(keys, device),
        max(end - start for start, end in queries),
        max(end - start for start, end in keys),
    )
    return Call(_places(queries, device), _places(keys, device), bool(blocks[0].causal), lengths)


def _places(ranges: list[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """The rows of some ranges."""
    if all(before[1] == after[0] for before, after in itertools.pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return copy_to_device(torch.cat([torch.arange(start, end) for start, end in ranges]), device)


def _cumulative(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    """int32 [ranges + 1]: where each range begins when they lie one behind the other, and the end."""
    ends = itertools.accumulate((end - start for start, end in ranges), initial=0)
    return copy_to_device(torch.tensor(list(ends), dtype=torch.int32), device)


def of_step(plan: list[Block], step: int) -> list[Block]:
    """The blocks of one step of a plan."""
    return [block for block in plan if block.step == step]
