"""Latent attention against its equations, and what recomputing the up-projections frees.

That it equals DeepSeek's models is in models/gpt/test_huggingface_families.py, that no layout changes it in
tests/parallel/test_layout_matrix.py.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.tensor_parallel import CheckpointWithoutOutput
from megatron_lite.transformer.multi_latent_attention import MLASelfAttention
from megatron_lite.transformer.rope import RotaryEmbedding, RotaryTables, YarnScaling
from megatron_lite.transformer.transformer_config import TransformerConfig

LENGTH, BATCH, HIDDEN, HEADS = 10, 2, 24, 4


def config(**settings: Any) -> TransformerConfig:
    shape: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "multi_latent_attention": True,
        "q_lora_rank": 14,
        "kv_lora_rank": 10,
        "qk_head_dim": 6,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 5,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "fp64": True,
        "init_method_std": 0.4,
    }
    return TransformerConfig(**{**shape, **settings})


def rotary(settings: TransformerConfig) -> RotaryTables:
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    tables: RotaryTables = RotaryEmbedding(settings.rotary_channels)(positions, torch.float64)
    return tables


def written_out(attention: MLASelfAttention, x: Tensor, frequencies: Tensor) -> Tensor:
    """Equations 37 to 47 of DeepSeek-V2, head by head, with complex numbers for the rotation."""
    c = attention.config
    weights = {name: parameter.detach() for name, parameter in attention.named_parameters()}

    def norm(latent: Tensor, name: str) -> Tensor:
        return (
            latent / (latent.square().mean(-1, keepdim=True) + c.layernorm_epsilon).sqrt() * weights[f"{name}.weight"]
        )

    def rotate(vectors: Tensor) -> Tensor:
        angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequencies
        turned = torch.view_as_complex(vectors.contiguous().unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.view_as_real(turned).flatten(-2)

    if c.q_lora_rank is None:
        queries = x @ weights["linear_q_proj.weight"].t()
    else:
        latent_q = norm(x @ weights["linear_q_down_proj.weight"].t(), "q_layernorm")
        queries = latent_q @ weights["linear_q_up_proj.weight"].t()
    down = x @ weights["linear_kv_down_proj.weight"].t()
    up = norm(down[..., : c.kv_lora_rank], "kv_layernorm") @ weights["linear_kv_up_proj.weight"].t()
    shared = rotate(down[..., c.kv_lora_rank :])
    outputs = []
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for query, key_value in zip(queries.chunk(HEADS, -1), up.chunk(HEADS, -1), strict=True):
        key, value = key_value[..., : c.qk_head_dim], key_value[..., c.qk_head_dim :]
        scores = torch.einsum("qbd,kbd->bqk", query[..., : c.qk_head_dim], key)
        scores = scores + torch.einsum("qbd,kbd->bqk", rotate(query[..., c.qk_head_dim :]), shared)
        scores = scores / math.sqrt(c.qk_head_dim + c.qk_pos_emb_head_dim)
        outputs.append(torch.einsum("bqk,kbd->qbd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value))
    return torch.cat(outputs, -1) @ weights["linear_proj.weight"].t()


def random_layer(settings: TransformerConfig) -> MLASelfAttention:
    torch.manual_seed(0)
    attention = MLASelfAttention(settings, 1)
    for parameter in attention.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return attention


@pytest.mark.parametrize("settings", [{}, {"q_lora_rank": None}, {"v_head_dim": 10}, {"v_head_dim": 13}])
def test_equals_the_equations(settings: dict[str, Any]) -> None:
    """Mutations: keys and values of a head swapped; the scale of the width that values are filled up to; norms of the
    whole down-projection."""
    c = config(**settings)
    attention, x = random_layer(c), torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(0, c.qk_pos_emb_head_dim, 2, dtype=torch.float64) / c.qk_pos_emb_head_dim)
    wanted = written_out(attention, x, frequencies)
    torch.testing.assert_close(attention(x, None, rotary(c)), wanted, rtol=1e-11, atol=1e-11)


def test_names_and_shapes_are_megatrons() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in MLASelfAttention(config(), 1).named_parameters()}
    assert shapes == {
        "linear_proj.weight": (HIDDEN, HEADS * 5),
        "q_layernorm.weight": (14,),
        "kv_layernorm.weight": (10,),
        "linear_q_down_proj.weight": (14, HIDDEN),
        "linear_q_up_proj.weight": (HEADS * 10, 14),
        "linear_kv_down_proj.weight": (14, HIDDEN),
        "linear_kv_up_proj.weight": (HEADS * 11, 10),
    }
    plain = dict(MLASelfAttention(config(q_lora_rank=None, qk_layernorm=False), 1).named_parameters())
    assert plain.keys() == {
        "linear_proj.weight",
        "linear_q_proj.weight",
        "linear_kv_down_proj.weight",
        "linear_kv_up_proj.weight",
    }


def gradients(attention: MLASelfAttention, x: Tensor) -> list[Tensor]:
    leaves = [x, *attention.parameters()]
    weights = torch.linspace(-1.0, 2.0, x.numel(), dtype=torch.float64).view_as(x)
    for leaf in leaves:
        leaf.grad = None
    (attention(x, None, rotary(attention.config)) * weights).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("settings", [{}, {"q_lora_rank": None, "v_head_dim": 13}])
@pytest.mark.parametrize("modules", [["mla_up_proj"], ["core_attn", "mla_up_proj"]])
def test_recomputing_the_up_projections_changes_nothing(settings: dict[str, Any], modules: list[str]) -> None:
    """Gradients are equal bit for bit, twice in a row. Mutation: values not put back into what attention saved."""
    plain = random_layer(config(**settings))
    again = random_layer(config(**settings, recompute_granularity="selective", recompute_modules=modules))
    for _ in range(2):
        x = torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
        wanted = gradients(plain, x)
        for ours, theirs in zip(gradients(again, x), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(again(x), plain(x), rtol=0, atol=0)


def bytes_kept(settings: TransformerConfig, documents: bool) -> int:
    """Bytes that one layer keeps between forward and backward, of two sequences."""
    attention, x = random_layer(settings), torch.randn(32, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    positions = RotaryEmbedding(settings.rotary_channels)(torch.arange(32).expand(2, -1), torch.float64)
    cuts = torch.tensor([0, 10, 32, 40, 64])
    packed = PackedSeqParams(cu_seqlens_q=cuts, cu_seqlens_split=torch.arange(3) * 32) if documents else None
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage()._cdata] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        output = attention(x, None, positions, packed_seq_params=packed)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("documents", [False, True])
def test_recomputing_the_up_projections_frees_queries_keys_and_values(documents: bool) -> None:
    """Mutations: nothing discarded; documents put behind one another outside of what is recomputed."""
    wide = {"qk_head_dim": 64, "qk_pos_emb_head_dim": 32, "v_head_dim": 64}
    kept = bytes_kept(config(**wide), documents)
    recomputed = config(**wide, recompute_granularity="selective", recompute_modules=["mla_up_proj"])
    freed = bytes_kept(recomputed, documents)
    three = 3 * 64 * HEADS * 96 * 8
    assert kept - freed >= three


def test_one_backward_pass_and_frozen_layers() -> None:
    """What is freed is there once. Behind frozen layers nothing is. Mutations: a second pass that computes with what is
    left; a hook on what has no gradient."""
    attention = random_layer(config(recompute_granularity="selective", recompute_modules=["mla_up_proj"]))
    x = torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    output = attention(x).sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        output.backward()
    for name, parameter in attention.named_parameters():
        parameter.requires_grad_("linear_proj" in name)
    attention(x.detach()).sum().backward()


def test_the_peak_of_recomputation_is_one_copy() -> None:
    """While attention's backward runs. Mutation: what was made anew kept beside what it was copied to."""
    made: list[torch.UntypedStorage] = []
    kept = CheckpointWithoutOutput()
    x = torch.ones(8, requires_grad=True)

    def double(values: Tensor) -> tuple[Tensor]:
        doubled = values * 2
        made.append(doubled.untyped_storage())
        return (doubled,)

    (output,) = kept.checkpoint(double, x)
    result = output.exp()
    kept.discard_output_and_register_recompute(result)
    assert made[0].nbytes() == 0
    seen: list[int] = []
    output.register_hook(lambda _: seen.extend(storage.nbytes() for storage in made))
    result.sum().backward()
    assert seen == [32, 0]
    torch.testing.assert_close(x.grad, 2 * (2 * torch.ones(8)).exp())


def test_yarn_scales_all_scores() -> None:
    """mscale_all_dim is for all channels; what it takes from the rotated ones' own factor, it gives back here."""
    from megatron_lite.models.gpt.gpt_model import GPTModel

    yarn = YarnScaling(scaling_factor=40.0, mscale=0.5, mscale_all_dim=2.0)
    model = GPTModel(config(), 50, LENGTH, position_embedding_type="rope", yarn=yarn)
    attention = model.decoder.layers["0"].get_submodule("self_attention")
    temperature = 0.1 * 2.0 * math.log(40.0) + 1.0
    assert attention.core_attention.softmax_scale == pytest.approx(temperature**2 / math.sqrt(10))  # type: ignore[union-attr]
    assert model.rotary_pos_emb is not None
    assert model.rotary_pos_emb.attention_factor == pytest.approx((0.1 * 0.5 * math.log(40.0) + 1.0) / temperature)
