"""Generators: config.json files with fields absent, null, usual, odd or contradicted; and models of ours."""

import random
from collections.abc import Iterator
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import OF_GPT, Architecture, architecture_of
from megatron_lite.checkpoint.huggingface import flags_of
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.errors import ConfigError
from tests.unit.checkpoint.huggingface import tiny_models

ABSENT = "(absent)"
HEADS: dict[str, list[Any]] = {
    "num_key_value_heads": [ABSENT, None, 1, 2, 4, 3],
    "head_dim": [ABSENT, None, 8, 12, 6, 0],
    "hidden_size": [36, 32, "32", 32.0],
    "rms_norm_eps": [ABSENT, None, 1e-2, 1e-6, "1e-5", 1],
    "hidden_act": [ABSENT, None, "silu", "swish", "gelu", "relu"],
    "tie_word_embeddings": [ABSENT, None, True, False, "true"],
    "max_position_embeddings": [ABSENT, None, 32, 128],
    "attention_bias": [ABSENT, None, True, False],
    "mlp_bias": [ABSENT, True, False],
    "sliding_window": [ABSENT, None, 3, 1, 0],
    "layer_types": [
        ABSENT,
        None,
        ["full_attention", "sliding_attention"],
        ["sliding_attention"] * 2,
        ["full_attention"] * 2,
        ["full_attention"],
        ["attention"] * 2,
    ],
    "per_layer_config": [None, {"1": {"intermediate_size": 24}}],
    "is_causal": [ABSENT, None, True, False],
    "attention_dropout": [ABSENT, 0.1],
    "initializer_range": [ABSENT, 0.1],
    "pretraining_tp": [2],
    "attn_logit_softcapping": [5.0],
    "architectures": [None, ["Other"]],
    "auto_map": [{"AutoModelForCausalLM": "modeling.Other"}],
    "something_else": [7],
}
QWEN: dict[str, list[Any]] = {
    "use_sliding_window": [ABSENT, True, True, False, None],
    "max_window_layers": [ABSENT, None, 0, 1, 2, -1],
}
DEEPSEEK: dict[str, list[Any]] = {
    "q_lora_rank": [ABSENT, None, 20],
    "kv_lora_rank": [ABSENT, None, 12],
    "v_head_dim": [ABSENT, None, 10, 24],
    "qk_nope_head_dim": [ABSENT, 6, 8],
    "qk_rope_head_dim": [8, 4, 7],
    "first_k_dense_replace": [ABSENT, None, 0, 1, 2, 3],
    "n_shared_experts": [ABSENT, None, 0, 1, 2],
    "num_experts_per_tok": [ABSENT, None, 1, 2, 4],
    "routed_scaling_factor": [ABSENT, None, 1.0, 1.7, 2],
    "n_group": [ABSENT, None, 1, 2, 4],
    "topk_group": [ABSENT, None, 1, 2, 4],
    "topk_method": [ABSENT, None, "greedy", "group_limited_greedy", "noaux_tc"],
    "norm_topk_prob": [ABSENT, None, True, False],
    "scoring_func": [ABSENT, None, "sigmoid", "softmax"],
    "rope_interleave": [ABSENT, None, True, False],
    "moe_layer_freq": [ABSENT, 1, 2],
    "n_routed_experts": [8, 4],
    "num_experts": [4],
    "num_local_experts": [4],
    "num_nextn_predict_layers": [0, 1],
    "num_mtp_layers": [0, 1],
}
FIELDS: dict[str, dict[str, list[Any]]] = {
    "gpt2": {
        "n_inner": [ABSENT, None, 24],
        "hidden_size": [16, 32],
        "num_hidden_layers": [1],
        "num_attention_heads": [2],
        "max_position_embeddings": [32],
        "n_ctx": [16],
        "activation_function": [ABSENT, None, "gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu"],
        "layer_norm_epsilon": [ABSENT, None, 1e-2, 1],
        "tie_word_embeddings": [ABSENT, None, True, False],
        "scale_attn_weights": [ABSENT, None, True, False],
        "scale_attn_by_inverse_layer_idx": [ABSENT, True, False],
        "reorder_and_upcast_attn": [ABSENT, True],
        "add_cross_attention": [ABSENT, True],
        "resid_pdrop": [ABSENT, 0.5],
        "rope_scaling": [{"rope_type": "linear", "factor": 2.0}],
        "per_layer_config": [{"1": {"n_inner": 24}}],
    },
    "llama2": HEADS,
    "llama3": HEADS,
    "mistral": HEADS,
    "phi3": {**HEADS, "resid_pdrop": [ABSENT, 0.1], "partial_rotary_factor": [ABSENT, 0.5, 0.25, 0.3, 1.0]},
    "qwen2": {**HEADS, **QWEN},
    "qwen2 with windows": {**HEADS, **QWEN},
    "qwen3": {**HEADS, **QWEN},
    "mixtral": {**HEADS, "num_experts_per_tok": [ABSENT, 1, 3], "num_experts": [4], "num_local_experts": [4, 8]},
    "qwen3_moe": {
        **HEADS,
        **QWEN,
        "num_experts": [4, 8],
        "num_local_experts": [4],
        "norm_topk_prob": [ABSENT, None, True, False],
        "decoder_sparse_step": [ABSENT, 1, 2, 0],
        "mlp_only_layers": [ABSENT, None, [], [1], [0, 1]],
        "num_experts_per_tok": [1, 3, 8],
        "shared_expert_intermediate_size": [24],
    },
    "deepseek_v2": {**HEADS, **DEEPSEEK},
    "deepseek_v3": {**HEADS, **DEEPSEEK},
    "gpt_oss": {
        **HEADS,
        "swiglu_limit": [ABSENT, None, 1.0, 7],
        "swiglu_alpha": [ABSENT, 1.702, 1.0],
        "num_experts_per_tok": [ABSENT, 1, 3],
        "num_experts": [4],
    },
}


