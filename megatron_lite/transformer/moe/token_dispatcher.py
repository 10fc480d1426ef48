"""Token dispatchers: how tokens reach the ranks of their experts, and how the results come back.

    rows, row_probs, tokens_per_expert, state = dispatcher.dispatch(tokens, probs, indices)
    out = dispatcher.combine(experts(rows, row_probs, tokens_per_expert), state)

Every rank brings its own t tokens of width h, each with k choices among E experts. Tokens travel inside one group of
S = EP * ETP ranks, each of which holds E/EP experts, and of those 1/ETP of the columns. So a token goes to all ETP
ranks that share its expert, and their partial results are summed on the way back. Rows are ordered by expert, then by
the rank they come from, then by token: the same order in every dispatcher.

Bytes one rank sends per layer, with e bytes per number of a token and p per probability (float32: 4):

- allgather, forward: (S - 1) t (2 h e + k p + 4 k): all-gather of tokens, probabilities and int32 indices,
  reduce-scatter of the results. Backward: (S - 1) t (2 h e + k p).
- alltoall, with a the rows this rank sends to others and b those it receives from others (a averages, at balance,
  t k ETP (S - 1) / S over the ranks, as b does): forward a (h e + p) + b h e + 8 (S - 1) E/EP, the last being the
  counts (absent with padding to capacity); backward a h e + b (h e + p).

So allgather sends less when k ETP > S, about. The host waits for the device once a layer, to learn how many rows there
are, and not even that where shapes tell: with EP = 1 and nothing dropped, with S = 1, and with padding to capacity.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection, group_rank, group_size
from megatron_lite.tensor_parallel import collectives
from megatron_lite.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron_lite.transformer.moe.capacity import expert_capacity, pairs_within_capacity
from megatron_lite.transformer.moe.permutation import (
    Permutation,
    gather_rows,
    gather_slots,
    group_slots,
    pad_groups,
    sum_rows,
)
from megatron_lite.transformer.transformer_config import TransformerConfig

Dispatched = tuple[Tensor, Tensor, Tensor, "DispatchState"]


@dataclass(frozen=True)
class DispatchState:
    """What combine needs to undo a dispatch.

    Attributes:
        sent: from this rank's tokens (allgather: from all tokens) to the rows that leave (that are kept).
        received: from the rows that arrive to their order by expert; None if they have it.
        sent_counts: rows sent to each rank; None if nothing travels by all-to-all.
        received_counts: rows received from each rank.
        num_dropped: 0-dim, pairs of this rank's tokens beyond the experts' capacity; None without a capacity.
    """

    sent: Permutation
    received: Permutation | None = None
    sent_counts: list[int] | None = None
    received_counts: list[int] | None = None
    num_dropped: Tensor | None = None


def _stride(group: ProcessGroup | None, outer: ProcessGroup | None) -> int:
    """How far apart, in `outer`, neighbours of `group` are: the order of the ranks' axes is the user's choice."""
    if group is None or outer is None or group_size(group) == 1:
        return 0
    ranks, outer_ranks = dist.get_process_group_ranks(group), dist.get_process_group_ranks(outer)
    return outer_ranks.index(ranks[1]) - outer_ranks.index(ranks[0])


class TokenDispatcher(ABC):
    """What the dispatchers share: who holds which expert, and what does not fit into the experts' capacity.

    Args:
        config: capacity and drop policy.
        num_local_experts: experts of this rank, E/EP.
        pg_collection: process groups, default the global ones; ep, expt_tp and tp_ep are used.
    """

    def __init__(
        self, config: TransformerConfig, num_local_experts: int, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["ep", "expt_tp", "tp_ep"])
        self.config = config
        self.pads = config.moe_pad_expert_input_to_capacity
        self.num_local_experts = num_local_experts
        self.group: ProcessGroup | None = groups.tp_ep
        self.size = group_size(self.group)
        self.ep_size, self.ep_rank = group_size(groups.ep), group_rank(groups.ep)
        self.etp_size = group_size(groups.expt_tp)
        self.num_experts = num_local_experts * self.ep_size
        assert self.ep_size * self.etp_size == self.size, "tp_ep joins the ranks of ep and of expt_tp"
        self.ep_stride, self.etp_stride = _stride(groups.ep, self.group), _stride(groups.expt_tp, self.group)

    def dispatch(self, tokens: Tensor, probs: Tensor, indices: Tensor) -> Dispatched:
        """Bring each token to the ranks of its experts.

        Args:
            tokens: [t, h], this rank's own; every rank of the group brings as many.
            probs: [t, k] weights of the chosen experts.
            indices: int64 [t, k] the chosen experts, all different for one token.

        Returns:
            rows: [m, h], ordered by local expert, then by source rank, then by token.
            row_probs: [m].
            tokens_per_expert: int64 [E/EP], on the device; its sum is m.
            state: for combine.
        """
        dispatch = self._dispatch_here if self.size == 1 else self._dispatch
        factor, (num_tokens, topk) = self.config.moe_expert_capacity_factor, indices.shape
        if factor is None:
            return dispatch(tokens, probs, indices, None)
        capacity = expert_capacity(num_tokens, topk, self.num_experts, factor)
        policy = self.config.moe_token_drop_policy
        kept = pairs_within_capacity(probs, indices, self.num_experts, capacity, policy)
        probs, indices = torch.where(kept, probs, 0.0), torch.where(kept, indices, self.num_experts)
        rows, row_probs, tokens_per_expert, state = dispatch(tokens, probs, indices, capacity)
        return rows, row_probs, tokens_per_expert, replace(state, num_dropped=kept.numel() - kept.sum())

    @abstractmethod
    def _dispatch(self, tokens: Tensor, probs: Tensor, indices: Tensor, capacity: int | None) -> Dispatched:
        """Dispatch over several ranks; dropped pairs have probability 0 and index E."""

    @abstractmethod
    def combine(self, rows: Tensor, state: DispatchState) -> Tensor:
        """Bring the experts' results back, [m, h] -> [t, h], summed over choices and expert tensor parallel ranks."""

    def _dispatch_here(self, tokens: Tensor, probs: Tensor, indices: Tensor, capacity: int | None) -> Dispatched:
        """Dispatch without communication. All sizes come from shapes, so that the host waits for nothing."""
        num_tokens, topk = indices.shape
        slots, counts = group_slots(indices.flatten(), self.num_experts)
        if capacity is not None and self.pads:
            slots, counts = pad_groups(slots, counts, capacity), torch.full_like(counts, capacity)
        elif capacity is not None:
            # Only the device knows how many pairs were dropped. The rows they leave over stay empty and go to the last
            # expert, so that the number of rows does not depend on the data.
            slots = slots[: self.num_experts * capacity]
            kept = counts.sum()
            slots = torch.where(torch.arange(slots.numel(), device=slots.device) < kept, slots, indices.numel())
            counts[-1] += slots.numel() - kept
        drops = capacity is not None
        sent = Permutation.from_slots(slots, num_tokens, topk, empty_rows=drops, idle_slots=drops)
        return gather_rows(tokens, sent), gather_slots(probs, sent), counts, DispatchState(sent)

    def _destinations(self, indices: Tensor) -> Tensor:
        """Where each slot (token, choice, copy) goes: rank * E/EP + local expert, [t k ETP]; S * E/EP is nowhere."""
        copies = torch.arange(self.etp_size, device=indices.device)
        indices = indices[:, :, None]
        ep_rank, expert = indices // self.num_local_experts, indices % self.num_local_experts
        destinations = (ep_rank * self.ep_stride + copies * self.etp_stride) * self.num_local_experts + expert
        dropped = indices == self.num_experts
        return torch.where(dropped, self.size * self.num_local_experts, destinations).flatten()


