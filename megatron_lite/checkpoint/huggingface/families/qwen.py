"""Qwen2 and Qwen3, dense and with experts."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.sources import with_biases
from megatron_lite.checkpoint.huggingface.config_json import REQUIRED, ConfigJson
from megatron_lite.checkpoint.huggingface.families.llama import (
    ATTENTION,
    EXPERTS,
    FIELDS,
    FIXED,
    MLP,
    NORMS,
    NORMS_OF_HEADS,
    ONLY,
    OUTSIDE,
    PREFIX,
    QKV,
    ROUTER,
    read_heads,
    write_heads,
)
from megatron_lite.checkpoint.huggingface.family import Family, Field
from megatron_lite.checkpoint.huggingface.positions import read_positions, write_positions
from megatron_lite.checkpoint.huggingface.windows import FULL, SLIDING, window_of, window_settings
from megatron_lite.transformer.moe.moe_config import is_moe_layer

_FIELDS = {**FIELDS, "max_position_embeddings": Field("max_position_embeddings", 32768)}


def _read_windows(config: ConfigJson) -> dict[str, Any]:
    """Windows in the layers that layer_types names, or else from max_window_layers on."""
    width = config.get_or_null("sliding_window", 4096) if config.like("use_sliding_window", False) else None
    layers, first = config.integer("num_hidden_layers"), config.like("max_window_layers", 28)
    types = [SLIDING if width is not None and number >= first else FULL for number in range(layers)]
    return window_settings(config, width, config.get("layer_types", types))


def _write_windows(model: Architecture) -> dict[str, Any]:
    width, types = window_of(model)
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
        "layer_types": types,
    }


def _read_qwen2(config: ConfigJson) -> dict[str, Any]:
    return {**read_positions(config), **read_heads(config, groups=32), **_read_windows(config)}


def _read_qwen3(config: ConfigJson) -> dict[str, Any]:
    return {**read_positions(config), **read_heads(config, 128, 32), **_read_windows(config)}


def _write_dense(model: Architecture) -> dict[str, Any]:
    return {**write_positions(model), **write_heads(model), **_write_windows(model)}


def _read_qwen3_moe(config: ConfigJson) -> dict[str, Any]:
    if config.get("use_sliding_window", False):
        config.refuse("use_sliding_window", "windows of this family cannot be expressed")
    layers, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers", [])
    experts = [int(number not in dense and (number + 1) % step == 0) for number in range(layers)]
    if not any(experts):
        config.refuse("mlp_only_layers", f"with decoder_sparse_step {step} no layer has experts")
    return {
        **read_positions(config),
        **read_heads(config, groups=4),
        "num_moe_experts": config.integer("num_experts", 128),
        "moe_layer_freq": experts,
        "moe_router_pre_softmax": not config.like("norm_topk_prob", False),
    }


def _write_qwen3_moe(model: Architecture) -> dict[str, Any]:
    config = model.transformer
    return {
        **write_positions(model),
        **write_heads(model),
        "num_experts": config.num_moe_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n - 1 for n in range(1, config.num_layers + 1) if not is_moe_layer(config, n)],
        "norm_topk_prob": not config.moe_router_pre_softmax,
        "use_sliding_window": False,
        "max_window_layers": config.num_layers,
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={**NORMS, **ATTENTION, **with_biases(QKV), **MLP},
    fields=_FIELDS,
    fixed={**FIXED, "add_qkv_bias": True},
    only=ONLY,
    read=_read_qwen2,
    write=_write_dense,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={**NORMS, **ATTENTION, **NORMS_OF_HEADS, **MLP},
    fields=_FIELDS,
    fixed={**FIXED, "qk_layernorm": True},
    only={**ONLY, "attention_bias": False},
    read=_read_qwen3,
    write=_write_dense,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={**NORMS, **ATTENTION, **NORMS_OF_HEADS, **MLP, **ROUTER, **EXPERTS},
    fields={
        **_FIELDS,
        "moe_intermediate_size": Field("moe_ffn_hidden_size", REQUIRED),
        "num_experts_per_tok": Field("moe_router_topk", 8),
    },
    fixed={**FIXED, "qk_layernorm": True},
    only={**ONLY, "attention_bias": False},
    aliases={"num_local_experts": "num_experts"},
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
)
