"""Multi-token prediction (DeepSeek-V3, 2024, arXiv:2412.19437, section 2.2): later tokens are predicted, too."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.random import checkpoint
from megatron_lite.tensor_parallel.replicated_linear import ReplicatedLinear
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.norms import build_norm
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer


class MultiTokenPredictionLayer(MegatronModule):
    """One depth: norm(layer(W [norm(embedding of the token k further on) ; norm(hidden)])), [s, b, h] -> [s, b, h].

    W [h, 2h] is held whole by every tensor parallel rank, and applied to its own positions under sequence parallelism.

    Args:
        config: shape and numerics; the layer is like the decoder's last.
        layer_number: of the transformer layer inside, counted from 1, the decoder's layers before it.
        rotary_interleaved, pg_collection: as in TransformerLayer.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        rotary_interleaved: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.enorm = build_norm(config, config.hidden_size)
        self.hnorm = build_norm(config, config.hidden_size)
        self.eh_proj = ReplicatedLinear(2 * config.hidden_size, config.hidden_size, config=config)
        self.transformer_layer = TransformerLayer(
            config, layer_number, rotary_interleaved=rotary_interleaved, pg_collection=pg_collection
        )
        self.final_layernorm = build_norm(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, embedded: Tensor, *context: Any) -> Tensor:
        """Run one depth.

        Args:
            hidden_states: [s, b, h] of the depth before (of the decoder, behind its final norm, for the first).
            embedded: [s, b, h] embedding of the token that each position is given at this depth.
            context: what TransformerLayer.forward takes besides its input.

        Returns:
            [s, b, h] in params_dtype; under sequence parallelism all of them [s/tp, b, h].
        """
        config = self.config
        both = torch.cat((self.enorm(embedded).to(hidden_states.dtype), self.hnorm(hidden_states)), dim=-1)
        joined = self.eh_proj(both)
        joined = joined.float() if config.fp32_residual_connection else joined
        if config.recompute_granularity == "full" and self.training:
            output = checkpoint(self.transformer_layer, config.distribute_saved_activations, joined, *context)
        else:
            output = self.transformer_layer(joined, *context)
        normed: Tensor = self.final_layernorm(output)
        return normed.to(config.params_dtype)


class MultiTokenPredictionBlock(MegatronModule):
    """All depths, one behind the other; the embedding and the output layer are those of the model.

    Args:
        config: mtp_num_layers depths.
        rotary_interleaved, pg_collection: as in TransformerLayer.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        rotary_interleaved: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleDict(
            {
                str(depth): MultiTokenPredictionLayer(
                    config, config.num_layers + depth + 1, rotary_interleaved, pg_collection
                )
                for depth in range(config.mtp_num_layers or 0)
            }
        )

    def forward(
        self, hidden_states: Tensor, tokens: Tensor, embed: Callable[[Tensor], Tensor], *context: Any
    ) -> list[Tensor]:
        """Run all depths.

        Args:
            hidden_states: [s, b, h] of the decoder, behind its final norm.
            tokens: [b, s, depths] the token that each position is given at each depth.
            embed: tokens [b, s] -> [s, b, h] (sequence parallel [s/tp, b, h]).
            context: what TransformerLayer.forward takes besides its input.

        Returns:
            For each depth what the output layer reads, [s, b, h].
        """
        return list(self._depths(hidden_states, tokens, embed, context))

    def _depths(
        self, hidden: Tensor, tokens: Tensor, embed: Callable[[Tensor], Tensor], context: tuple[Any, ...]
    ) -> Iterator[Tensor]:
        for depth, layer in enumerate(self.layers.values()):
            hidden = layer(hidden, embed(tokens[..., depth]), *context)
            yield hidden
