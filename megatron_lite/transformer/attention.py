"""Self-attention with fused, grouped query-key-value projection."""

from torch import Tensor

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.errors import ConfigError
from megatron_lite.inference.context import InferenceContext
from megatron_lite.process_groups import ProcessGroupCollection, group_size
from megatron_lite.tensor_parallel.layers import RowParallelLinear
from megatron_lite.tensor_parallel.random import checkpoint
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.enums import AttnMaskType
from megatron_lite.transformer.module import MegatronModule, tensor_parallel_group
from megatron_lite.transformer.norms import build_norm
from megatron_lite.transformer.qkv_projection import build_qkv_projection
from megatron_lite.transformer.rope import RotaryTables, apply_rotary_pos_emb
from megatron_lite.transformer.transformer_config import TransformerConfig, divisors


class SelfAttention(MegatronModule):
    """Multi-head, grouped-query (g < n) and multi-query (g = 1) self-attention, [s, b, h] -> [s, b, h].

    Under context parallelism s counts this rank's tokens, here and everywhere in the layer.

    How linear_qkv is split over ranks, qkv_projection.py says. Collectives are those of ColumnParallelLinear and
    RowParallelLinear.

    Args:
        config: shape, biases, qk_layernorm, init methods, recompute_modules.
        layer_number: number of the layer, counted from 1.
        attn_mask_type: as in DotProductAttention.
        rotary_interleaved: pairing of the channels that rotary embeddings rotate.
        cp_comm_type: as in DotProductAttention.
        pg_collection: process groups, default the global tensor parallel group.

    Raises:
        ConfigError: num_query_groups is neither a multiple nor a divisor of the tensor parallel size.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        rotary_interleaved: bool = False,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        group = tensor_parallel_group(pg_collection)
        tp = group_size(group)
        groups, head = config.num_query_groups or config.num_attention_heads, config.kv_channels or 0
        if groups % tp and tp % groups:
            raise ConfigError(
                f"num_query_groups is {groups}, but it must be a multiple or a divisor of the tensor parallel size "
                f"({tp}), so that each rank has whole key/value heads; use a tensor parallel size among "
                f"{divisors(groups)}."
            )
        self.layer_number = layer_number
        self.head_size = head
        # With fewer groups than ranks, each rank has some of the queries of one group.
        self.query_groups_per_partition = max(groups // tp, 1)
        self.queries_per_group = config.num_attention_heads // tp // self.query_groups_per_partition
        self.rotary_interleaved = rotary_interleaved
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in (
            config.recompute_modules or ()
        )
        query_size = config.num_attention_heads * head

        self.linear_qkv = build_qkv_projection(config, group)
        self.q_layernorm = build_norm(config, head, partial_over_tp=tp > 1) if config.qk_layernorm else None
        self.k_layernorm = build_norm(config, head, partial_over_tp=tp > 1) if config.qk_layernorm else None
        self.core_attention = DotProductAttention(
            config, layer_number, attn_mask_type, cp_comm_type=cp_comm_type, pg_collection=pg_collection
        )
        self.linear_proj = RowParallelLinear(
            query_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            tp_group=group,
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
            rotary_pos_emb: (cos, sin) of RotaryEmbedding for the positions of this input, or None.
            inference_context: cache to append this input's keys and values to, and to attend to.
            packed_seq_params: where the documents are in the sequences, one behind the other.

        Returns:
            [s, b, h], under sequence parallelism [s/tp, b, h].
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None:
            query = apply_rotary_pos_emb(query, rotary_pos_emb, self.rotary_interleaved)
            key = apply_rotary_pos_emb(key, rotary_pos_emb, self.rotary_interleaved)
        query = query.flatten(2, 3)
        if inference_context is not None:
            key, value = inference_context.append(self.layer_number, key, value)
        if self.recompute_core and self.training:
            context = checkpoint(
                self.core_attention, False, query, key, value, attention_mask, None, None, packed_seq_params
            )
        else:
            context = self.core_attention(query, key, value, attention_mask, packed_seq_params=packed_seq_params)
        return self.linear_proj(context)

    def get_query_key_value_tensors(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split: [s, b, h] -> query [s, b, g, n/g, d], key [s, b, g, d], value [s, b, g, d] (local g)."""
        heads = (self.queries_per_group, 1, 1)
        mixed = self.linear_qkv(hidden_states)
        grouped = mixed.view(*mixed.shape[:2], self.query_groups_per_partition, sum(heads), self.head_size)
        query, key, value = grouped.split(heads, dim=3)
        key, value = key.squeeze(3), value.squeeze(3)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value
