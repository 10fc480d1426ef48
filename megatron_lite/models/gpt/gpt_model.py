"""GPTModel: embedding, decoder, and the output layer with the loss."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.embedding import LanguageModelEmbedding
from megatron_lite.models.gpt.future_tokens import FutureTokens
from megatron_lite.models.gpt.gpt_config import POSITION_EMBEDDING_TYPES, GPTModelConfig
from megatron_lite.models.gpt.vocab import padded_vocab_size as pad_vocab_size
from megatron_lite.ops.linear_cross_entropy import linear_cross_entropy
from megatron_lite.process_groups import ProcessGroupCollection, group_rank, group_size
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear
from megatron_lite.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron_lite.tensor_parallel.parameters import declare_parameter, local, named_parameter_specs
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.module import MegatronModule, tensor_parallel_group
from megatron_lite.transformer.multi_latent_attention import latent_softmax_scale
from megatron_lite.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron_lite.transformer.rope import RotaryEmbedding, YarnScaling
from megatron_lite.transformer.transformer_block import TransformerBlock
from megatron_lite.transformer.transformer_config import TransformerConfig

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


class GPTModel(MegatronModule):
    """A decoder-only language model.

    Args:
        config: the transformer layers.
        vocab_size: number of tokens, before padding. Padded entries never take part in the softmax.
        max_sequence_length: longest sequence; the number of learned positions.
        pre_process: this part of the model holds the embedding.
        post_process: this part holds the final norm, the output layer and the loss.
        parallel_output: with TP > 1, logits stay split over the vocabulary.
        share_embeddings_and_output_weights: the output layer's weights are the word embeddings.
        position_embedding_type: "learned_absolute", "rope", "yarn" or "none".
        rotary_percent, rotary_base, rotary_interleaved, seq_len_interpolation_factor, rope_scaling,
            rope_scaling_factor, yarn: as in RotaryEmbedding; yarn is read with "yarn", and with "rope" in latent
            attention, where it also scales the scores.
        padded_vocab_size: default the next multiple of make_vocab_size_divisible_by and the tensor parallel size.
        make_vocab_size_divisible_by: see padded_vocab_size.
        layer_indices: global indices of the layers held here, default all.
        pg_collection: process groups, default the global ones.

    Raises:
        ConfigError: an unknown position_embedding_type, or a padded size that does not fit.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: str = "learned_absolute",
        rotary_percent: float = 1.0,
        rotary_base: float = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        seq_len_interpolation_factor: float | None = None,
        rotary_interleaved: bool = False,
        yarn: YarnScaling | None = None,
        padded_vocab_size: int | None = None,
        make_vocab_size_divisible_by: int = 128,
        layer_indices: Sequence[int] | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        if position_embedding_type == "yarn":
            yarn = yarn or YarnScaling()
        elif position_embedding_type != "rope" or not config.multi_latent_attention:
            yarn = None
        if config.multi_latent_attention and config.softmax_scale is None:
            config = replace(config, softmax_scale=latent_softmax_scale(config, yarn))
        super().__init__(config)
        self.tp_group = tensor_parallel_group(pg_collection)
        tp = group_size(self.tp_group)
        if padded_vocab_size is None:
            padded_vocab_size = pad_vocab_size(vocab_size, make_vocab_size_divisible_by, tp)
        _check(vocab_size, padded_vocab_size, tp, position_embedding_type)
        _check_positions(config, position_embedding_type, rotary_percent)
        self.vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size
        self.max_sequence_length = max_sequence_length
        self.pre_process, self.post_process = pre_process, post_process
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights

        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, padded_vocab_size, max_sequence_length, position_embedding_type, pg_collection
            )
        self.rotary_pos_emb: RotaryEmbedding | None = None
        if position_embedding_type in ("rope", "yarn"):
            self.rotary_pos_emb = RotaryEmbedding(
                config.rotary_channels,
                rotary_percent,
                rotary_interleaved,
                seq_len_interpolation_factor,
                rotary_base,
                rope_scaling,
                rope_scaling_factor,
                yarn,
            )
        self.decoder = TransformerBlock(
            config,
            layer_indices,
            post_process=post_process,
            rotary_interleaved=rotary_interleaved,
            pg_collection=pg_collection,
        )
        has_mtp = bool(config.mtp_num_layers)
        self.has_copy_of_embeddings = share_embeddings_and_output_weights or has_mtp
        self.mtp: MultiTokenPredictionBlock | None = None
        if post_process and has_mtp:
            self.mtp = MultiTokenPredictionBlock(config, rotary_interleaved, pg_collection)
            if not pre_process:
                self.mtp_embedding = LanguageModelEmbedding(
                    config, padded_vocab_size, max_sequence_length, position_embedding_type, pg_collection
                )
                _declare_copy_of_embeddings(self.mtp_embedding.word_embeddings)
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=not parallel_output,
                skip_weight_param_allocation=share_embeddings_and_output_weights and (pre_process or has_mtp),
                tp_group=self.tp_group,
            )
            if share_embeddings_and_output_weights and not pre_process and not has_mtp:
                _declare_copy_of_embeddings(self.output_layer, config.embedding_init_method)

    @property
    def embedding_here(self) -> LanguageModelEmbedding | None:
        """The embedding, or the copy of it that multi-token prediction has in the last pipeline stage."""
        return self.embedding if self.pre_process else getattr(self, "mtp_embedding", None)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight [V/tp, h] (DTensor or tensor, as stored) that the output layer multiplies with."""
        if self.share_embeddings_and_output_weights and self.embedding_here is not None:
            return self.embedding_here.word_embeddings.weight
        weight = self.output_layer.weight
        assert weight is not None, "an untied output layer has a weight"
        return weight

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: InferenceContext | None = None,
        decoder_input: Tensor | None = None,
        future_tokens: FutureTokens | None = None,
    ) -> Tensor:
        """Predict each next token and, with multi-token prediction, those behind it.

        Under context parallelism s counts the tokens of this rank, everywhere; get_batch_on_this_cp_rank splits.

        Args:
            input_ids: [b, s]; not read where pre_process is False.
            position_ids: [b, s], counted in whole sequences.
            attention_mask: None (causal), or bool broadcastable to [b, 1, s, s], True where attention is forbidden.
            labels: [b, s] the tokens to predict; -100 is ignored.
            loss_mask: [b, s] weight of each token's loss; needs labels.
            packed_seq_params: where the documents are in the b * s tokens, one sequence behind the other, before the
                context parallel split. Each token sees its own document only.
            inference_context: key/value cache; the tokens are appended to those already seen.
            decoder_input: [s, b, h] output of the previous part of the model, where pre_process is False.
            future_tokens: what multi-token prediction is trained on; left out, the model predicts the next token alone.

        Returns:
            With labels the loss of each token [b, s], float32 (float64 for float64), with future_tokens
            [1 + depths, b, s], that of the next token first; without labels logits [b, s, V]
            over the real vocabulary, or, with parallel_output and TP > 1, this rank's [b, s, padded V / tp] with -inf
            in padded columns. Where post_process is False, the hidden states [s, b, h].

        Raises:
            ConfigError: a cache together with sequence parallelism.
        """
        if inference_context is not None and self.config.sequence_parallel:
            raise ConfigError(
                "inference_context is given with sequence_parallel, but a single new token cannot be split over ranks; "
                "build the model with sequence_parallel=False, its weights are the same."
            )
        if self.pre_process:
            assert input_ids is not None, "a part of the model with the embedding needs input_ids"
            hidden = self.embedding(input_ids, position_ids)
        else:
            assert decoder_input is not None, "a part of the model without embedding needs decoder_input"
            hidden = decoder_input
        rotary = None if self.rotary_pos_emb is None else self.rotary_pos_emb(position_ids, self.config.params_dtype)
        self._prepare(packed_seq_params)
        context = (attention_mask, rotary, inference_context, packed_seq_params)
        hidden = self.decoder(hidden, *context)
        if inference_context is not None:
            inference_context.advance(position_ids.size(1))
        if not self.post_process:
            return hidden
        if labels is None:
            return self._logits(hidden)
        loss = self._loss(hidden, labels, loss_mask)
        if self.mtp is None or future_tokens is None:
            return loss
        embed = functools.partial(self._embed, position_ids=position_ids)
        losses = [
            self._loss(further, future_tokens.labels[..., depth], future_tokens.loss_mask[..., depth])
            for depth, further in enumerate(self.mtp(hidden, future_tokens.tokens, embed, *context))
        ]
        return torch.stack([loss, *losses])

    def _embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        embedding = self.embedding_here
        assert embedding is not None, "the part of a model with multi-token prediction has an embedding"
        embedded: Tensor = embedding(tokens, position_ids)
        return embedded

    def _prepare(self, packed_seq_params: PackedSeqParams | None) -> None:
        """Work out the documents' blocks here, once for all layers and outside of what is compiled."""
        if packed_seq_params is not None and packed_seq_params.is_packed:
            for module in self.modules():
                if isinstance(module, DotProductAttention):
                    module.prepare(packed_seq_params)

    def _loss(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor | None) -> Tensor:
        """[s, b, h] -> per-token loss [b, s]."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, self.tp_group)
        weight = local(self.shared_embedding_or_output_weight())
        batch, length = labels.shape
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            labels.t().flatten(),
            loss_mask=None if loss_mask is None else loss_mask.t().flatten(),
            vocab_start=group_rank(self.tp_group) * weight.size(0),
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
        )
        return loss.view(length, batch).t().clone()  # not a view: FSDP2 hangs its backward hook on what is returned

    def _logits(self, hidden: Tensor) -> Tensor:
        """[s, b, h] -> [b, s, V], or this rank's [b, s, V/tp]."""
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits = self.output_layer(hidden, weight=shared).transpose(0, 1)
        if not self.parallel_output or group_size(self.tp_group) == 1:
            return logits[..., : self.vocab_size].contiguous()
        columns = torch.arange(logits.size(-1), device=logits.device) + group_rank(self.tp_group) * logits.size(-1)
        return logits.masked_fill(columns >= self.vocab_size, -torch.inf)


