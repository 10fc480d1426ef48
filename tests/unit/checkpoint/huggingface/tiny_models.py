"""A tiny random model of each family of `transformers`, written by it as a user's would be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="exchanges weights with transformers 5 or newer; see the dev extra"
)
pytest.importorskip("safetensors", reason="Hugging Face weights are safetensors; see the hf extra")

VOCAB, LAYERS, LENGTH, BATCH = 61, 2, 24, 3

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.5,
    "original_max_position_embeddings": 16,
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# name: (class without its ending, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {
            **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
            **{"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None},
        },
    ),
    "llama2": ("LlamaForCausalLM", {**COMMON, "rms_norm_eps": 1e-5, "num_key_value_heads": 4}),
    "llama3": ("LlamaForCausalLM", {**COMMON, "head_dim": 12, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralForCausalLM", {**COMMON, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", COMMON),
    "qwen2 with windows": (
        "Qwen2ForCausalLM",
        {**COMMON, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**COMMON, "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": _YARN},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {**COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "mixtral": ("MixtralForCausalLM", {**COMMON, "num_local_experts": 8}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            **{**COMMON, "num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "head_dim": 12},
            **{"norm_topk_prob": True, "mlp_only_layers": [0]},
        },
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **{**COMMON, **_LATENT, "q_lora_rank": None, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5},
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **{**COMMON, **_LATENT, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **{**COMMON, "head_dim": 16, "sliding_window": 5, "num_local_experts": 8, "num_experts_per_tok": 3},
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
}
WITH_EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


def build(name: str, **changes: Any) -> nn.Module:
    """A model of theirs with random weights, norms, biases and sinks too."""
    kind, settings = MODELS[name]
    prefix = kind.replace("LMHeadModel", "").replace("ForCausalLM", "")
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Add random numbers to all weights, norms, biases and sinks too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *_biases_of_routers(model)]:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)


def config_values(name: str) -> dict[str, Any]:
    """A config.json as a user would write it, with the settings above alone."""
    kind, settings = MODELS[name]
    prefix = kind.replace("LMHeadModel", "").replace("ForCausalLM", "")
    return {"model_type": getattr(transformers, f"{prefix}Config").model_type, **settings}


def _biases_of_routers(model: nn.Module) -> list[Tensor]:
    return [one for name, one in model.named_buffers() if name.endswith("e_score_correction_bias")]


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Build a model and write it the way its users do."""
    model = build(name, **changes).to(dtype)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def save_tokenizer(folder: Path, begins_with: str | None = None) -> None:
    """Byte pair encoding with 300 tokens, as a user's folder has it; the end of a document is <|endoftext|>.

    Args:
        folder: to write to.
        begins_with: a token put before each text, as Llama's tokenizers do.
    """
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", *([begins_with] if begins_with else [])]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if begins_with:
        first = (begins_with, tokenizer.token_to_id(begins_with))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{begins_with} $A", None, [first])
        names["bos_token"] = begins_with
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def tokens() -> Tensor:
    """[b, s]"""
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def logits_of(model: nn.Module) -> Tensor:
    """[b, s, V] of theirs."""
    with torch.no_grad():
        logits: Tensor = model(tokens()).logits
    return logits


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest element."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
