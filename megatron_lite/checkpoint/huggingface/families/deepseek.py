"""DeepSeek-V2 and V3: latent attention, shared experts, groups of experts, multi-token prediction."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.sources import Source, gated, same, vocabulary
from megatron_lite.checkpoint.huggingface.config_json import REQUIRED, ConfigJson
from megatron_lite.checkpoint.huggingface.families.llama import (
    EXPERTS,
    FIELDS,
    FIXED,
    LAYER,
    MLP,
    NORMS,
    ONLY,
    OUTSIDE,
    PREFIX,
    ROUTER,
    require_whole_heads,
)
from megatron_lite.checkpoint.huggingface.family import Family, Field
from megatron_lite.checkpoint.huggingface.positions import read_positions, write_positions
from megatron_lite.transformer.moe.moe_config import is_moe_layer

_ATTENTION = f"{LAYER}self_attn."
_LAYER_TABLE = {
    **NORMS,
    "self_attention.linear_q_proj.weight": same(_ATTENTION + "q_proj.weight"),
    "self_attention.linear_q_down_proj.weight": same(_ATTENTION + "q_a_proj.weight"),
    "self_attention.q_layernorm.weight": same(_ATTENTION + "q_a_layernorm.weight"),
    "self_attention.linear_q_up_proj.weight": same(_ATTENTION + "q_b_proj.weight"),
    "self_attention.linear_kv_down_proj.weight": same(_ATTENTION + "kv_a_proj_with_mqa.weight"),
    "self_attention.kv_layernorm.weight": same(_ATTENTION + "kv_a_layernorm.weight"),
    "self_attention.linear_kv_up_proj.weight": same(_ATTENTION + "kv_b_proj.weight"),
    "self_attention.linear_proj.weight": same(_ATTENTION + "o_proj.weight"),
    **MLP,
    **ROUTER,
    **EXPERTS,
    "mlp.shared_experts.linear_fc1.weight": gated(f"{LAYER}mlp.shared_experts."),
    "mlp.shared_experts.linear_fc2.weight": same(f"{LAYER}mlp.shared_experts.down_proj.weight"),
}
_FUTURE = {
    "enorm.weight": same(f"{LAYER}enorm.weight"),
    "hnorm.weight": same(f"{LAYER}hnorm.weight"),
    "eh_proj.weight": same(f"{LAYER}eh_proj.weight"),
    "final_layernorm.weight": same(f"{LAYER}shared_head.norm.weight"),
}
_FUTURE_COPIES = {
    "embedding.word_embeddings.weight": (Source(f"{LAYER}embed_tokens.weight", vocabulary),),
    "output_layer.weight": (Source(f"{LAYER}shared_head.head.weight", vocabulary),),
}
_FIELDS = {
    **FIELDS,
    "q_lora_rank": Field("q_lora_rank", 1536, nullable=True),
    "kv_lora_rank": Field("kv_lora_rank", 512),
    "qk_nope_head_dim": Field("qk_head_dim", 128),
    "qk_rope_head_dim": Field("qk_pos_emb_head_dim", 64),
    "v_head_dim": Field("v_head_dim", 128),
    "n_routed_experts": Field("num_moe_experts", REQUIRED),
    "num_experts_per_tok": Field("moe_router_topk", REQUIRED),
    "moe_intermediate_size": Field("moe_ffn_hidden_size", REQUIRED),
}
_FIXED = {**FIXED, "multi_latent_attention": True, "qk_layernorm": True}
# The norms of the latents have this epsilon, whatever the others have; ours have one.
_ONLY = {
    **ONLY,
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "rms_norm_eps": 1e-6,
}


def _read_both(config: ConfigJson, dense: int, shared: int) -> dict[str, Any]:
    """Settings of V2 and V3, with the numbers of dense layers and of shared experts where none are named."""
    require_whole_heads(config)
    layers, dense = config.integer("num_hidden_layers"), config.like("first_k_dense_replace", dense)
    if dense >= layers:
        config.refuse("first_k_dense_replace", f"then none of num_hidden_layers ({layers}) has experts")
    shared = config.like("n_shared_experts", shared)
    positions = read_positions(config)
    return {
        **positions,
        # In latent attention the default is YaRN.
        "rope_type": None if positions["position_embedding_type"] == "yarn" else "rope",
        "moe_layer_freq": [int(number >= dense) for number in range(layers)],
        "moe_shared_expert_intermediate_size": shared * config.integer("moe_intermediate_size") or None,
    }


def _write_both(model: Architecture) -> dict[str, Any]:
    config = model.transformer
    layers = range(1, config.num_layers + 1)
    width = config.moe_shared_expert_intermediate_size
    return {
        **write_positions(model),
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_pos_emb_head_dim,
        "first_k_dense_replace": next((n - 1 for n in layers if is_moe_layer(config, n)), len(layers)),
        # A width that is no multiple shows when the result is compared.
        "n_shared_experts": width // (config.moe_ffn_hidden_size or 1) if width else 0,
        "routed_scaling_factor": float(config.moe_router_topk_scaling_factor or 1.0),
    }


def _read_v2(config: ConfigJson) -> dict[str, Any]:
    if config.get("topk_method", "greedy") != "greedy" and (config.get("n_group") or 1) > 1:
        config.refuse("topk_method", "theirs scores a group by its best expert, ours by the sum of several")
    return {
        **_read_both(config, dense=0, shared=2),
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": config.like("routed_scaling_factor", 1.0),
    }


def _write_v2(model: Architecture) -> dict[str, Any]:
    return {**_write_both(model), "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1, "topk_group": 1}


def _read_v3(config: ConfigJson) -> dict[str, Any]:
    chosen, groups = config.integer("num_experts_per_tok"), config.integer("n_group", 8)
    allowed = config.integer("topk_group", 4)
    settings = {
        **_read_both(config, dense=3, shared=1),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config.like("routed_scaling_factor", 2.5),
    }
    config.values.setdefault("norm_topk_prob", True)
    config.only("norm_topk_prob", chosen > 1)
    if allowed == groups:
        return settings
    if chosen // allowed != 2:
        config.refuse(
            "topk_group",
            f"theirs scores a group by its 2 best experts, ours by num_experts_per_tok // topk_group ({chosen} // "
            f"{allowed})",
        )
    return {**settings, "moe_router_num_groups": groups, "moe_router_group_topk": allowed}


def _write_v3(model: Architecture) -> dict[str, Any]:
    config = model.transformer
    grouped = bool(config.moe_router_group_topk)
    return {
        **_write_both(model),
        "n_group": config.moe_router_num_groups if grouped else 1,
        "topk_group": config.moe_router_group_topk if grouped else 1,
        "norm_topk_prob": config.moe_router_topk > 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": config.mtp_num_layers or 0,
    }


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer=_LAYER_TABLE,
    fields=_FIELDS,
    fixed=_FIXED,
    only=_ONLY,
    aliases={"num_experts": "n_routed_experts"},
    read=_read_v2,
    write=_write_v2,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    prefix=PREFIX,
    outside=OUTSIDE,
    layer={**_LAYER_TABLE, "mlp.router.expert_bias": same(f"{LAYER}mlp.gate.e_score_correction_bias")},
    future=_FUTURE,
    future_copies=_FUTURE_COPIES,
    fields={**_FIELDS, "max_position_embeddings": Field("max_position_embeddings", 4096)},
    fixed=_FIXED,
    aliases={"num_local_experts": "n_routed_experts"},
    only={**_ONLY, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    read=_read_v3,
    write=_write_v3,
)