class AllGatherTokenDispatcher(TokenDispatcher):
    """Every rank gets all tokens of the group and picks those of its experts. Simple, and good for a small group."""

    def _dispatch(self, tokens: Tensor, probs: Tensor, indices: Tensor, capacity: int | None) -> Dispatched:
        assert self.group is not None, "several ranks are in a group"
        (num_tokens, topk), local = indices.shape, self.num_local_experts
        tokens = gather_from_sequence_parallel_region(tokens, group=self.group)
        probs = gather_from_sequence_parallel_region(probs, group=self.group)
        indices = collectives.all_gather(indices.to(torch.int32), 0, self.group)
        experts = indices - self.ep_rank * local
        keys = torch.where((experts >= 0) & (experts < local), experts, local).flatten()
        if capacity is not None and self.pads:
            # Each source rank fills its own rows of an expert, as if they had travelled.
            source = torch.arange(keys.numel(), device=keys.device) // (num_tokens * topk)
            keys = torch.where(keys < local, keys * self.size + source, local * self.size)
            slots, counts = group_slots(keys, local * self.size)
            slots, counts = pad_groups(slots, counts, capacity), counts.new_full((local,), capacity * self.size)
        else:
            slots, counts = group_slots(keys, local)
            if self.ep_size > 1 or capacity is not None:
                slots = slots[: int(counts.sum())]  # the one wait of the host
        sent = Permutation.from_slots(
            slots,
            num_tokens * self.size,
            topk,
            empty_rows=self.pads,
            idle_slots=self.ep_size > 1 or capacity is not None,
        )
        return gather_rows(tokens, sent), gather_slots(probs, sent), counts, DispatchState(sent)

    def combine(self, rows: Tensor, state: DispatchState) -> Tensor:
        """Sum on this rank what its experts made of each token of the group, then reduce-scatter: [m, h] -> [t, h]."""
        out = sum_rows(rows, state.sent)
        return out if self.size == 1 else reduce_scatter_to_sequence_parallel_region(out, self.group)


