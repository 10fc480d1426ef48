"""GPTModel against models of the `transformers` package, family by family, weights copied over.

Tiny random models, built from a configuration: nothing is downloaded. Mixtral, and Qwen3-MoE without YaRN, are
compared in test_huggingface_moe.py. Written for transformers 5; last run with 5.24.

Bases of the rotary wavelengths are small, so that of few pairs of channels several turn about once in a sequence.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.moe.router import TopKRouter
from megatron_lite.transformer.rope import RotaryEmbedding, YarnScaling
from megatron_lite.transformer.transformer_config import TransformerConfig

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="compares with the models of transformers 5 or newer; see the dev extra"
)

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from tests.unit.models.gpt.huggingface_weights import GROUPS, add_noise, converted, load_theirs  # noqa: E402
from tests.unit.models.gpt.test_huggingface_moe import largest_difference, precision  # noqa: E402

VOCAB, BATCH, LAYERS, HIDDEN, HEADS, FFN, EXPERT_FFN, EXPERTS = 61, 3, 4, 32, 4, 40, 24, 8
LONG = 80  # longer than every window, and than every original context of YaRN here

Positions = tuple[dict[str, Any], dict[str, Any]]  # in their words and in ours

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="fp32", marks=pytest.mark.full),
        pytest.param(torch.float64, 1e-9, id="fp64"),
    ],
)


@dataclass(frozen=True)
class Case:
    """One model: its class there, its settings in their words and in ours, and how many tokens are compared."""

    family: str
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    gpt: dict[str, Any] = field(default_factory=dict)
    length: int = 24


LATENT = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_head_dim": 6, "qk_pos_emb_head_dim": 16, "v_head_dim": 10}
NAMES_OF_LATENT = {"qk_head_dim": "qk_nope_head_dim", "qk_pos_emb_head_dim": "qk_rope_head_dim"}
EXPERT_WIDTHS = {"num_moe_experts": EXPERTS, "moe_ffn_hidden_size": EXPERT_FFN}
DEEPSEEK_V3_ROUTER = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
}


def rotary(base: float) -> Positions:
    """Plain rotary positions."""
    return {"rope_type": "default", "rope_theta": base}, {"position_embedding_type": "rope", "rotary_base": base}


def yarn(factor: float, **scales: float) -> Positions:
    """YaRN from a context of 64, with a ramp over half of eight pairs; scales are mscale and mscale_all_dim."""
    theirs = {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": factor,
        "beta_fast": 8.0,
        "beta_slow": 1.5,
        "original_max_position_embeddings": 64,
        **scales,
    }
    ours = {
        "position_embedding_type": "yarn",
        "rotary_base": 100.0,
        "rotary_scaling_factor": factor,
        "yarn_beta_fast": 8.0,
        "yarn_beta_slow": 1.5,
        "yarn_original_max_position_embeddings": 64,
        **scales,
    }
    return theirs, ours


def deepseek(
    family: str,
    positions: Positions,
    router: dict[str, Any],
    theirs: dict[str, Any],
    position_embedding_type: str,
) -> Case:
    """Latent attention, a dense layer before those with experts, and shared experts; widths may be in `router`.

    Ours calls positions with YaRN "yarn" or "rope", which in latent attention means the same.
    """
    ours = {**LATENT, **router}
    latent = {NAMES_OF_LATENT.get(name, name): ours[name] for name in LATENT}
    gpt = {**positions[1], "position_embedding_type": position_embedding_type}
    return Case(
        family,
        {
            **latent,
            "num_key_value_heads": HEADS,
            "rms_norm_eps": 1e-6,
            "moe_intermediate_size": EXPERT_FFN,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": ours["moe_router_topk"],
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": positions[0],
            **theirs,
        },
        {
            **EXPERT_WIDTHS,
            "multi_latent_attention": True,
            "num_query_groups": HEADS,
            "qk_layernorm": True,
            "moe_layer_freq": [0, 1, 1, 1],
            "moe_shared_expert_intermediate_size": 2 * EXPERT_FFN,
            **ours,
        },
        gpt,
        LONG,
    )


def deepseek_v3(positions: Positions, **widths: Any) -> Case:
    theirs = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    kind = positions[1]["position_embedding_type"]
    return deepseek("DeepseekV3", positions, {**DEEPSEEK_V3_ROUTER, **widths}, theirs, kind)


def check(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Logits, and the gradient of every weight, as theirs."""
    theirs, ours = build_theirs(case, dtype), build_ours(case, dtype)
    load_theirs(ours, theirs, case.family)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (BATCH, case.length), generator=generator)
    weights = torch.randn(BATCH, case.length, VOCAB, generator=generator, dtype=dtype)
    with precision(dtype):
        expected = theirs(ids).logits
        (expected * weights).sum().backward()
    actual = ours(ids, torch.arange(case.length).repeat(BATCH, 1))
    (actual * weights).sum().backward()

    assert expected.dtype == dtype
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=tolerance, atol=tolerance)
    gradients = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}
    converted_gradients = converted(gradients, case.family)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert largest_difference(parameter.grad, converted_gradients[name]) < 10 * tolerance, name
    for router in (module for module in ours.modules() if isinstance(module, TopKRouter)):
        assert (router.tokens_per_expert > 0).all()  # no expert went untested


