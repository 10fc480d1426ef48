"""gpt-oss: sinks, windows in every other layer, experts stacked and the other way around, biases everywhere."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.sources import Source, same, with_biases
from megatron_lite.checkpoint.huggingface.config_json import REQUIRED, ConfigJson
from megatron_lite.checkpoint.huggingface.families.llama import (
    ATTENTION,
    FIELDS,
    LAYER,
    NORMS,
    ONLY,
    OUTSIDE,
    PREFIX,
    read_heads,
    write_heads,
)
from megatron_lite.checkpoint.huggingface.family import Family, Field
from megatron_lite.checkpoint.huggingface.positions import read_positions, write_positions
from megatron_lite.checkpoint.huggingface.windows import FULL, SLIDING, window_of, window_settings

# The positions that a config.json means which describes none.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(config: ConfigJson) -> dict[str, Any]:
    layers = config.integer("num_hidden_layers")
    types = [SLIDING if number % 2 == 0 else FULL for number in range(layers)]
    return {
        **read_positions(config, theta=150000.0, absent=_YARN),
        **read_heads(config, 64, 8),
        **window_settings(config, config.get_or_null("sliding_window", 128), config.get("layer_types", types)),
        "moe_ffn_hidden_size": config.integer("intermediate_size"),
        "activation_func_clamp_value": float(config.like("swiglu_limit", 7.0)),
    }


def _write(model: Architecture) -> dict[str, Any]:
    width, types = window_of(model)
    positions, limit = write_positions(model), model.transformer.activation_func_clamp_value
    return {
        **positions,
        # None would mean those above.
        "rope_scaling": positions["rope_scaling"] or {"rope_type": "default"},
        **write_heads(model),
        # Theirs wants a width even where no layer has a window.
        "sliding_window": width or 128,
        "layer_types": types,
        "intermediate_size": model.transformer.moe_ffn_hidden_size,
        "swiglu_limit": None if limit is None else float(limit),
    }


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={
        **NORMS,
        **with_biases(ATTENTION),
        "self_attention.core_attention.softmax_offset": same(f"{LAYER}self_attn.sinks"),
        "mlp.router.weight": same(f"{LAYER}mlp.router.weight"),
        "mlp.router.bias": same(f"{LAYER}mlp.router.bias"),
        # Gates and ups are interleaved in theirs too.
        "mlp.experts.weight1": (Source(f"{LAYER}mlp.experts.gate_up_proj", transposed=True),),
        "mlp.experts.bias1": same(f"{LAYER}mlp.experts.gate_up_proj_bias"),
        "mlp.experts.weight2": (Source(f"{LAYER}mlp.experts.down_proj", transposed=True),),
        "mlp.experts.bias2": same(f"{LAYER}mlp.experts.down_proj_bias"),
    },
    fields={
        **FIELDS,
        "max_position_embeddings": Field("max_position_embeddings", 131072),
        "rms_norm_eps": Field("layernorm_epsilon", 1e-5),
        "num_local_experts": Field("num_moe_experts", REQUIRED),
        "num_experts_per_tok": Field("moe_router_topk", 4),
    },
    fixed={
        "normalization": "RMSNorm",
        "add_bias_linear": True,
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
    },
    only={**ONLY, "attention_bias": True, "swiglu_alpha": 1.702},
    aliases={"num_experts": "num_local_experts"},
    read=_read,
    write=_write,
)
