"""GPTModel with experts against the Mixtral and Qwen3-MoE models of the `transformers` package, weights copied over.

Tiny random models, built from a configuration: nothing is downloaded. Written for transformers 5, where a layer's
experts are two stacked tensors (4.x has a module for each expert); last run with 5.23.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.transformer.moe.router import TopKRouter
from megatron_lite.transformer.transformer_config import TransformerConfig

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="compares with the models of transformers 5 or newer; see the dev extra"
)

VOCAB, LENGTH, BATCH, LAYERS, HIDDEN, FFN, EXPERT_FFN, HEADS, GROUPS, HEAD, EXPERTS = (
    61,
    24,
    5,
    3,
    32,
    40,
    24,
    4,
    2,
    8,
    8,
)

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.4,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "tie_word_embeddings": False,
}
MIXTRAL = {"intermediate_size": EXPERT_FFN, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN = {"intermediate_size": FFN, "moe_intermediate_size": EXPERT_FFN, "num_experts": EXPERTS, "num_experts_per_tok": 3}

# name: (class, its own settings, TransformerConfig, rotary base)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "mixtral": ("Mixtral", {**MIXTRAL, "rms_norm_eps": 1e-5}, {"moe_router_topk": 2, "layernorm_epsilon": 1e-5}, 1e6),
    "mixtral, every token to all experts, short waves": (
        "Mixtral",
        {**MIXTRAL, "num_experts_per_tok": EXPERTS, "rms_norm_eps": 1e-3, "head_dim": 6},
        {"moe_router_topk": EXPERTS, "layernorm_epsilon": 1e-3, "kv_channels": 6},
        100.0,
    ),
    "qwen3": (
        "Qwen3Moe",
        {**QWEN, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "head_dim": 16},
        {"moe_router_topk": 3, "layernorm_epsilon": 1e-6, "qk_layernorm": True, "kv_channels": 16},
        1e6,
    ),
    "qwen3, scores of the chosen not made 1, a dense layer": (
        "Qwen3Moe",
        {**QWEN, "norm_topk_prob": False, "rms_norm_eps": 1e-6, "head_dim": HEAD, "mlp_only_layers": [1]},
        {
            "moe_router_topk": 3,
            "moe_router_pre_softmax": True,
            "layernorm_epsilon": 1e-6,
            "qk_layernorm": True,
            "moe_layer_freq": [1, 0, 1],
            "ffn_hidden_size": FFN,
        },
        1e4,
    ),
}


class Float64Throughout(TorchFunctionMode):
    """Whatever asks for float32 gets float64: these models compute norms, softmaxes and angles in float32 always."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            return args[0].double()
        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    if dtype == torch.float32:
        yield
        return
    with Float64Throughout():
        yield


def fused_attention(theirs: Mapping[str, Tensor], prefix: str, head: int) -> Tensor:
    """[g (n/g + 2) d, h]: each group's queries, its key, its value."""
    parts = [theirs[f"{prefix}.{name}_proj.weight"].unflatten(0, (GROUPS, -1, head)) for name in ("q", "k", "v")]
    return torch.cat(parts, dim=1).flatten(0, 2)


def interleaved(gate: Tensor, up: Tensor, dim: int) -> Tensor:
    """Rows gate 0, up 0, gate 1, up 1, ..."""
    return torch.stack((gate, up), dim=dim + 1).flatten(dim, dim + 1)


def converted(theirs: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """Their weights (or gradients: nothing but their order changes) by our names."""
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    for number in range(LAYERS):
        old, new = f"model.layers.{number}", f"decoder.layers.{number}"
        ours[f"{new}.input_layernorm.weight"] = theirs[f"{old}.input_layernorm.weight"]
        ours[f"{new}.pre_mlp_layernorm.weight"] = theirs[f"{old}.post_attention_layernorm.weight"]
        ours[f"{new}.self_attention.linear_qkv.weight"] = fused_attention(theirs, f"{old}.self_attn", head)
        ours[f"{new}.self_attention.linear_proj.weight"] = theirs[f"{old}.self_attn.o_proj.weight"]
        for one in ("q", "k"):
            if f"{old}.self_attn.{one}_norm.weight" in theirs:
                ours[f"{new}.self_attention.{one}_layernorm.weight"] = theirs[f"{old}.self_attn.{one}_norm.weight"]
        if f"{old}.mlp.gate.weight" in theirs:
            ours[f"{new}.mlp.router.weight"] = theirs[f"{old}.mlp.gate.weight"]
            gate, up = theirs[f"{old}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
            ours[f"{new}.mlp.experts.weight1"] = interleaved(gate, up, 1)
            ours[f"{new}.mlp.experts.weight2"] = theirs[f"{old}.mlp.experts.down_proj"]
        else:
            gate, up = (theirs[f"{old}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
            ours[f"{new}.mlp.linear_fc1.weight"] = interleaved(gate, up, 0)
            ours[f"{new}.mlp.linear_fc2.weight"] = theirs[f"{old}.mlp.down_proj.weight"]
    return ours


def build_theirs(case: str, dtype: torch.dtype) -> nn.Module:
    family, settings, _, base = CASES[case]
    rotary = {"rope_type": "default", "rope_theta": base}
    config = getattr(transformers, f"{family}Config")(**COMMON, **settings, rope_parameters=rotary)
    torch.manual_seed(0)
    with precision(dtype):
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # so that norms do something, and routers of zeros choose
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=0.1)
    return model


def build_ours(case: str, dtype: torch.dtype) -> tuple[GPTModel, int]:
    """Without weights; and the width of a head."""
    _, _, settings, base = CASES[case]
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=EXPERT_FFN,
        moe_grouped_gemm=True,
        fp64=dtype == torch.float64,
        **{"ffn_hidden_size": FFN, **settings},
    )
    config.validate()
    model = GPTModel(
        config,
        VOCAB,
        LENGTH,
        make_vocab_size_divisible_by=1,
        position_embedding_type="rope",
        rotary_base=base,
    )
    assert config.kv_channels is not None
    return model, config.kv_channels


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest element."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, dtype: torch.dtype, tolerance: float) -> None:
    """Logits of five sequences, and the gradient of every weight.

    Mutations: softmax over all experts without making the sum of the chosen 1, or the reverse; gates and ups swapped
    in GroupedMLP; the probability of a row left out, or its gradient; norms without their epsilon; rotary pairs
    (2i, 2i + 1); moe_layer_freq shifted by a layer; keys and values given to the other group's queries.
    """
    theirs, (ours, head) = build_theirs(case, dtype), build_ours(case, dtype)
    ours.load_state_dict(converted(dict(theirs.named_parameters()), head), strict=False)
    assert {name for name, _ in ours.named_parameters()} == set(converted(dict(theirs.named_parameters()), head))

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    weights = torch.randn(BATCH, LENGTH, VOCAB, generator=generator, dtype=dtype)
    with precision(dtype):
        expected = theirs(ids).logits
        (expected * weights).sum().backward()
    actual = ours(ids, torch.arange(LENGTH).repeat(BATCH, 1))
    (actual * weights).sum().backward()

    assert expected.dtype == dtype
    assert largest_difference(actual, expected) < tolerance
    gradients = converted({name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}, head)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert largest_difference(parameter.grad, gradients[name]) < 10 * tolerance, name
    for router in (module for module in ours.modules() if isinstance(module, TopKRouter)):
        assert (router.tokens_per_expert > 0).all()  # no expert went untested
