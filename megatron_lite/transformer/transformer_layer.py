"""One pre-norm transformer layer."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.random import checkpoint, get_cuda_rng_tracker
from megatron_lite.transformer.attention import Attention, SelfAttention
from megatron_lite.transformer.fp8 import use_fp8
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.mlp import MLP
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.moe.moe_config import is_moe_layer
from megatron_lite.transformer.moe.moe_layer import MoELayer
from megatron_lite.transformer.multi_latent_attention import MLASelfAttention
from megatron_lite.transformer.norms import build_norm
from megatron_lite.transformer.rope import RotaryTables
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_engine import use_transformer_engine


def hidden_dropout(x: Tensor, probability: float, training: bool, sequence_parallel: bool) -> Tensor:
    """Dropout on [s, b, h].

    Without sequence parallelism all tensor parallel ranks hold the same x and must drop the same elements: they draw
    from the default stream, which they share. With it each rank holds other positions and draws from its own stream.
    """
    if probability == 0.0 or not training:
        return x
    if not sequence_parallel:
        return F.dropout(x, probability)
    with get_cuda_rng_tracker().fork():
        return F.dropout(x, probability)


class TransformerLayer(MegatronModule):
    """x + attention(norm(x)), then x + mlp(norm(x)); [s, b, h] -> [s, b, h].

    The mlp is an MLP, or an MoELayer where config.moe_layer_freq gives the layer experts. Recomputing "mlp" means
    that of dense layers, "moe" the whole MoE layer, router and communication included.

    Args:
        config: shape and numerics.
        layer_number: global number of the layer, counted from 1.
        hidden_dropout: default config.hidden_dropout.
        rotary_interleaved: pairing of the channels that rotary embeddings rotate, but in latent attention.
        pg_collection: process groups, default the global ones.

    Attributes:
        is_compiled: by torch, all of it or in parts (set by who compiles it).
    """

    config: TransformerConfig
    is_compiled: bool = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        rotary_interleaved: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.hidden_dropout = config.hidden_dropout if hidden_dropout is None else hidden_dropout
        recomputed = config.recompute_modules or () if config.recompute_granularity == "selective" else ()
        has_experts = is_moe_layer(config, layer_number)
        self.recompute_mlp = ("moe" if has_experts else "mlp") in recomputed
        self.recompute_layernorm = "layernorm" in recomputed
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attention: Attention = (
            MLASelfAttention(config, layer_number, pg_collection=pg_collection)
            if config.multi_latent_attention
            else SelfAttention(config, layer_number, rotary_interleaved=rotary_interleaved, pg_collection=pg_collection)
        )
        self.pre_mlp_layernorm = build_norm(config, config.hidden_size)
        self.mlp: MLP | MoELayer = (
            MoELayer(config, layer_number, pg_collection) if has_experts else MLP(config, pg_collection=pg_collection)
        )
        use_fp8(self, config, layer_number, pg_collection)
        use_transformer_engine(self, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: RotaryTables | None = None,
        inference_context: InferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: [s, b, h], under sequence parallelism [s/tp, b, h]; float32 with fp32_residual_connection.
            attention_mask: None (causal), or bool broadcastable to [b, 1, s, s], True where attention is forbidden.
            rotary_pos_emb: (cos, sin) for the positions of the whole sequence, or None.
            inference_context: key/value cache, or None.
            packed_seq_params: where the documents of a packed row are, or None.

        Returns:
            The new residual stream, shaped and typed like hidden_states.
        """
        hidden_states, normed = self.attend(
            hidden_states, attention_mask, rotary_pos_emb, inference_context, packed_seq_params
        )
        transformed = checkpoint(self.mlp, False, normed) if self.recompute_mlp and self.training else self.mlp(normed)
        return self._add(transformed, hidden_states, normed)

    def attend(self, hidden_states: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """The first half of the layer: the residual stream behind attention, and what goes into the MLP, its norm."""
        normed = self._norm(self.input_layernorm, hidden_states)
        hidden_states = self._add(self.self_attention(normed, *context), hidden_states, normed)
        return hidden_states, self._norm(self.pre_mlp_layernorm, hidden_states)

    def _norm(self, norm: MegatronModule, residual: Tensor) -> Tensor:
        normed = checkpoint(norm, False, residual) if self.recompute_layernorm and self.training else norm(residual)
        return normed.to(self.config.params_dtype) if self.config.fp32_residual_connection else normed

    def _add(self, output: Tensor, residual: Tensor, normed: Tensor) -> Tensor:
        if self.config.apply_residual_connection_post_layernorm:
            residual = normed.to(residual.dtype)
        dropped = hidden_dropout(output, self.hidden_dropout, self.training, self.config.sequence_parallel)
        return residual + dropped
