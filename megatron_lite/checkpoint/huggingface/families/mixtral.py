"""Mixtral: Mistral's layers with experts."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.sources import gated, same
from megatron_lite.checkpoint.huggingface.config_json import REQUIRED, ConfigJson
from megatron_lite.checkpoint.huggingface.families.llama import (
    ATTENTION,
    FIELDS,
    FIXED,
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
from megatron_lite.checkpoint.huggingface.windows import window_of, window_settings

_EXPERT = LAYER + "block_sparse_moe.experts.{expert}."


def _read(config: ConfigJson) -> dict[str, Any]:
    return {
        **read_positions(config, theta=1e6),
        **read_heads(config, groups=8),
        **window_settings(config, config.get("sliding_window"), None),
        "moe_ffn_hidden_size": config.integer("intermediate_size"),
    }


def _write(model: Architecture) -> dict[str, Any]:
    return {
        **write_positions(model),
        **write_heads(model),
        "sliding_window": window_of(model)[0],
        "intermediate_size": model.transformer.moe_ffn_hidden_size,
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={
        **NORMS,
        **ATTENTION,
        "mlp.router.weight": same(LAYER + "block_sparse_moe.gate.weight"),
        "mlp.experts.weight1": gated(_EXPERT, "w1", "w3"),
        "mlp.experts.weight2": same(_EXPERT + "w2.weight"),
    },
    fields={
        **FIELDS,
        "max_position_embeddings": Field("max_position_embeddings", 131072),
        "rms_norm_eps": Field("layernorm_epsilon", 1e-5),
        "num_local_experts": Field("num_moe_experts", REQUIRED),
        "num_experts_per_tok": Field("moe_router_topk", 2),
    },
    fixed=FIXED,
    only=ONLY,
    aliases={"num_experts": "num_local_experts"},
    read=_read,
    write=_write,
)