def _declare_copy_of_embeddings(module: nn.Module, init_method: Any = None) -> None:
    """The weight of `module` is a copy of the embeddings in another pipeline stage, kept equal by the training step."""
    spec = named_parameter_specs(module)["weight"]
    copy = replace(spec, init_method=init_method or spec.init_method, copy_of=WORD_EMBEDDINGS)
    declare_parameter(module, "weight", copy)


def _check(vocab_size: int, padded_vocab_size: int, tp: int, position_embedding_type: str) -> None:
    if padded_vocab_size < vocab_size or padded_vocab_size % tp:
        raise ConfigError(
            f"padded_vocab_size is {padded_vocab_size}, but it must hold vocab_size ({vocab_size}) tokens and be a "
            f"multiple of the tensor parallel size ({tp}); leave it out to have it computed."
        )
    if position_embedding_type not in POSITION_EMBEDDING_TYPES:
        raise ConfigError(
            f"position_embedding_type is {position_embedding_type!r}, but it must be one of "
            f"{', '.join(POSITION_EMBEDDING_TYPES)}."
        )


def _check_positions(config: TransformerConfig, position_embedding_type: str, rotary_percent: float) -> None:
    rotated = int(config.rotary_channels * rotary_percent)
    if position_embedding_type in ("rope", "yarn") and (rotated < 2 or rotated % 2):
        raise ConfigError(
            f"{rotated} channels of a head are rotated, but they are rotated in pairs: choose an even width."
        )
    if config.mtp_num_layers and position_embedding_type == "learned_absolute":
        raise ConfigError(
            "position_embedding_type is learned_absolute with mtp_num_layers, but multi-token prediction embeds tokens "
            "away from their positions: use rope, yarn or none."
        )


