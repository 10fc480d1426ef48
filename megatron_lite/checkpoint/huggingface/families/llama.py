"""Llama 2 and 3, and Mistral, whose tensors have the same names; what other families have of them."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.sources import (
    Source,
    gated,
    keys,
    queries,
    same,
    values,
    vocabulary,
    with_biases,
)
from megatron_lite.checkpoint.huggingface.config_json import REQUIRED, ConfigJson
from megatron_lite.checkpoint.huggingface.family import Family, Field
from megatron_lite.checkpoint.huggingface.positions import read_positions, write_positions
from megatron_lite.checkpoint.huggingface.windows import window_of, window_settings

PREFIX = "model."
LAYER = "model.layers.{layer}."
OUTSIDE = {
    "embedding.word_embeddings.weight": (Source("model.embed_tokens.weight", vocabulary),),
    "decoder.final_layernorm.weight": same("model.norm.weight"),
    "output_layer.weight": (Source("lm_head.weight", vocabulary),),
}
NORMS = {
    "input_layernorm.weight": same(f"{LAYER}input_layernorm.weight"),
    "pre_mlp_layernorm.weight": same(f"{LAYER}post_attention_layernorm.weight"),
}
QKV = {
    "self_attention.linear_qkv.weight": (
        Source(f"{LAYER}self_attn.q_proj.weight", queries),
        Source(f"{LAYER}self_attn.k_proj.weight", keys),
        Source(f"{LAYER}self_attn.v_proj.weight", values),
    ),
}
ATTENTION = {**QKV, "self_attention.linear_proj.weight": same(f"{LAYER}self_attn.o_proj.weight")}
NORMS_OF_HEADS = {
    "self_attention.q_layernorm.weight": same(f"{LAYER}self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": same(f"{LAYER}self_attn.k_norm.weight"),
}
MLP = {
    "mlp.linear_fc1.weight": gated(f"{LAYER}mlp."),
    "mlp.linear_fc2.weight": same(f"{LAYER}mlp.down_proj.weight"),
}
ROUTER = {"mlp.router.weight": same(f"{LAYER}mlp.gate.weight")}
EXPERTS = {
    "mlp.experts.weight1": gated(LAYER + "mlp.experts.{expert}."),
    "mlp.experts.weight2": same(LAYER + "mlp.experts.{expert}.down_proj.weight"),
}

FIELDS = {
    "num_hidden_layers": Field("num_layers", REQUIRED),
    "hidden_size": Field("hidden_size", REQUIRED),
    "num_attention_heads": Field("num_attention_heads", REQUIRED),
    "intermediate_size": Field("ffn_hidden_size", REQUIRED),
    "vocab_size": Field("vocab_size", REQUIRED),
    "max_position_embeddings": Field("max_position_embeddings", 2048),
    "rms_norm_eps": Field("layernorm_epsilon", 1e-6),
    "tie_word_embeddings": Field("share_embeddings_and_output_weights", False),
}
FIXED = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
ONLY = {"hidden_act": "silu"}


def read_heads(config: ConfigJson, head_dim: int | None = None, groups: int | None = None) -> dict[str, Any]:
    """Query groups, and the width of a head: by default `head_dim`, or the width of the model over the heads."""
    heads = config.integer("num_attention_heads")
    width = config.integer("head_dim", head_dim or config.integer("hidden_size") // heads)
    # Null means as many as heads, also where a missing one means another number.
    if config.get_or_null("num_key_value_heads", groups) is None:
        return {"num_query_groups": heads, "kv_channels": width}
    return {"num_query_groups": config.integer("num_key_value_heads", groups), "kv_channels": width}


def require_whole_heads(config: ConfigJson) -> None:
    """Some families of theirs demand it even where the width of a head is given."""
    heads = config.integer("num_attention_heads")
    if config.integer("hidden_size") % heads:
        config.refuse("hidden_size", f"models of this type want a multiple of num_attention_heads ({heads})")


def write_heads(model: Architecture) -> dict[str, Any]:
    """The reverse of read_heads."""
    config = model.transformer
    return {"num_key_value_heads": config.num_query_groups, "head_dim": config.kv_channels}


def _read_llama(config: ConfigJson) -> dict[str, Any]:
    require_whole_heads(config)
    attention, mlp = (bool(config.get(key, False)) for key in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        config.refuse("attention_bias", f"mlp_bias is {mlp}, and linear layers have biases all or none")
    return {**read_positions(config), **read_heads(config), "add_bias_linear": attention}


def _write_llama(model: Architecture) -> dict[str, Any]:
    bias = model.transformer.add_bias_linear
    return {**write_positions(model), **write_heads(model), "attention_bias": bias, "mlp_bias": bias}


def _read_mistral(config: ConfigJson) -> dict[str, Any]:
    # With layer_types theirs is a Ministral, which heeds them.
    windows = window_settings(config, config.get_or_null("sliding_window", 4096), config.get("layer_types"))
    return {**read_positions(config), **read_heads(config, groups=8), **windows}


def _write_mistral(model: Architecture) -> dict[str, Any]:
    return {**write_positions(model), **write_heads(model), "sliding_window": window_of(model)[0]}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer=with_biases({**NORMS, **ATTENTION, **MLP}),
    fields=FIELDS,
    fixed=FIXED,
    only=ONLY,
    read=_read_llama,
    write=_write_llama,
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={**NORMS, **ATTENTION, **MLP},
    fields={**FIELDS, "max_position_embeddings": Field("max_position_embeddings", 131072)},
    fixed=FIXED,
    only=ONLY,
    read=_read_mistral,
    write=_write_mistral,
)
