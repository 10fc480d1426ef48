"""Self-attention: projections around the core attention, and the fused, grouped query-key-value projection."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection, group_size
from megatron_lite.tensor_parallel.layers import RowParallelLinear
from megatron_lite.tensor_parallel.random import checkpoint
from megatron_lite.transformer.attention_choices import uses_rope
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.enums import AttnMaskType
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.module import MegatronModule, tensor_parallel_group
from megatron_lite.transformer.norms import build_norm
from megatron_lite.transformer.qkv_projection import build_qkv_projection
from megatron_lite.transformer.rope import RotaryTables, apply_rotary_pos_emb
from megatron_lite.transformer.transformer_config import TransformerConfig, divisors


class Projected(NamedTuple):
    """What attention needs of a token, for this rank's heads.

    Attributes:
        query: [s, b, n, d].
        key, value: [s, b, g, d].
        gate: [s, b, n, d] what the output is multiplied with, before the sigmoid; None for no gate.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None = None


class Attention(MegatronModule):
    """What SelfAttention and MLASelfAttention share: core attention and output projection, [s, b, h] -> [s, b, h].

    Under context parallelism s counts this rank's tokens, here and everywhere in the layer.

    Args:
        config: shape, biases, init methods, recompute_modules.
        layer_number: number of the layer, counted from 1.
        attn_mask_type: as in DotProductAttention.
        cp_comm_type: as in DotProductAttention.
        pg_collection: process groups, default the global ones.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group: ProcessGroup | None = tensor_parallel_group(pg_collection)
        self.has_positions = uses_rope(config, layer_number)
        recomputed = config.recompute_modules or () if config.recompute_granularity == "selective" else ()
        self.recompute_core = "core_attn" in recomputed
        self.core_attention = DotProductAttention(
            config, layer_number, attn_mask_type, cp_comm_type=cp_comm_type, pg_collection=pg_collection
        )
        self.linear_proj = RowParallelLinear(
            config.num_attention_heads * config.value_channels,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: RotaryTables | None = None,
        inference_context: InferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            hidden_states: [s, b, h], under sequence parallelism [s/tp, b, h].
            attention_mask: None, or bool broadcastable to [b, 1, s, s], True where attention is forbidden.
            rotary_pos_emb: (cos, sin) of RotaryEmbedding for the positions of this input, or None. Layers that
                no_rope_freq leaves without positions do not read it.
            inference_context: cache to append this input's keys and values to, and to attend to.
            packed_seq_params: where the documents are in the sequences, one behind the other.

        Returns:
            [s, b, h], under sequence parallelism [s/tp, b, h].
        """
        rotary = rotary_pos_emb if self.has_positions else None
        return self.linear_proj(
            self._attend(hidden_states, attention_mask, rotary, inference_context, packed_seq_params)
        )

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        inference_context: InferenceContext | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """What the output projection reads, for this rank's heads: [s, b, h] -> [s, b, n d]."""
        raise NotImplementedError

    def _core(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        inference_context: InferenceContext | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Core attention of this rank's heads, recomputed in backward if asked for: -> [s, b, n d]."""
        if inference_context is not None:
            key, value = inference_context.append(self.layer_number, key, value)
        if self.recompute_core and self.training:
            return checkpoint(
                self.core_attention, False, query, key, value, attention_mask, None, None, packed_seq_params
            )
        return self.core_attention(query, key, value, attention_mask, packed_seq_params=packed_seq_params)


class SelfAttention(Attention):
    """Multi-head, grouped-query (g < n) and multi-query (g = 1) self-attention, [s, b, h] -> [s, b, h].

    How linear_qkv is split over ranks, qkv_projection.py says. Collectives are those of ColumnParallelLinear and
    RowParallelLinear. With attention_output_gate each channel of the output is multiplied by the sigmoid of a gate
    that linear_qkv makes beside the queries (Qiu et al. 2025, arXiv:2505.06708).

    Args:
        config: as in Attention, and qk_layernorm and attention_output_gate.
        layer_number, attn_mask_type, cp_comm_type, pg_collection: as in Attention.
        rotary_interleaved: pairing of the channels that rotary embeddings rotate.

    Raises:
        ConfigError: num_query_groups is neither a multiple nor a divisor of the tensor parallel size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        rotary_interleaved: bool = False,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        tp = group_size(tensor_parallel_group(pg_collection))
        groups, head = config.num_query_groups or config.num_attention_heads, config.kv_channels or 0
        if groups % tp and tp % groups:
            raise ConfigError(
                f"num_query_groups is {groups}, but it must be a multiple or a divisor of the tensor parallel size "
                f"({tp}), so that each rank has whole key/value heads; use a tensor parallel size among "
                f"{divisors(groups)}."
            )
        super().__init__(config, layer_number, attn_mask_type, cp_comm_type, pg_collection)
        self.head_size = head
        # With fewer groups than ranks, each rank has some of the queries of one group.
        self.query_groups_per_partition = max(groups // tp, 1)
        self.queries_per_group = config.num_attention_heads // tp // self.query_groups_per_partition
        self.rotary_interleaved = rotary_interleaved
        self.linear_qkv = build_qkv_projection(config, self.tp_group)
        self.q_layernorm = build_norm(config, head, partial_over_tp=tp > 1) if config.qk_layernorm else None
        self.k_layernorm = build_norm(config, head, partial_over_tp=tp > 1) if config.qk_layernorm else None

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        inference_context: InferenceContext | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        query, key, value, gate = self.get_query_key_value_tensors(hidden_states)
        if rotary is not None:
            query = apply_rotary_pos_emb(query, rotary, self.rotary_interleaved)
            key = apply_rotary_pos_emb(key, rotary, self.rotary_interleaved)
        context = self._core(query, key, value, attention_mask, inference_context, packed_seq_params)
        return context if gate is None else context * torch.sigmoid(gate.flatten(2))

    def get_query_key_value_tensors(self, hidden_states: Tensor) -> Projected:
        """Project and split, before rotary positions; g counts the groups of this rank."""
        queries = self.queries_per_group
        heads = [queries] * (2 if self.config.attention_output_gate else 1) + [1, 1]
        mixed = self.linear_qkv(hidden_states)
        grouped = mixed.view(*mixed.shape[:2], self.query_groups_per_partition, sum(heads), self.head_size)
        query, *gates, key, value = (x.flatten(2, 3) for x in grouped.split(heads, dim=3))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return Projected(query, key, value, gates[0] if gates else None)
