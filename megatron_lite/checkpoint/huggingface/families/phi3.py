"""Phi-3: Llama's layers with fused projections, and the family whose heads can be rotated in part."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.sources import Source, gates_then_ups, queries_keys_values, same
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.checkpoint.huggingface.families.llama import (
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


def _read(config: ConfigJson) -> dict[str, Any]:
    positions, heads = read_positions(config, partial=True, kinds=("default",)), read_heads(config)
    rotated = int(heads["kv_channels"] * positions["rotary_percent"])
    if rotated % 2 or rotated == 0:
        config.refuse("head_dim", f"partial_rotary_factor would rotate {rotated} channels, no whole pairs")
    return {
        **positions,
        **heads,
        **window_settings(config, config.get("sliding_window"), None),
    }


def _write(model: Architecture) -> dict[str, Any]:
    return {
        **write_positions(model),
        "partial_rotary_factor": model.gpt.rotary_percent,
        **write_heads(model),
        "sliding_window": window_of(model)[0],
    }


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={
        **NORMS,
        "self_attention.linear_qkv.weight": (Source(f"{LAYER}self_attn.qkv_proj.weight", queries_keys_values),),
        "self_attention.linear_proj.weight": same(f"{LAYER}self_attn.o_proj.weight"),
        "mlp.linear_fc1.weight": (Source(f"{LAYER}mlp.gate_up_proj.weight", gates_then_ups),),
        "mlp.linear_fc2.weight": same(f"{LAYER}mlp.down_proj.weight"),
    },
    fields={
        **FIELDS,
        "max_position_embeddings": Field("max_position_embeddings", 4096),
        "rms_norm_eps": Field("layernorm_epsilon", 1e-5),
    },
    fixed=FIXED,
    only=ONLY,
    read=_read,
    write=_write,
)
