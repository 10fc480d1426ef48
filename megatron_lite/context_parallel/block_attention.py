"""Running the blocks of a plan: forward into one running result, backward from the finished one."""

import math

import torch
from torch import Tensor

from megatron_lite.context_parallel.blocks import Block
from megatron_lite.ops.attention_block import attention_block, attention_block_backward, merge


class RunningAttention:
    """The attention of this rank's queries to the keys seen so far.

    Attributes:
        out: [s, b, n, d], in float32 (float64 for float64) while blocks are still added.
        log_sum: [s, b, n], the logarithm of the softmax's denominator; -inf for a query that saw nothing.
    """

    def __init__(self, query: Tensor, scale: float, backend: str) -> None:
        self.query, self.scale, self.backend = query, scale, backend
        wide = torch.promote_types(query.dtype, torch.float32)
        self.out = torch.zeros(query.shape, dtype=wide, device=query.device)
        self.log_sum = torch.full(query.shape[:-1], -math.inf, dtype=wide, device=query.device)
        self.is_empty = True

    def add(self, keys_values: Tensor, blocks: list[Block]) -> None:
        """Attend to further keys and values [2, sk, b, g, d]. Each query is in one of the blocks at most."""
        key, value = keys_values
        for block in blocks:
            rows, columns = slice(block.q_start, block.q_end), slice(block.k_start, block.k_end)
            result = attention_block(
                self.query[rows], key[columns], value[columns], bool(block.causal), self.scale, self.backend
            )
            if self.is_empty:
                self.out[rows], self.log_sum[rows] = result
            else:
                merge(self.out[rows], self.log_sum[rows], *result)
        self.is_empty = False

    def finish(self) -> tuple[Tensor, Tensor]:
        """(out in the dtype of the queries, log_sum); a query that saw nothing has zeros."""
        return self.out.to(self.query.dtype), self.log_sum


class AttentionGradient:
    """The gradient of this rank's queries, gathered block by block."""

    def __init__(self, grad: Tensor, query: Tensor, out: Tensor, log_sum: Tensor, scale: float, backend: str) -> None:
        self.grad, self.query, self.out, self.log_sum = grad, query, out, log_sum
        self.scale, self.backend = scale, backend
        self.grad_query = torch.zeros(
            query.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device
        )

    def add(self, keys_values: Tensor, blocks: list[Block], grads: Tensor) -> None:
        """Add the queries' part to `grads`, the gradient of keys and values [2, sk, b, g, d], and theirs to them."""
        key, value = keys_values
        for block in blocks:
            rows, columns = slice(block.q_start, block.q_end), slice(block.k_start, block.k_end)
            dq, dk, dv = attention_block_backward(
                self.grad[rows],
                self.query[rows],
                key[columns],
                value[columns],
                self.out[rows],
                self.log_sum[rows],
                bool(block.causal),
                self.scale,
                self.backend,
            )
            self.grad_query[rows] += dq
            grads[0, columns] += dk
            grads[1, columns] += dv


def of_step(plan: list[Block], step: int) -> list[Block]:
    """The blocks of one step of a plan."""
    return [block for block in plan if block.step == step]
