"""GPTModel against a GPT in plain torch: logits, losses and every gradient, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.tensor_parallel.parameters import initialize_parameters, named_parameter_specs
from megatron_lite.transformer import dot_product_attention
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.unit.models.gpt.reference import ReferenceGPT

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH, BATCH = 2, 32, 4, 50, 12, 3

# name: (TransformerConfig, GPTModel, ReferenceGPT)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({}, {"share_embeddings_and_output_weights": True}, {}),
    "untied": ({"bias_gelu_fusion": False}, {}, {"activation": "gelu"}),
    "llama": (
        {"swiglu": True, "normalization": "RMSNorm", "num_query_groups": 2, "add_bias_linear": False},
        {"position_embedding_type": "rope", "rotary_base": 500.0},
        {"rms_norm": True, "activation": "silu", "gated": True, "groups": 2, "rotary_base": 500.0},
    ),
    "qwen": (
        {"swiglu": True, "normalization": "RMSNorm", "qk_layernorm": True, "add_bias_linear": False, "kv_channels": 16},
        {"position_embedding_type": "rope"},
        {"rms_norm": True, "activation": "silu", "gated": True, "rotary_base": 10000.0},
    ),
    "qkv bias, one group, layernorm 1p": (
        {"add_bias_linear": False, "add_qkv_bias": True, "num_query_groups": 1, "layernorm_zero_centered_gamma": True},
        {"position_embedding_type": "none"},
        {"groups": 1, "zero_centered": True},
    ),
    "geglu with biases, rmsnorm 1p, interleaved half rope": (
        {
            "geglu": True,
            "normalization": "RMSNorm",
            "layernorm_zero_centered_gamma": True,
            "qk_layernorm": True,
            "num_query_groups": 2,
        },
        {"position_embedding_type": "rope", "rotary_percent": 0.5, "rotary_interleaved": True},
        {
            "rms_norm": True,
            "zero_centered": True,
            "gated": True,
            "groups": 2,
            "rotary_base": 10000.0,
            "rotary_percent": 0.5,
            "rotary_interleaved": True,
        },
    ),
    "squared relu, window, post-layernorm residual": (
        {"squared_relu": True, "window_size": (3, 0), "apply_residual_connection_post_layernorm": True},
        {},
        {"activation": "squared_relu", "window": 3, "post_layernorm_residual": True},
    ),
    "quick geglu, query-key scaling": (
        {"quick_geglu": True, "apply_query_key_layer_scaling": True},
        {},
        {"activation": "quick_gelu", "gated": True},
    ),
}


def build(variant: str = "gpt2", **overrides: Any) -> tuple[GPTModel, ReferenceGPT]:
    config_settings, model_settings, reference_settings = VARIANTS[variant]
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        fp64=True,
        init_method_std=0.3,
        **{**config_settings, **overrides},
    )
    model = GPTModel(config, VOCAB, LENGTH, make_vocab_size_divisible_by=16, **model_settings)
    initialize_parameters(model, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases and norms do something
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    settings = {"groups": HEADS, **reference_settings}
    return model, ReferenceGPT(dict(model.named_parameters()), LAYERS, HEADS, vocab_size=VOCAB, **settings)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, VOCAB, (2, BATCH, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    mask = torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64).round(decimals=1)
    return ids, positions, labels, mask


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference(variant: str) -> None:
    """Fails, for example, with K and V swapped in the fused projection, or up and gate in the MLP."""
    model, reference = build(variant)
    ids, positions, labels, mask = batch()
    logits = reference.logits(ids, positions)
    torch.testing.assert_close(model(ids, positions), logits, rtol=1e-10, atol=1e-11)

    wanted = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
    got = model(ids, positions, labels=labels, loss_mask=mask)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(got.sum() / 7, list(named.values()))
    for name, ours, theirs in zip(
        named, gradients, torch.autograd.grad(wanted.sum() / 7, list(named.values())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_documents_do_not_see_each_other() -> None:
    """T19. Fails when the mask is dropped, or read as True = visible."""
    ids, _, _, _ = batch()
    positions = torch.cat((torch.arange(5), torch.arange(LENGTH - 5))).repeat(BATCH, 1)
    document = (torch.arange(LENGTH) >= 5).long()
    forbidden = (document[:, None] != document[None, :]) | torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    forbidden = forbidden.expand(BATCH, 1, LENGTH, LENGTH)
    changed = ids.clone()
    changed[:, :5] = (changed[:, :5] + 1) % VOCAB
    for variant in ("gpt2", "llama", "squared relu, window, post-layernorm residual"):
        model, reference = build(variant)
        before, after = model(ids, positions, forbidden), model(changed, positions, forbidden)
        assert torch.equal(before[:, 5:], after[:, 5:])
        assert not torch.equal(before[:, :5], after[:, :5])
        torch.testing.assert_close(before, reference.logits(ids, positions, forbidden[:, 0]), rtol=1e-10, atol=1e-11)
        causal_left_out = document[:, None] != document[None, :]
        torch.testing.assert_close(model(ids, positions, causal_left_out.expand(1, 1, -1, -1)), before)


def test_positions_are_the_callers() -> None:
    """A model with rope sees only distances; one with learned positions sees where it is."""
    ids, positions, _, _ = batch()
    rope, learned = build("llama")[0], build("gpt2")[0]
    torch.testing.assert_close(rope(ids, positions + 100), rope(ids, positions), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(rope(ids, positions * 2), rope(ids, positions))
    assert not torch.allclose(learned(ids, positions.flip(1)), learned(ids, positions))


def test_padding_takes_no_part_and_ignored_labels_cost_nothing() -> None:
    model, _ = build("untied")
    ids, positions, labels, _ = batch()
    labels[0, :4] = -100
    assert model.padded_vocab_size == 64
    before = model(ids, positions, labels=labels)
    assert before[0, :4].eq(0).all()
    with torch.no_grad():
        model.output_layer.weight[VOCAB:] = 100.0
    assert torch.equal(model(ids, positions, labels=labels), before)
    assert model(ids, positions).shape == (BATCH, LENGTH, VOCAB)


RECOMPUTATIONS: dict[str, dict[str, Any]] = {
    "core attention": {"recompute_granularity": "selective"},
    "all modules": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp", "layernorm"],
    },
    "uniform 1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform 2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block 1": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("kind", RECOMPUTATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients_bit_for_bit(
    kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the recomputation draws other random numbers (dropout 0.3), or nothing is recomputed at all."""
    from megatron_lite.tensor_parallel import model_parallel_cuda_manual_seed

    calls = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    block = dot_product_attention.attention
    monkeypatch.setattr(dot_product_attention, "attention", lambda *a: calls.append(1) or block(*a))

    def gradients(**settings: Any) -> tuple[list[Tensor], int]:
        calls.clear()
        model, _ = build("gpt2", hidden_dropout=dropout, attention_dropout=dropout, **settings)
        model_parallel_cuda_manual_seed(3)
        ids, positions, labels, mask = batch()
        model(ids, positions, labels=labels, loss_mask=mask).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], len(calls)

    (wanted, once), (got, again) = gradients(), gradients(**RECOMPUTATIONS[kind])
    assert once == LAYERS
    assert again == LAYERS + (1 if kind == "block 1" else LAYERS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


def test_evaluation_has_no_dropout() -> None:
    model, _ = build("gpt2", hidden_dropout=0.5, attention_dropout=0.5)
    ids, positions, _, _ = batch()
    model.eval()
    assert torch.equal(model(ids, positions), model(ids, positions))


def test_meta_build_is_initialized_like_a_real_one() -> None:
    model, _ = build("llama")
    initialize_parameters(model, seed=9)
    with torch.device("meta"):
        other = GPTModel(model.config, VOCAB, LENGTH, make_vocab_size_divisible_by=16, **VARIANTS["llama"][1])
    assert all(parameter.is_meta for parameter in other.parameters())
    other.to_empty(device="cpu")
    initialize_parameters(other, seed=9)
    ids, positions, _, _ = batch()
    assert torch.equal(other(ids, positions), model(ids, positions))
    assert not list(other.buffers())


def test_initial_values() -> None:
    config = TransformerConfig(num_layers=8, hidden_size=256, num_attention_heads=4, embedding_init_method_std=0.5)
    model = GPTModel(config, 512, 64)
    initialize_parameters(model, seed=1)
    for name, parameter in model.named_parameters():
        std = parameter.std().item()
        if name.startswith("embedding"):
            assert std == pytest.approx(0.5, rel=0.05), name
        elif name.endswith("bias"):
            assert std == 0, name
        elif "layernorm" in name:
            assert parameter.eq(1).all(), name
        else:
            narrow = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            assert std == pytest.approx(0.02 / (4 if narrow else 1), rel=0.05), name
    config.init_method_xavier_uniform, config.init_method, config.output_layer_init_method = True, None, None
    config.__post_init__()
    assert config.init_method is torch.nn.init.xavier_uniform_


def test_every_parameter_is_declared() -> None:
    """CORRECTNESS 1 for one rank; the parallel tests check the values the declaration leads to."""
    model, _ = build("gpt2", sequence_parallel=True, qk_layernorm=True)
    partial = {name for name, spec in named_parameter_specs(model).items() if spec.partial_over_tp}
    norms = {name for name, _ in model.named_parameters() if "layernorm" in name and "self_attention" not in name}
    assert partial == norms, "row biases and q/k norms are complete where TP is 1"


def test_published_parameter_counts() -> None:
    def count(config: TransformerConfig, gpt: GPTModelConfig, vocab: int) -> int:
        with torch.device("meta"):
            model = build_gpt_model(config, gpt, vocab, 1024)
        return sum(parameter.numel() for parameter in model.parameters())

    gpt2 = TransformerConfig(num_layers=12, hidden_size=768, num_attention_heads=12)
    assert count(gpt2, GPTModelConfig(make_vocab_size_divisible_by=1), 50257) == 124_439_808
    llama = TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
    )
    rope = GPTModelConfig(position_embedding_type="rope", share_embeddings_and_output_weights=False)
    assert count(llama, rope, 128_256) == 8_030_261_248


