"""A stack of transformer layers, with the recomputation of whole layers, or their activations on the host."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.random import checkpoint
from megatron_lite.transformer.activation_offload import run_offloaded
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.norms import build_norm
from megatron_lite.transformer.rope import RotaryTables
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer


class TransformerBlock(MegatronModule):
    """Layers and, behind the last, the final norm; [s, b, h] -> [s, b, h].

    Args:
        config: shape, numerics, recomputation and offloading.
        layer_indices: global indices, from 0, of the layers held here; default all config.num_layers. They name the
            parameters (`layers.{index}`), so that a checkpoint does not depend on who holds which layer.
        post_layer_norm: the stack ends with a norm.
        post_process: this is the end of the model, where that norm stands.
        rotary_interleaved: pairing of the channels that rotary embeddings rotate.
        pg_collection: process groups, default the global ones.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        layer_indices: Sequence[int] | None = None,
        post_layer_norm: bool = True,
        post_process: bool = True,
        rotary_interleaved: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        indices = range(config.num_layers) if layer_indices is None else layer_indices
        self.layers = torch.nn.ModuleDict(
            {
                str(index): TransformerLayer(
                    config, index + 1, rotary_interleaved=rotary_interleaved, pg_collection=pg_collection
                )
                for index in indices
            }
        )
        self.final_layernorm = build_norm(config, config.hidden_size) if post_layer_norm and post_process else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: RotaryTables | None = None,
        inference_context: InferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Run the layers held here; arguments as in TransformerLayer.forward.

        Returns:
            [s, b, h] (under sequence parallelism [s/tp, b, h]), normalized if this is the end of the model.
        """
        context = (attention_mask, rotary_pos_emb, inference_context, packed_seq_params)
        offloaded = self.config.cpu_offloading_num_layers if self.training and torch.is_grad_enabled() else 0
        for layers, recomputed in self._chunks():
            if offloaded:
                hidden_states = run_offloaded(layers, offloaded, hidden_states, *context)
            elif recomputed:
                distribute = self.config.distribute_saved_activations
                hidden_states = checkpoint(_run, distribute, hidden_states, layers, *context)
            else:
                hidden_states = _run(hidden_states, layers, *context)
        if self.final_layernorm is None:
            return hidden_states
        normed = self.final_layernorm(hidden_states)
        return normed.to(self.config.params_dtype) if self.config.fp32_residual_connection else normed

    def _chunks(self) -> list[tuple[list[torch.nn.Module], bool]]:
        """Runs of consecutive layers, each with whether only its input is stored and the rest recomputed."""
        layers, size = list(self.layers.values()), self.config.recompute_num_layers or 1
        if not self.training or self.config.recompute_granularity != "full":
            return [(layers, False)]
        if self.config.recompute_method == "uniform":
            return [(layers[start : start + size], True) for start in range(0, len(layers), size)]
        return [([layer], True) for layer in layers[:size]] + [(layers[size:], False)]


def _run(hidden_states: Tensor, layers: Sequence[torch.nn.Module], *context: Any) -> Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, *context)
    return hidden_states