class AlltoAllTokenDispatcher(TokenDispatcher):
    """Each row travels to the ranks of its expert, and its result back, by an uneven all-to-all."""

    def _dispatch(self, tokens: Tensor, probs: Tensor, indices: Tensor, capacity: int | None) -> Dispatched:
        (num_tokens, topk), local = indices.shape, self.num_local_experts
        slots, counts = group_slots(self._destinations(indices), self.size * local)
        if capacity is not None and self.pads:
            slots, counts = pad_groups(slots, counts, capacity), torch.full_like(counts, capacity)
            counts_received = counts.view(self.size, local)
            sent_counts = received_counts = [local * capacity] * self.size
        else:
            counts_received, sent_counts, received_counts = self._exchange_counts(
                counts.view(self.size, local), indices.numel() if capacity is None else None
            )
            slots = slots[: sum(sent_counts)]
        sent = Permutation.from_slots(
            slots, num_tokens, topk * self.etp_size, empty_rows=self.pads, idle_slots=capacity is not None
        )
        received = self._order_of_experts(counts_received, sum(received_counts))
        state = DispatchState(sent, received, sent_counts, received_counts)
        rows = all_to_all(self.group, gather_rows(tokens, sent), received_counts, sent_counts)
        copies = probs[:, :, None].expand(-1, -1, self.etp_size)
        row_probs = all_to_all(self.group, gather_slots(copies, sent), received_counts, sent_counts)
        if received is not None:
            rows, row_probs = gather_rows(rows, received), gather_slots(row_probs, received)
        return rows, row_probs, counts_received.sum(0), state

    def combine(self, rows: Tensor, state: DispatchState) -> Tensor:
        """Send the results back to where the tokens came from, and sum them there: [m, h] -> [t, h]."""
        if state.received is not None:
            rows = sum_rows(rows, state.received)
        if state.sent_counts is not None:
            rows = all_to_all(self.group, rows, state.sent_counts, state.received_counts)
        return sum_rows(rows, state.sent)

    def _exchange_counts(self, counts: Tensor, pairs: int | None) -> tuple[Tensor, list[int], list[int]]:
        """Tell each rank how many rows come to each of its experts.

        Args:
            counts: int64 [S, E/EP], rows that go to each rank and its experts.
            pairs: t k if none is dropped, else None.

        Returns:
            Rows that come from each rank to each own expert [S, E/EP]; on the host, rows sent to and received from
            each rank.
        """
        assert self.group is not None, "several ranks are in a group"
        ones = [1] * self.size
        received = collectives.all_to_all(counts, ones, ones, self.group)
        if self.ep_size == 1 and pairs is not None:
            return received, [pairs] * self.size, [pairs] * self.size
        # The one wait of the host.
        sent_counts, received_counts = torch.stack([counts.sum(1), received.sum(1)]).tolist()
        return received, sent_counts, received_counts

    def _order_of_experts(self, counts: Tensor, num_rows: int) -> Permutation | None:
        """From rows by (source, expert), `counts` [S, E/EP] of each, to (expert, source); None if that is the same."""
        if self.num_local_experts == 1:
            return None
        experts = torch.arange(self.num_local_experts, device=counts.device).repeat(self.size)
        expert_of_row = experts.repeat_interleave(counts.flatten(), output_size=num_rows)
        order, _ = group_slots(expert_of_row, self.num_local_experts)
        return Permutation.from_slots(order, num_rows, 1)


def build_token_dispatcher(
    config: TransformerConfig, num_local_experts: int, pg_collection: ProcessGroupCollection | None = None
) -> TokenDispatcher:
    """The dispatcher that config.moe_token_dispatcher_type names.

    Raises:
        ConfigError: flex without the package behind it.
    """
    from megatron_lite.transformer.moe.flex_dispatcher import FlexTokenDispatcher  # it extends the classes above

    kinds: dict[str, type[TokenDispatcher]] = {
        "allgather": AllGatherTokenDispatcher,
        "alltoall": AlltoAllTokenDispatcher,
        "flex": FlexTokenDispatcher,
    }
    kind = config.moe_token_dispatcher_type
    if kind not in kinds:
        raise ConfigError(f"moe_token_dispatcher_type is {kind!r}, but it must be one of {', '.join(kinds)}.")
    return kinds[kind](config, num_local_experts, pg_collection)