def test_float32_residual_stream() -> None:
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, bf16=True, fp32_residual_connection=True
    )
    model = GPTModel(config, VOCAB, LENGTH)
    streams: list[torch.dtype] = []
    inputs: list[torch.dtype] = []
    for layer in model.decoder.layers.values():
        layer.register_forward_hook(lambda _, __, output: streams.append(output.dtype))
        layer.mlp.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].dtype))
    ids, positions, labels, _ = batch()
    loss = model(ids, positions, labels=labels)
    assert streams == [torch.float32] * 2
    assert inputs == [torch.bfloat16] * 2
    assert loss.dtype == torch.float32


def test_packed_documents_equal_an_explicit_mask() -> None:
    """T19: rows of several documents, losses [b, s] and logits [b, s, V] as with the mask written out."""
    model, _ = build()
    ids, positions, labels, loss_mask = batch()
    length = ids.size(1)
    begins = sorted({*range(0, ids.numel(), length), *range(0, ids.numel(), 5), ids.numel()})
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor(begins), cu_seqlens_split=torch.arange(ids.size(0) + 1) * length)
    document = packed.layout.document_of_token().view(ids.shape)
    mask = document[:, None, :, None] != document[:, None, None, :]
    for arguments in ({"labels": labels, "loss_mask": loss_mask}, {}):
        actual = model(ids, positions, packed_seq_params=packed, **arguments)
        torch.testing.assert_close(actual, model(ids, positions, mask, **arguments))


def test_what_is_refused() -> None:
    model, _ = build()
    ids, positions, _, _ = batch()
    with pytest.raises(ConfigError, match="packed_seq_params describes"):
        model(ids, positions, packed_seq_params=PackedSeqParams(cu_seqlens_q=torch.tensor([0, ids.numel() - 1])))
    with pytest.raises(ConfigError, match="position_embedding_type is 'alibi'"):
        GPTModel(model.config, VOCAB, LENGTH, position_embedding_type="alibi")
    with pytest.raises(ConfigError, match="padded_vocab_size is 48"):
        GPTModel(model.config, VOCAB, LENGTH, padded_vocab_size=48)
    with pytest.raises(TypeError):
        GPTModel(model.config, VOCAB, LENGTH, fp16_lm_cross_entropy=True)  # type: ignore[call-arg]