def build_gpt_model(
    config: TransformerConfig,
    gpt: GPTModelConfig,
    vocab_size: int,
    max_sequence_length: int,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    parallel_output: bool = True,
    layer_indices: Sequence[int] | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """A GPTModel from the two configurations.

    Args:
        config: the transformer layers.
        gpt: vocabulary and positions; its vocab_size, where given, wins over `vocab_size`.
        vocab_size: the tokenizer's.
        max_sequence_length: used where gpt.max_position_embeddings is not given.
        pre_process, post_process, parallel_output, layer_indices, pg_collection: as in GPTModel.
    """
    vocab_size = gpt.vocab_size or vocab_size
    return GPTModel(
        config,
        vocab_size,
        gpt.max_position_embeddings or max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=gpt.share_embeddings_and_output_weights,
        position_embedding_type=gpt.position_embedding_type,
        rotary_percent=gpt.rotary_percent,
        rotary_base=gpt.rotary_base,
        rope_scaling=gpt.use_rope_scaling,
        rope_scaling_factor=gpt.rope_scaling_factor,
        seq_len_interpolation_factor=gpt.rotary_seq_len_interpolation_factor,
        rotary_interleaved=gpt.rotary_interleaved,
        yarn=gpt.yarn(config.multi_latent_attention),
        padded_vocab_size=gpt.padded_vocab_size if gpt.pad_vocab_size else vocab_size,
        make_vocab_size_divisible_by=gpt.make_vocab_size_divisible_by,
        layer_indices=layer_indices,
        pg_collection=pg_collection,
    )
