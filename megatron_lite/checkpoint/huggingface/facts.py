"""Facts: what a model of ours computes, in values that are equal where the models are, however they were written."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.config_field import FLAG
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.transformer.attention_choices import uses_rope, uses_window
from megatron_lite.transformer.moe.moe_config import is_moe_layer
from megatron_lite.transformer.transformer_config import TransformerConfig

_ALWAYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "add_bias_linear",
    "swiglu",
    "geglu",
    "quick_geglu",
    "squared_relu",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "apply_residual_connection_post_layernorm",
    "qk_layernorm",
    "attention_output_gate",
    "softmax_type",
    "softmax_scale",
    "multi_latent_attention",
    "num_moe_experts",
)
_GROUPED = ("num_query_groups", "kv_channels")
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_type",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_group_topk",
)
_YARN = (
    "rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "mscale",
    "mscale_all_dim",
)


def facts_of(model: Architecture) -> dict[str, Any]:
    """Setting -> value, of those that matter in this model."""
    config = model.transformer
    facts = {name: getattr(config, name) for name in _ALWAYS}
    if not config.add_bias_linear:
        facts["add_qkv_bias"] = config.add_qkv_bias
    if not (config.swiglu or config.quick_geglu or config.squared_relu):
        facts["bias_gelu_fusion"] = config.bias_gelu_fusion or config.openai_gelu
    facts |= {name: getattr(config, name) for name in (_LATENT if config.multi_latent_attention else _GROUPED)}
    facts |= _facts_of_layers(config)
    if config.num_moe_experts is not None:
        facts |= _facts_of_experts(config)
    return facts | _facts_of_gpt(model)


def _facts_of_layers(config: TransformerConfig) -> dict[str, Any]:
    layers = range(1, config.num_layers + 1)
    windows = [int(uses_window(config, number)) for number in layers]
    without_positions = [int(not uses_rope(config, number)) for number in layers]
    facts: dict[str, Any] = {"window_size": None, "no_rope_freq": without_positions if any(without_positions) else None}
    if any(windows) and config.window_size is not None:
        facts["window_size"] = tuple(config.window_size)
        facts["window_attn_skip_freq"] = windows
    experts = [int(is_moe_layer(config, number)) for number in layers]
    if config.num_moe_experts is not None:
        facts["moe_layer_freq"] = experts
    if not all(experts):
        facts["ffn_hidden_size"] = config.ffn_hidden_size
    return facts


def _facts_of_experts(config: TransformerConfig) -> dict[str, Any]:
    facts = {name: getattr(config, name) for name in _EXPERTS}
    facts["moe_router_topk_scaling_factor"] = config.moe_router_topk_scaling_factor or 1.0
    facts["moe_shared_expert_gate"] = bool(config.moe_shared_expert_intermediate_size and config.moe_shared_expert_gate)
    if config.moe_router_group_topk:
        facts["moe_router_num_groups"] = config.moe_router_num_groups
    if config.moe_router_score_function == "softmax":
        facts["moe_router_pre_softmax"] = config.moe_router_pre_softmax
    # All types but sinkhorn weigh experts alike; aux_loss, the default, stands for them.
    facts["moe_router_load_balancing_type"] = "sinkhorn" if "sinkhorn" in config.balance_types else "aux_loss"
    return facts


def _facts_of_gpt(model: Architecture) -> dict[str, Any]:
    gpt, latent = model.gpt, model.transformer.multi_latent_attention
    facts: dict[str, Any] = {"share_embeddings_and_output_weights": gpt.share_embeddings_and_output_weights}
    if model.vocab_size is not None:
        facts["vocab_size"] = model.vocab_size
    yarn = gpt.yarn(latent)
    kind = "rope" if gpt.position_embedding_type == "yarn" else gpt.position_embedding_type
    if yarn is not None and yarn.scaling_factor > 1.0:
        kind = "yarn"
        facts |= {name: getattr(gpt, name) for name in _YARN}
    facts["position_embedding_type"] = kind
    if kind == "learned_absolute":
        facts["max_position_embeddings"] = gpt.max_position_embeddings
    if kind in ("rope", "yarn"):
        facts |= {name: getattr(gpt, name) for name in ("rotary_base", "rotary_percent")}
        facts["rotary_seq_len_interpolation_factor"] = gpt.rotary_seq_len_interpolation_factor
        facts["use_rope_scaling"] = gpt.use_rope_scaling
        if gpt.use_rope_scaling:
            facts["rope_scaling_factor"] = gpt.rope_scaling_factor
        if not latent:
            facts["rotary_interleaved"] = gpt.rotary_interleaved
    return facts


def differences(mine: Architecture, wanted: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """(setting, value of mine, value wanted) for each fact that is not as wanted."""
    own, theirs = facts_of(mine), facts_of(wanted)
    for name, value in theirs.items():
        actual = own[name] if name in own else _value(mine, name)
        if name == "vocab_size" and mine.vocab_size is None:
            continue
        if not _equal(actual, value):
            yield name, actual, value


def _value(model: Architecture, name: str) -> Any:
    return getattr(model.transformer if hasattr(model.transformer, name) else model.gpt, name)


def _equal(one: Any, other: Any) -> bool:
    if type(one) is float or type(other) is float:
        return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def remedy(name: str, value: Any) -> str:
    """What to write so that a setting has a value: "write --num-layers 8", "leave out --swiglu"."""
    described = next(
        one for kind in (TransformerConfig, GPTModelConfig) for one in dataclasses.fields(kind) if one.name == name
    )
    dashed = "--" + name.replace("_", "-")
    names = described.metadata[FLAG].names
    if isinstance(value, bool):
        if value == described.default:
            return f"leave out {names[0] if names else dashed if not value else '--no' + dashed[1:]}"
        return f"write {names[0] if names else dashed if value else '--no' + dashed[1:]}"
    flag = names[0] if names else dashed
    if value is None:
        return f"leave out {flag}"
    if isinstance(value, list):
        return f"write {flag} '[{','.join(map(str, value))}]'"
    if isinstance(value, tuple):
        return f"write {flag} {','.join(map(str, value))}"
    return f"write {flag} {value}"
