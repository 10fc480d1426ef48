"""The embedding of tokens and, for learned positions, of their positions."""

import torch
from torch import Tensor

from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.layers import VocabParallelEmbedding, look_up
from megatron_lite.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron_lite.tensor_parallel.parameters import create_parameter, local
from megatron_lite.transformer.module import MegatronModule, tensor_parallel_group
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import hidden_dropout


class PositionEmbedding(MegatronModule):
    """A learned vector per position, replicated: positions [...] -> [..., h]."""

    config: TransformerConfig
    weight: torch.nn.Parameter

    def __init__(self, config: TransformerConfig, max_sequence_length: int) -> None:
        super().__init__(config)
        assert config.embedding_init_method is not None, "TransformerConfig derives embedding_init_method"
        create_parameter(
            self,
            "weight",
            (max_sequence_length, config.hidden_size),
            init_method=config.embedding_init_method,
            dtype=config.main_params_dtype,
        )

    def forward(self, position_ids: Tensor) -> Tensor:
        """Look the positions up: [...] -> [..., h]."""
        return look_up(position_ids, local(self.weight))


class LanguageModelEmbedding(MegatronModule):
    """Word plus position embeddings, [b, s] -> [s, b, h], under sequence parallelism [s/tp, b, h].

    Forward: an all-reduce of the word embeddings over TP; under sequence parallelism a reduce-scatter, or, with learned
    positions, an all-reduce and then the split. So the positions are added to whole sequences and the gradient of
    their table is complete on every rank. Backward: the mirror image.

    Args:
        config: width, init method, hidden_dropout, sequence_parallel.
        vocab_size: padded size of the vocabulary.
        max_sequence_length: number of learned positions.
        position_embedding_type: "learned_absolute" adds a learned table; all others add nothing here.
        pg_collection: process groups, default the global ones.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        position_embedding_type: str = "learned_absolute",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.tp_group = tensor_parallel_group(pg_collection)
        has_positions = position_embedding_type == "learned_absolute"
        self.scatters_words = config.sequence_parallel and not has_positions
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            config.hidden_size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=self.scatters_words,
            config=config,
            tp_group=self.tp_group,
        )
        self.position_embeddings = PositionEmbedding(config, max_sequence_length) if has_positions else None

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Tokens and positions [b, s] -> [s, b, h] (sequence parallel [s/tp, b, h]), in float32 for that residual."""
        # Looking up transposed ids gives [s, b, h] without a transposition of the embeddings.
        embedded = self.word_embeddings(input_ids if self.scatters_words else input_ids.t())
        if self.position_embeddings is not None:
            embedded = embedded + self.position_embeddings(position_ids.t())
            if self.config.sequence_parallel:
                embedded = scatter_to_sequence_parallel_region(embedded, self.tp_group)
        embedded = embedded.to(torch.float32 if self.config.fp32_residual_connection else self.config.params_dtype)
        return hidden_dropout(embedded, self.config.hidden_dropout, self.training, self.config.sequence_parallel)
