"""The arguments of a Megatron-LM run as our settings of its model; both have the same names, but for a few."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch

from megatron_lite.checkpoint.conversion.architecture import Architecture, Settings, architecture_of, grouped
from megatron_lite.checkpoint.megatron.folder import MegatronCheckpoint
from megatron_lite.checkpoint.model_settings import MEANING, SHAPES
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.tokenizers import TokenizerConfig
from megatron_lite.tokenizers.config import TOKENIZER_TYPES
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.value_parsing import convert

_EMBEDDING = "embedding.word_embeddings.weight"
# Of a run's settings that describe no model, those that go with it.
_OF_TRAINING = (
    *("init_method_std", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
    "moe_router_bias_update_rate",
)
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type")
# Written another way in their arguments.
_SPELLED = ("num_moe_experts", "share_embeddings_and_output_weights", "vocab_size")
# Arguments with which a model computes what ours cannot.
_ELSEWHERE = (
    *("experimental_attention_variant", "linear_attention_freq", "qk_l2_norm", "mrope_section", "use_mup"),
    *("hybrid_layer_pattern", "hybrid_override_pattern", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "enable_mhc_connections", "moe_latent_size"),
    *("moe_apply_probs_on_input", "moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"),
    *("mtp_use_repeated_layer", "mtp_hybrid_override_pattern", "moe_router_force_biased"),
)


def settings_of(theirs: MegatronCheckpoint) -> Settings:
    """Our settings of the model that a checkpoint is of.

    The vocabulary is theirs with its padding, which in Megatron-LM takes part in the softmax.

    Raises:
        ConfigError: lists everything that cannot be expressed.
    """
    arguments = theirs.arguments
    found = list(_inexpressible(arguments, theirs.folder))
    names = [*_OF_TRAINING, *(name for kind in (SHAPES, MEANING) for group in kind.values() for name in group)]
    left_out = {*_SPELLED}
    if not arguments.get("group_query_attention"):
        left_out.add("num_query_groups")
    if not arguments.get("multi_latent_attention"):
        left_out.update(_LATENT)
    if arguments.get("num_experts") is None:
        left_out.update(name for name in names if name.startswith("moe_"))
    names = [name for name in names if name not in left_out]
    flat, problems = _converted(arguments, names, theirs.folder)
    if found + problems:
        raise ConfigError.from_violations(found + problems)
    flat["num_moe_experts"] = arguments.get("num_experts")
    flat["moe_grouped_gemm"] = True if flat["num_moe_experts"] else None
    flat["share_embeddings_and_output_weights"] = not arguments.get("untie_embeddings_and_output_weights", False)
    # Masters are of float32 whatever the model computes with.
    flat["bf16"] = bool(arguments.get("bf16")) or torch.bfloat16 in theirs.dtypes
    flat["fp16"] = bool(arguments.get("fp16")) and not flat["bf16"]
    flat["vocab_size"] = theirs.weights.shapes.get(_EMBEDDING, (None,))[0]
    return grouped(flat)


def architecture_of_run(theirs: MegatronCheckpoint) -> Architecture:
    """What a checkpoint's model computes.

    Raises:
        ConfigError: it cannot be expressed.
    """
    try:
        return architecture_of(settings_of(theirs))
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{theirs.folder} holds an argument of the wrong kind: {error}") from error


def tokenizer_of(theirs: MegatronCheckpoint, vocab_size: int) -> TokenizerConfig:
    """Theirs where ours has that kind, else one that reads and writes numbers."""
    kind = theirs.arguments.get("tokenizer_type")
    if kind not in TOKENIZER_TYPES or kind == "NullTokenizer":
        size = theirs.arguments.get("vocab_size") or vocab_size
        end = theirs.arguments.get("null_tokenizer_eod_id")
        return TokenizerConfig(
            tokenizer_type="NullTokenizer", vocab_size=size, null_tokenizer_eod_id=size - 1 if end is None else end
        )
    names = [one.name for one in dataclasses.fields(TokenizerConfig) if one.name != "trust_remote_code"]
    values, problems = _converted(theirs.arguments, names, theirs.folder)
    if problems:
        raise ConfigError.from_violations(problems)
    return TokenizerConfig(**values)


def _inexpressible(arguments: Mapping[str, Any], folder: Path) -> Iterator[str]:
    for name in _ELSEWHERE:
        if arguments.get(name):
            yield (
                f"{name} is {arguments[name]!r} in the arguments of {folder}, but no model here computes that: it "
                "cannot be imported."
            )


def _converted(arguments: Mapping[str, Any], names: list[str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Named arguments as values of the fields they set, and what cannot be one; None and missing ones are left out."""
    hints = get_type_hints(TransformerConfig) | get_type_hints(GPTModelConfig) | get_type_hints(TokenizerConfig)
    values: dict[str, Any] = {}
    problems = []
    for name in names:
        if arguments.get(name) is None:
            continue
        try:
            values[name] = convert(arguments[name], hints[name])
        except ValueError as error:
            problems.append(f"{name} is {arguments[name]!r} in the arguments of {folder}, but must be {error}.")
    return values, problems