def build_theirs(case: Case, dtype: torch.dtype) -> nn.Module:
    positions = case.theirs["rope_parameters"]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": int(
            positions.get("factor", 1) * positions.get("original_max_position_embeddings", LONG)
        ),
        "initializer_range": 0.2,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **case.theirs,
    }
    config = getattr(transformers, f"{case.family}Config")(**settings)
    torch.manual_seed(0)
    with precision(dtype):
        model: nn.Module = getattr(transformers, f"{case.family}ForCausalLM")(config).to(dtype).eval()
    add_noise(model)
    return model


def build_ours(case: Case, dtype: torch.dtype) -> GPTModel:
    """Without weights."""
    settings = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "ffn_hidden_size": FFN,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "moe_grouped_gemm": True,
        "fp64": dtype == torch.float64,
        **case.ours,
    }
    config = TransformerConfig(**settings)
    config.validate()
    gpt = GPTModelConfig(
        **{"share_embeddings_and_output_weights": False, "make_vocab_size_divisible_by": 1, **case.gpt}
    )
    gpt.validate()
    return build_gpt_model(config, gpt, VOCAB, LONG)


DEEPSEEK_V3 = {
    "plain rotary positions": deepseek_v3(rotary(100.0)),
    "queries without a latent, values wider than keys": deepseek_v3(rotary(1e4), q_lora_rank=None, v_head_dim=26),
    "yarn": deepseek_v3(yarn(40.0, mscale=1.0, mscale_all_dim=1.0)),
    "yarn, two scales, queries without a latent": deepseek_v3(
        yarn(40.0, mscale=0.8, mscale_all_dim=0.5), q_lora_rank=None
    ),
    "yarn without scale of all channels": deepseek_v3(yarn(8.0)),
}


@PRECISIONS
@pytest.mark.parametrize("case", DEEPSEEK_V3)
def test_deepseek_v3(case: str, dtype: torch.dtype, tolerance: float) -> None:
    """Latent attention, and a router with sigmoid scores, groups and a bias.

    Mutations in attention: the scale with YaRN's temperature once instead of squared, of mscale instead of
    mscale_all_dim, or without it; cos and sin not multiplied by the factor, or by that of mscale alone; a scale of the
    wider of keys and values; rotary pairs half a width apart; keys that are not rotated, or rotated before the other
    channels; value rows before key rows; rotary rows before those of the latent; a latent without its norm; the last
    channels of filled-up values.
    Mutations in the experts: the bias added to the weights too, or not at all; groups scored by their best expert, or
    no groups; no scaling; scores whose sum is not made 1; no shared expert; moe_layer_freq shifted by a layer.
    """
    check(DEEPSEEK_V3[case], dtype, tolerance)


