"""Attention between context parallel ranks: by ring, by gathering, by all-to-all, or by all-to-all inside a ring."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.context_parallel.blocks import as_tensor, attention_blocks
from megatron_lite.context_parallel.operators import gathered_attention, ring_attention
from megatron_lite.context_parallel.packed_seq_params import PackedSeqParams
from megatron_lite.context_parallel.sharding import SequenceLayout
from megatron_lite.context_parallel.ulysses import gather_heads, order_of_group, scatter_heads
from megatron_lite.errors import ConfigError
from megatron_lite.model_parallel_config import CP_COMM_TYPES
from megatron_lite.process_groups import ProcessGroupCollection, group_rank, group_size


@dataclass(frozen=True)
class ContextParallelism:
    """How the ranks that share a sequence attend to each other's tokens.

    The ranks form a grid: neighbours of `heads_group` exchange tokens for heads (ulysses.py), and the ranks of
    `keys_group`, each of which then has a part of the sequence and some heads, exchange keys and values. One of the
    two is trivial except for a2a+p2p.

    Attributes:
        comm_type: one of CP_COMM_TYPES.
        heads_group: ranks between which heads are divided; None for this rank alone.
        keys_group: ranks that exchange keys and values; None for this rank alone.
    """

    comm_type: str = "p2p"
    heads_group: ProcessGroup | None = None
    keys_group: ProcessGroup | None = None

    @classmethod
    def of(cls, comm_type: str, groups: ProcessGroupCollection) -> "ContextParallelism":
        """The groups of a type of communication.

        Raises:
            ConfigError: an unknown type, or a2a+p2p without two levels of hierarchical groups.
        """
        if comm_type not in CP_COMM_TYPES:
            raise ConfigError(f"cp_comm_type is {comm_type!r}, but it must be one of {', '.join(CP_COMM_TYPES)}.")
        if group_size(groups.cp) == 1:
            return cls(comm_type)
        if comm_type == "a2a":
            return cls(comm_type, heads_group=groups.cp)
        if comm_type != "a2a+p2p":
            return cls(comm_type, keys_group=groups.cp)
        if groups.hcp is None or len(groups.hcp) != 2:
            raise ConfigError(
                "cp_comm_type is 'a2a+p2p', but there are no two levels of context parallel groups; give "
                "hierarchical_context_parallel_sizes: the ranks of the all-to-all, and of the ring."
            )
        return cls(comm_type, heads_group=groups.hcp[0], keys_group=groups.hcp[1])

    @property
    def size(self) -> int:
        """Ranks that share a sequence."""
        return group_size(self.heads_group) * group_size(self.keys_group)

    def sees_whole_sequences(self) -> bool:
        """Whether each rank, once heads are exchanged, has all tokens of its heads."""
        return group_size(self.keys_group) == 1

    def plan(self, length: int, packed: PackedSeqParams | None, causal: bool) -> Tensor:
        """The blocks this rank computes (blocks.as_tensor) of whole rows of `length` tokens."""
        place = group_size(self.keys_group), group_rank(self.keys_group), causal
        return _plan_of_one_document(length, *place) if packed is None else packed.plan(*place)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedSeqParams | None,
        causal: bool,
        scale: float,
        backend: str,
        attend_whole: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None,
        sinks: Tensor | None = None,
        window: int = -1,
    ) -> Tensor:
        """Attention over the whole sequence, of which this rank has every cp-th part.

        Args:
            query: [s, b, n, d], s the tokens of this rank; packed rows have b = 1.
            key, value: [s, b, g, d].
            packed: where the documents are; None for plain sequences.
            causal: tokens see no later ones.
            scale: factor on the scores.
            backend: one of ops.attention_block.BACKENDS.
            attend_whole: attention [s', b, n', d] -> [s', b, n', d] to be used instead of blocks where this rank has
                whole sequences; it is given query, key, value and sinks, and cares for documents itself.
            sinks: [n] the score of one more key of each head, whose value is zero; None for none.
            window: how many tokens before it each sees, -1 for all; others where this rank has whole sequences only.

        Returns:
            [s, b, n, d]; zeros for padding.

        Raises:
            ConfigError: heads that the ranks cannot divide.
        """
        length = query.size(0) * self.size
        stretches = (0, length) if packed is None else packed.layout.stretches
        first = group_rank(self.keys_group) * group_size(self.heads_group)
        ranks = range(first, first + group_size(self.heads_group))
        order = order_of_group(stretches, self.size, ranks, query.device) if len(ranks) > 1 else None
        query, key, value = scatter_heads(query, key, value, order, self.heads_group)
        if sinks is not None:
            # Those of the heads this rank has now; their gradient is its part of the sum over the ranks.
            sinks = sinks.chunk(len(ranks))[group_rank(self.heads_group)]
        if attend_whole is not None and self.sees_whole_sequences():
            out = attend_whole(query, key, value, sinks)
        else:
            operator = gathered_attention if self.comm_type == "all_gather" else ring_attention
            plan = self.plan(length, packed, causal)
            sinks = query.new_empty(0) if sinks is None else sinks
            out = operator(query, key, value, sinks, plan, scale, backend, window, group=self.keys_group)
        return gather_heads(out, order, self.heads_group)


@torch.compiler.assume_constant_result
def _plan_of_one_document(length: int, size: int, rank: int, causal: bool) -> Tensor:
    return as_tensor(attention_blocks(SequenceLayout.whole(length), size, rank, causal))
