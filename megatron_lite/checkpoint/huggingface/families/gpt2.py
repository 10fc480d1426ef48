"""GPT-2: matrices the other way around, queries, keys and values in one."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.sources import Source, queries_keys_values, same, vocabulary
from megatron_lite.checkpoint.huggingface.config_json import REQUIRED, ConfigJson
from megatron_lite.checkpoint.huggingface.family import Family, Field

_LAYER = "transformer.h.{layer}."


def _read(config: ConfigJson) -> dict[str, Any]:
    width = config.integer("n_inner", 4 * config.integer("n_embd"))
    function = config.get("activation_function", "gelu_new")
    if function not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        config.refuse("activation_function", "must be gelu_new, gelu_pytorch_tanh or gelu")
    return {"ffn_hidden_size": width, "bias_gelu_fusion": function != "gelu", "openai_gelu": False}


def _write(model: Architecture) -> dict[str, Any]:
    config = model.transformer
    tanh = config.bias_gelu_fusion or config.openai_gelu
    return {"n_inner": config.ffn_hidden_size, "activation_function": "gelu_new" if tanh else "gelu"}


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    outside={
        "embedding.word_embeddings.weight": (Source("transformer.wte.weight", vocabulary),),
        "embedding.position_embeddings.weight": same("transformer.wpe.weight"),
        "decoder.final_layernorm.weight": same("transformer.ln_f.weight"),
        "decoder.final_layernorm.bias": same("transformer.ln_f.bias"),
        "output_layer.weight": (Source("lm_head.weight", vocabulary),),
    },
    layer={
        "input_layernorm.weight": same(f"{_LAYER}ln_1.weight"),
        "input_layernorm.bias": same(f"{_LAYER}ln_1.bias"),
        "self_attention.linear_qkv.weight": (Source(f"{_LAYER}attn.c_attn.weight", queries_keys_values, True),),
        "self_attention.linear_qkv.bias": (Source(f"{_LAYER}attn.c_attn.bias", queries_keys_values),),
        "self_attention.linear_proj.weight": (Source(f"{_LAYER}attn.c_proj.weight", transposed=True),),
        "self_attention.linear_proj.bias": same(f"{_LAYER}attn.c_proj.bias"),
        "pre_mlp_layernorm.weight": same(f"{_LAYER}ln_2.weight"),
        "pre_mlp_layernorm.bias": same(f"{_LAYER}ln_2.bias"),
        "mlp.linear_fc1.weight": (Source(f"{_LAYER}mlp.c_fc.weight", transposed=True),),
        "mlp.linear_fc1.bias": same(f"{_LAYER}mlp.c_fc.bias"),
        "mlp.linear_fc2.weight": (Source(f"{_LAYER}mlp.c_proj.weight", transposed=True),),
        "mlp.linear_fc2.bias": same(f"{_LAYER}mlp.c_proj.bias"),
    },
    fields={
        "n_layer": Field("num_layers", REQUIRED),
        "n_embd": Field("hidden_size", REQUIRED),
        "n_head": Field("num_attention_heads", REQUIRED),
        "n_positions": Field("max_position_embeddings", 1024),
        "vocab_size": Field("vocab_size", REQUIRED),
        "layer_norm_epsilon": Field("layernorm_epsilon", 1e-5),
        "tie_word_embeddings": Field("share_embeddings_and_output_weights", True),
    },
    fixed={"normalization": "LayerNorm", "add_bias_linear": True, "position_embedding_type": "learned_absolute"},
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    read=_read,
    write=_write,
)