def folders(seed: int, count: int) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(fields that were changed, config.json), out of the tiny models in turn."""
    generator = random.Random(seed)
    names = list(FIELDS)
    for number in range(count):
        yield _case(generator, names[number % len(names)])


def _case(generator: random.Random, name: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    values = tiny_models.config_values(name)
    changed: dict[str, Any] = {}
    if name != "gpt2" and generator.random() < 0.6:
        changed |= _positions(generator)
    fields = generator.sample(
        list(FIELDS[name]), generator.choice([0, 1, 1, 2, 3]) if changed else 1 + generator.randrange(3)
    )
    changed |= {key: generator.choice(FIELDS[name][key]) for key in fields}
    values |= changed
    return tuple(changed), {key: value for key, value in values.items() if value is not ABSENT}


def _positions(generator: random.Random) -> dict[str, Any]:
    """Some of the members that describe rotary positions."""
    choices: dict[str, list[Any]] = {
        "rope_theta": [ABSENT, None, 100.0, 5000, 10],
        "rope_scaling": [ABSENT, None, {}, 1, 1, 1],
        "rope_parameters": [ABSENT, None, {}, 1, 1, 1],
        "partial_rotary_factor": [None, 0.5, 1.0],
        "original_max_position_embeddings": [16, 8192, None],
    }
    weights = {"partial_rotary_factor": 0.15, "original_max_position_embeddings": 0.15}
    chosen = {key: generator.choice(one) for key, one in choices.items() if generator.random() < weights.get(key, 0.7)}
    return {key: _rope(generator) if value == 1 and type(value) is int else value for key, value in chosen.items()}


def _rope(generator: random.Random) -> dict[str, Any]:
    """One description of rotary positions."""
    kind = generator.choice(
        ["default", "linear", "llama3", "yarn", "yarn", "yarn", "longrope", "dynamic", None, "other"]
    )
    rope: dict[str, Any] = {"rope_theta": [ABSENT, None, 50.0, 1e6][generator.choice([0, 0, 2, 3, 1])]}
    if kind in ("linear", "llama3", "yarn", "dynamic", "longrope"):
        rope["factor"] = generator.choice([4.0, 2, 1.0, 8.0, None, ABSENT, 0.5])
    if kind == "llama3":
        rope |= {
            "low_freq_factor": generator.choice([1.0, 1, 1.0, 2.0, ABSENT]),
            "high_freq_factor": generator.choice([4.0, 4, 4.0, 8.0]),
            "original_max_position_embeddings": generator.choice([8192, 8192, 16, ABSENT]),
        }
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": generator.choice([16, 64, 4096, 10**6, ABSENT, None]),
            "beta_fast": generator.choice([ABSENT, None, 0, 4.0, 32]),
            "beta_slow": generator.choice([ABSENT, None, 0, 1.5, 1]),
            "truncate": generator.choice([ABSENT, ABSENT, None, True, False]),
            "mscale": generator.choice([ABSENT, ABSENT, None, 0, 0.7, 1.0]),
            "mscale_all_dim": generator.choice([ABSENT, ABSENT, None, 0, 0.7, 1.0]),
            "attention_factor": generator.choice([ABSENT, ABSENT, ABSENT, None, 1.0, 1.3]),
        }
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    rope["partial_rotary_factor"] = generator.choice([ABSENT] * 6 + [None, 1.0, 0.5])
    if kind != "yarn":
        rope["mscale_all_dim"] = generator.choice([ABSENT] * 6 + [0.7])
    rope["type"], rope["rope_type"] = generator.choice([(kind, ABSENT), (ABSENT, kind), ("linear", kind), (kind, kind)])
    rope = {key: value for key, value in rope.items() if value is not ABSENT}
    return {"full_attention": rope} if generator.random() < 0.05 else rope


OURS: dict[str, list[Any]] = {
    "rotary_percent": [0.5, 0.25, 0.3, 1.0],
    "rotary_base": [50, 1e4],
    "rotary_interleaved": [True],
    "rotary_seq_len_interpolation_factor": [None, 2, 2.0],
    "use_rope_scaling": [True, False],
    "rope_scaling_factor": [4.0],
    "rotary_scaling_factor": [1.0, 4, 2.0],
    "position_embedding_type": ["rope", "rope", "yarn", "learned_absolute", "none"],
    "rope_type": [None, "rope", "yarn"],
    "yarn_original_max_position_embeddings": [16, 4096, 10**6],
    "yarn_beta_fast": [4.0, 32],
    "yarn_correction_range_round_to_int": [True, False],
    "mscale": [0.7, 1.0],
    "mscale_all_dim": [0.7, 0.0],
    "share_embeddings_and_output_weights": [True, False],
    "max_position_embeddings": [None, 32],
    "hidden_size": [36, 30],
    "num_attention_heads": [8, 4],
    "normalization": ["LayerNorm", "RMSNorm"],
    "layernorm_epsilon": [1e-2, 1e-6],
    "layernorm_zero_centered_gamma": [True],
    "add_bias_linear": [True, False],
    "add_qkv_bias": [True, False],
    "swiglu": [True, False],
    "bias_gelu_fusion": [True, False],
    "openai_gelu": [True],
    "squared_relu": [True],
    "qk_layernorm": [True, False],
    "num_query_groups": [1, 2, 4, None],
    "kv_channels": [8, 12, 6],
    "ffn_hidden_size": [24, 33],
    "window_size": [(4, 0), (0, 0), (-1, 0), None],
    "window_attn_skip_freq": [2, [1, 0], [0, 1], [0, 0], None],
    "no_rope_freq": [2, [0, 1]],
    "softmax_type": ["vanilla", "learnable", "off-by-one"],
    "softmax_scale": [0.3],
    "attention_output_gate": [True],
    "activation_func_clamp_value": [None, 1, 0.5],
    "glu_linear_offset": [0.0, 1],
    "moe_layer_freq": [1, 2, [0, 1], [1, 0]],
    "moe_ffn_hidden_size": [24, 16],
    "moe_router_topk": [1, 2, 3, 4],
    "moe_router_pre_softmax": [True, False],
    "moe_router_score_function": ["softmax", "sigmoid"],
    "moe_router_enable_expert_bias": [True, False],
    "moe_router_topk_scaling_factor": [None, 1.7, 2],
    "moe_router_num_groups": [None, 2, 4],
    "moe_router_group_topk": [None, 1, 2],
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn", "none"],
    "moe_shared_expert_intermediate_size": [None, 24, 48, 30],
    "moe_shared_expert_gate": [True, False],
    "q_lora_rank": [None, 20],
    "v_head_dim": [10, 16],
}


def architectures(seed: int, count: int) -> Iterator[tuple[dict[str, Any], Architecture]]:
    """(settings that were changed, model of ours), out of the tiny models in turn; those against our rules left out."""
    generator = random.Random(seed)
    names = list(FIELDS)
    for number in range(count):
        values = tiny_models.config_values(names[number % len(names)])
        settings = flags_of(FAMILIES[values["model_type"]], ConfigJson("it", values))
        keys = generator.sample(list(OURS), generator.choice([1, 1, 2, 2, 3, 4]))
        changed = {key: generator.choice(OURS[key]) for key in keys}
        for key, value in changed.items():
            settings["gpt" if key in OF_GPT else "transformer"][key] = value
        try:
            yield changed, architecture_of(settings)
        except ConfigError:
            continue