DEEPSEEK_V2 = {
    "greedy": deepseek(
        "DeepseekV2",
        yarn(40.0, mscale=0.707, mscale_all_dim=0.707),
        {
            "q_lora_rank": None,
            "moe_router_topk": 3,
            "moe_router_pre_softmax": True,
            "moe_router_topk_scaling_factor": 1.5,
        },
        {"topk_method": "greedy", "routed_scaling_factor": 1.5},
        "rope",
    ),
    "plain rotary positions, queries with a latent": deepseek(
        "DeepseekV2",
        rotary(1e4),
        {"moe_router_topk": 2, "moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 4.0},
        {"topk_method": "greedy", "routed_scaling_factor": 4.0},
        "rope",
    ),
}


@PRECISIONS
@pytest.mark.parametrize("case", DEEPSEEK_V2)
def test_deepseek_v2(case: str, dtype: torch.dtype, tolerance: float) -> None:
    """Softmax over all experts, whose chosen scores are not made 1; YaRN by position_embedding_type rope.

    The choice of the largest model, group_limited_greedy, is not here: theirs scores a group by its best expert, ours,
    like Megatron, by the sum of its best topk / group_topk.

    Mutations: the sum of the chosen scores made 1; no scaling; rope without YaRN; the scale without YaRN's temperature.
    """
    check(DEEPSEEK_V2[case], dtype, tolerance)


def gpt_oss() -> Case:
    theirs, ours = yarn(32.0)
    return Case(
        "GptOss",
        {
            "head_dim": 16,
            "initializer_range": 0.3,
            "intermediate_size": EXPERT_FFN,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {**theirs, "truncate": False},
        },
        {
            **EXPERT_WIDTHS,
            "kv_channels": 16,
            "softmax_type": "learnable",
            "window_size": (4, 0),
            "window_attn_skip_freq": 2,
            "add_bias_linear": True,
            "swiglu": False,
            "quick_geglu": True,
            "activation_func_clamp_value": 7.0,
            "glu_linear_offset": 1.0,
            "moe_router_topk": 3,
            "layernorm_epsilon": 1e-5,
        },
        {**ours, "yarn_correction_range_round_to_int": False},
        LONG,
    )


@PRECISIONS
def test_gpt_oss(dtype: torch.dtype, tolerance: float) -> None:
    """Sinks, windows in every other layer, YaRN, clamped gates and ups, biases everywhere, the router's too.

    Mutations: windows one wider, or in the other layers; sinks left out, of score 0, or scaled like other scores; gates
    cut off below too; ups cut off above only; no clamp; ups without offset, or with it before the clamp; 1.7 for 1.702;
    the ends of YaRN's ramp rounded; the second bias of experts not weighted by the router; their first bias in the
    order of storage; no bias of the router.
    """
    check(gpt_oss(), dtype, tolerance)


QWEN3 = {"head_dim": 16, "rms_norm_eps": 1e-6}
QWEN3_YARN = yarn(4.0)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_OURS = {"position_embedding_type": "rope", "rotary_base": 5e5, "use_rope_scaling": True}
DENSE = {
    "qwen2, biases of queries, keys and values": Case(
        "Qwen2",
        {"rope_parameters": rotary(1e4)[0], "rms_norm_eps": 1e-6},
        {"add_qkv_bias": True},
        rotary(1e4)[1],
    ),
    "qwen3": Case(
        "Qwen3",
        {**QWEN3, "rope_parameters": rotary(1e6)[0]},
        {"kv_channels": 16, "qk_layernorm": True},
        rotary(1e6)[1],
    ),
    "qwen3, yarn": Case(
        "Qwen3",
        {**QWEN3, "rope_parameters": QWEN3_YARN[0]},
        {"kv_channels": 16, "qk_layernorm": True},
        QWEN3_YARN[1],
        LONG,
    ),
    "llama, biases everywhere": Case(
        "Llama",
        {"rope_parameters": rotary(1e4)[0], "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-6},
        {"add_bias_linear": True},
        rotary(1e4)[1],
    ),
    "llama 3.1": Case(
        "Llama",
        {"head_dim": 16, "rms_norm_eps": 1e-5, "rope_parameters": {**LLAMA3, "factor": 8.0}},
        {"kv_channels": 16, "layernorm_epsilon": 1e-5},
        LLAMA3_OURS,
        LONG,
    ),
    "llama 3.2, tied embeddings": Case(
        "Llama",
        {
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {**LLAMA3, "factor": 32.0},
            "tie_word_embeddings": True,
        },
        {"kv_channels": 16, "layernorm_epsilon": 1e-5},
        {**LLAMA3_OURS, "rope_scaling_factor": 32.0, "share_embeddings_and_output_weights": True},
        LONG,
    ),
    "smollm3, layers without positions": Case(
        "SmolLM3",
        {"rope_parameters": rotary(100.0)[0], "no_rope_layers": [1, 1, 0, 1]},
        {"no_rope_freq": [0, 0, 1, 0]},
        rotary(100.0)[1],
    ),
    "smollm3, every other layer, windows there": Case(
        "SmolLM3",
        {
            "rope_parameters": rotary(100.0)[0],
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        {"no_rope_freq": 2, "window_size": (4, 0), "window_attn_skip_freq": [0, 1, 0, 1]},
        rotary(100.0)[1],
    ),
}


@PRECISIONS
@pytest.mark.parametrize("case", DENSE)
def test_dense(case: str, dtype: torch.dtype, tolerance: float) -> None:
    """Llama, Qwen2, Qwen3 and SmolLM3.

    Mutations: keys and values swapped; biases of gates and ups in the order of storage; heads normed after rotation;
    Llama 3's blend from another wavelength, or none; its factor always 8; the ends of YaRN's ramp not rounded; layers
    without positions and the others exchanged, shifted by one, the first of every N, or all rotated; windows in the
    layers that a list leaves out; other weights than the embeddings' in a tied output layer.
    """
    check(DENSE[case], dtype, tolerance)


QWEN3_EXPERTS = {
    "moe_intermediate_size": EXPERT_FFN,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
QWEN3_EXPERTS_OURS = {**EXPERT_WIDTHS, "moe_router_topk": 3, "qk_layernorm": True, "kv_channels": 16}


@PRECISIONS
def test_qwen3_moe_with_yarn(dtype: torch.dtype, tolerance: float) -> None:
    """Mutations: softmax over all experts; YaRN without temperature; its betas swapped, or kept and interpolated pairs;
    heads normed after rotation.
    """
    theirs = {**QWEN3, **QWEN3_EXPERTS, "rope_parameters": QWEN3_YARN[0]}
    check(Case("Qwen3Moe", theirs, QWEN3_EXPERTS_OURS, QWEN3_YARN[1], LONG), dtype, tolerance)


@PRECISIONS
def test_qwen3_next(dtype: torch.dtype, tolerance: float) -> None:
    """Its layers of full attention: gates of the output, norms of weight 1 + w, a quarter of the channels rotated.

    Mutations: no gate of the output, or no sigmoid; gates and queries swapped; gates normed like queries; no gate of
    the shared experts; all channels rotated; norms of weight w.
    """
    theirs = {
        **QWEN3,
        **QWEN3_EXPERTS,
        "layer_types": ["full_attention"] * LAYERS,
        "shared_expert_intermediate_size": FFN,
        "rope_parameters": {**rotary(100.0)[0], "partial_rotary_factor": 0.25},
    }
    ours = {
        **QWEN3_EXPERTS_OURS,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
        "moe_shared_expert_intermediate_size": FFN,
        "moe_shared_expert_gate": True,
    }
    check(Case("Qwen3Next", theirs, ours, {**rotary(100.0)[1], "rotary_percent": 0.25}), dtype, tolerance)


DECODED = {
    "latent attention": DEEPSEEK_V3["yarn, two scales, queries without a latent"],
    "latent attention, wide values": DEEPSEEK_V3["queries without a latent, values wider than keys"],
    "sinks and windows": gpt_oss(),
    "windows and layers without positions": DENSE["smollm3, every other layer, windows there"],
}


@pytest.mark.parametrize("case", DECODED)
@pytest.mark.parametrize("first", [1, 7])
def test_token_by_token(case: str, first: int) -> None:
    """Decoding with a cache, after a prompt of one or seven tokens, gives the logits of the whole sequence.

    Mutations: positions that do not go on from the cache; new queries at the places of the first keys; one query that
    sees beyond its window, by one position or wholly, or has no sink; two layers with one memory.
    """
    ours = build_ours(DECODED[case], torch.float64).eval()
    load_theirs(ours, build_theirs(DECODED[case], torch.float64), DECODED[case].family)
    ids = torch.randint(0, VOCAB, (BATCH, 24), generator=torch.Generator().manual_seed(3))
    context = InferenceContext(BATCH, 24)
    with torch.no_grad():
        whole = ours(ids, torch.arange(24).repeat(BATCH, 1))
        parts = [
            ours(part, context.next_positions(part.size(1), ids.device), inference_context=context)
            for part in ids.split([first] + [1] * (24 - first), dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-11)


RELEASED: dict[str, tuple[dict[str, Any], RotaryEmbedding]] = {
    "DeepSeek-V3": (
        {
            "head_dim": 64,
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        RotaryEmbedding(64, rotary_base=1e4, yarn=YarnScaling(40.0, mscale_all_dim=1.0)),
    ),
    "gpt-oss": (
        {
            "head_dim": 64,
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        RotaryEmbedding(64, rotary_base=150000, yarn=YarnScaling(32.0, correction_range_round_to_int=False)),
    ),
    "Llama 3.1": (
        {**LLAMA3, "head_dim": 128, "factor": 8.0},
        RotaryEmbedding(128, rotary_base=5e5, rope_scaling=True),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_frequencies_of_released_models(name: str) -> None:
    """Widths, bases and contexts of the released models, where several pairs lie on the ramp.

    Mutations: YaRN's ramp with rounded ends, or without; Llama 3's blend from another wavelength, or none; cos and sin
    not divided by the temperature of all channels.
    """
    settings, ours = RELEASED[name]
    rope = {**settings}
    width = rope.pop("head_dim")
    length = int(rope["factor"] * rope["original_max_position_embeddings"])
    config = transformers.LlamaConfig(head_dim=width, max_position_embeddings=length, rope_parameters=rope)
    with precision(torch.float64):
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(ours.inverse_frequencies, frequencies, rtol=1e-13, atol=0.0)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-13)
