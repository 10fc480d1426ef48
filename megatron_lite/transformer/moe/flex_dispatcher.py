"""The flex dispatcher: dispatch and combine by the kernels of DeepEP (https://github.com/deepseek-ai/DeepEP).

DeepEP sends a token once to each rank that has experts for it (not once per expert), over NVLink inside a node and RDMA
between nodes. This file is written against the documentation of its `Buffer` class (docs/legacy.md there) and has not
been run: the package needs several GPUs of the Hopper generation.
"""

import importlib
import importlib.util
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.transformer.moe.moe_rules import without_flex
from megatron_lite.transformer.moe.permutation import Permutation, gather_rows, gather_slots, group_slots, sum_rows
from megatron_lite.transformer.moe.token_dispatcher import (
    Dispatched,
    DispatchState,
    TokenDispatcher,
)
from megatron_lite.transformer.transformer_config import TransformerConfig

# By name of the group. The layers share one, and it holds the group: kept alive by the dispatchers alone, both go with
# the model.
_buffers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def deep_ep_is_installed() -> bool:
    """Whether the package deep_ep can be imported."""
    return importlib.util.find_spec("deep_ep") is not None


def _buffer_of(group: ProcessGroup, hidden_bytes: int) -> Any:
    """The communication buffer of a group, made once, and anew when rows grow."""
    buffer_class = importlib.import_module("deep_ep").Buffer
    ranks = group.size()
    hints = (buffer_class.get_dispatch_config(ranks), buffer_class.get_combine_config(ranks))
    nvlink_bytes = max(hint.get_nvl_buffer_size_hint(hidden_bytes, ranks) for hint in hints)
    rdma_bytes = max(hint.get_rdma_buffer_size_hint(hidden_bytes, ranks) for hint in hints)
    buffer = _buffers.get(group.group_name)
    if (
        buffer is None
        or buffer.group is not group
        or buffer.num_nvl_bytes < nvlink_bytes
        or buffer.num_rdma_bytes < rdma_bytes
    ):
        buffer = _buffers[group.group_name] = buffer_class(group, nvlink_bytes, rdma_bytes)
    return buffer


class _Dispatch(Function):
    """Forward: a token goes once to each rank that has experts for it. Backward: combine, a sum over those ranks."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probs: Tensor, destinations: Tensor, num_destinations: int, buffer: Any
    ) -> tuple[Tensor, Tensor, Tensor, list[int], Any]:
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(destinations, num_destinations)
        rows, local_experts, row_probs, counts, handle, _ = buffer.dispatch(
            tokens,
            topk_idx=destinations,
            topk_weights=probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(local_experts)
        return rows, row_probs, local_experts, counts, handle

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_probs: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None, None]:
        tokens, probs, _ = ctx.buffer.combine(
            grad_rows.contiguous(), ctx.handle, topk_weights=grad_probs.float().contiguous()
        )
        return tokens, probs, None, None, None


class _Combine(Function):
    """Forward: the sum of a token's results over the ranks it went to. Backward: dispatch along the same ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, buffer: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(rows.contiguous(), handle)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


@dataclass(frozen=True)
class FlexState(DispatchState):
    """What DeepEP needs to find the ways back: its handle and its buffer."""

    handle: Any = None
    buffer: Any = None


class FlexTokenDispatcher(TokenDispatcher):
    """AlltoAllTokenDispatcher's contract by DeepEP's kernels; bfloat16 tokens on Hopper GPUs. Not run here yet.

    With one rank there is nothing to send and the package is not needed.

    Raises:
        ConfigError: deep_ep is not installed and there are several ranks, or padding to capacity is asked for.
    """

    def __init__(
        self, config: TransformerConfig, num_local_experts: int, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config, num_local_experts, pg_collection)
        self._buffer: Any = None
        if self.size > 1 and not deep_ep_is_installed():
            raise ConfigError(
                "moe_token_dispatcher_type is flex, which needs the package deep_ep (DeepEP), but it is not installed; "
                "build it from https://github.com/deepseek-ai/DeepEP on the GPU machine, or write "
                f"{without_flex(config)}."
            )
        if config.moe_pad_expert_input_to_capacity:
            raise ConfigError(
                "moe_pad_expert_input_to_capacity is on, but flex sends no padding; leave it out, or write "
                f"{without_flex(config)}."
            )

    def _dispatch(self, tokens: Tensor, probs: Tensor, indices: Tensor, capacity: int | None) -> Dispatched:
        assert self.group is not None, "several ranks are in a group"
        buffer = self._buffer = _buffer_of(self.group, tokens.size(1) * max(tokens.element_size(), 2))
        # To DeepEP each copy of an expert, one for each expert tensor parallel rank, is an expert of its own.
        destinations = self._destinations(indices)
        destinations = torch.where(destinations == self.size * self.num_local_experts, -1, destinations)
        copies = probs[:, :, None].expand(-1, -1, self.etp_size).flatten(1).float()
        received, received_probs, local_experts, counts, handle = _Dispatch.apply(
            tokens, copies, destinations.view(copies.shape), self.size * self.num_local_experts, buffer
        )
        keys = torch.where(local_experts >= 0, local_experts, self.num_local_experts).flatten()
        slots, tokens_per_expert = group_slots(keys, self.num_local_experts)
        num_rows, width = local_experts.shape
        sent = Permutation.from_slots(slots[: sum(counts)], num_rows, width, idle_slots=True)
        state = FlexState(sent, handle=handle, buffer=buffer)
        return gather_rows(received, sent), gather_slots(received_probs, sent), tokens_per_expert, state

    def combine(self, rows: Tensor, state: DispatchState) -> Tensor:
        """Sum a token's results on each rank, then over the ranks: [m, h] -> [t, h]."""
        out = sum_rows(rows, state.sent)
        return _Combine.apply(out, state.handle, state.buffer) if isinstance(state, FlexState) else out
