"""Which linear layers of a model are in fp8, and what is said of those that are not."""

from typing import Any

import pytest
import torch

from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron_lite.training.setup import build_gpt
from megatron_lite.transformer.fp8 import describe_fp8, fp8_remarks
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "fp8": "hybrid"}


def linears(**settings: Any) -> dict[str, bool]:
    """Name of each column and row layer of a model of four layers, and of each matrix of its experts -> whether it is
    in fp8.
    """
    gpt = GPTModelConfig(share_embeddings_and_output_weights=False, position_embedding_type="rope")
    model = build_gpt(TransformerConfig(**{**SIZES, "num_layers": 4, "bf16": True, **settings}), gpt, 64, 16)
    kinds = (ColumnParallelLinear, RowParallelLinear)
    found = {name: one.product is not None for name, one in model.named_modules() if isinstance(one, kinds)}
    for name, one in model.named_modules():
        if isinstance(one, GroupedMLP):
            found |= {f"{name}.weight1": one.fp8_fc1 is not None, f"{name}.weight2": one.fp8_fc2 is not None}
    return found


def test_linear_layers_of_transformer_layers_are_in_fp8_and_no_others() -> None:
    """Mutation: the whole model instead of its layers."""
    found = linears()
    assert not found.pop("output_layer")
    assert {name.rpartition(".")[2] for name in found} == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert len(found) == 16
    assert all(found.values())
    assert not any(linears(fp8=None).values())


def test_experts_and_latent_attention_too() -> None:
    """Mutation: routed experts left out."""
    found = linears(
        num_moe_experts=4,
        moe_shared_expert_intermediate_size=48,
        multi_latent_attention=True,
        qk_head_dim=16,
        qk_pos_emb_head_dim=16,
        v_head_dim=16,
        mtp_num_layers=1,
    )
    assert not found.pop("output_layer")
    assert all(found.values())
    ends = {name.rpartition(".")[2] for name in found if "mlp" in name or "mtp" in name}
    weights = {"weight1", "weight2"}
    assert ends == {"linear_fc1", "linear_fc2", "linear_proj", "linear_q_proj", "linear_kv_up_proj", *weights}
    assert not any(linears(fp8=None, num_moe_experts=4).values())


@pytest.mark.parametrize(("start", "end", "wanted"), [(1, 1, {1, 2}), (0, 1, {0, 1, 2}), (2, 0, {2, 3})])
def test_layers_at_the_ends_stay_out(start: int, end: int, wanted: set[int]) -> None:
    """Megatron counts from 0, layers are numbered from 1. Mutation: either bound moved by one."""
    ends = {"num_layers_at_start_in_bf16": start, "num_layers_at_end_in_bf16": end}
    found = linears(first_last_layers_bf16=True, **ends)
    assert {int(name.split(".")[2]) for name, is_fp8 in found.items() if is_fp8} == wanted
    assert all(value for name, value in linears(**ends).items() if name != "output_layer")


def test_experts_of_layers_at_the_ends_stay_out() -> None:
    """Mutation: experts in fp8 in every layer."""
    found = linears(num_moe_experts=4, first_last_layers_bf16=True)
    in_fp8 = {name for name, is_fp8 in found.items() if is_fp8 and "experts" in name}
    assert in_fp8 == {f"decoder.layers.{i}.mlp.experts.weight{n}" for i in (1, 2) for n in (1, 2)}


def test_a_further_layer_is_as_the_last() -> None:
    found = linears(mtp_num_layers=1, first_last_layers_bf16=True, num_layers_at_end_in_bf16=0)
    assert all(is_fp8 for name, is_fp8 in found.items() if name.startswith("mtp"))
    found = linears(mtp_num_layers=1, first_last_layers_bf16=True)
    assert not any(is_fp8 for name, is_fp8 in found.items() if name.startswith("mtp"))


def test_sizes_that_are_no_multiples_of_16_stay_out_and_are_named() -> None:
    """Mutation: judge by one of the two sizes."""
    found = linears(ffn_hidden_size=40)
    assert {name.rpartition(".")[2] for name, is_fp8 in found.items() if is_fp8} == {"linear_qkv", "linear_proj"}
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, ffn_hidden_size=40, bf16=True, fp8="e4m3"
    )
    remarks = list(fp8_remarks(TransformerLayer(config), CPU))
    assert remarks == [
        "mlp.linear_fc1 (40 x 32) is not in fp8: its sizes are no multiples of 16.",
        "mlp.linear_fc2 (32 x 40) is not in fp8: its sizes are no multiples of 16.",
    ]


@pytest.mark.parametrize(("width", "swiglu", "named"), [(40, False, (1, 2)), (24, True, (2,)), (32, True, ())])
def test_experts_whose_sizes_are_no_multiples_of_16(width: int, swiglu: bool, named: tuple[int, ...]) -> None:
    """Gated, fc1 has twice the outputs. Mutations: judge both by the width; judge by a rank's part."""
    outputs = 2 * width if swiglu else width
    shapes = {1: f"{outputs} x 32", 2: f"32 x {width}"}
    config = TransformerConfig(**SIZES, bf16=True, num_moe_experts=2, moe_ffn_hidden_size=width, swiglu=swiglu)
    layer = TransformerLayer(config)
    assert list(fp8_remarks(layer, CPU)) == [
        f"mlp.experts.weight{n} ({shapes[n]}) is not in fp8: its sizes are no multiples of 16." for n in named
    ]
    experts = layer.mlp.experts
    assert isinstance(experts, GroupedMLP)
    assert [n for n, one in enumerate((experts.fp8_fc1, experts.fp8_fc2), 1) if one is None] == list(named)


def test_parts_that_are_no_multiples_of_16_are_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix that expert tensor parallel ranks share. Mutations: the other size divided; said on a CPU too."""
    config = TransformerConfig(**SIZES, bf16=True, num_moe_experts=2, moe_ffn_hidden_size=48)
    layer = TransformerLayer(config)
    assert not list(fp8_remarks(layer, CUDA))
    monkeypatch.setattr("megatron_lite.transformer.fp8.group_size", lambda group: 2)
    assert not list(fp8_remarks(layer, CPU))
    assert list(fp8_remarks(layer, CUDA)) == [
        "mlp.experts.weight1 (48 x 32) is emulated: its parts on 2 ranks are no multiples of 16.",
        "mlp.experts.weight2 (32 x 48) is emulated: its parts on 2 ranks are no multiples of 16.",
    ]


@pytest.mark.parametrize("settings", [{"swiglu": True}, {"add_bias_linear": False}, {"geglu": True}])
@pytest.mark.parametrize("counts", [[5, 0, 40], [0, 0, 0]])
def test_experts_compute_near_those_without_fp8(settings: dict[str, Any], counts: list[int]) -> None:
    """Recomputed activations change no bit. Mutations: fc1 or fc2 without fp8; what is recomputed left unrounded."""
    results = []
    for fp8, recompute in ((None, False), ("e4m3", False), ("e4m3", True)):
        options = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]} if recompute else {}
        sizes = {**SIZES, "fp8": fp8, "num_moe_experts": 3, "moe_ffn_hidden_size": 32, "fp64": True}
        experts = TransformerLayer(TransformerConfig(**sizes, **settings, **options)).mlp.experts
        assert isinstance(experts, GroupedMLP)
        generator = torch.Generator().manual_seed(3)
        rows, probs = (
            torch.randn(sum(counts), *width, generator=generator, dtype=torch.float64).requires_grad_()
            for width in ((32,), ())
        )
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        output = experts.forward_dispatched(rows, probs, torch.tensor(counts))
        weight = torch.linspace(-1, 2, 32, dtype=torch.float64)
        given = {"rows": rows, "probs": probs, **dict(experts.named_parameters())}
        gradients = torch.autograd.grad((output * weight).sum(), list(given.values()))
        results.append({"output": output, **dict(zip(given, gradients, strict=True))})
    plain, found, recomputed = results
    for name, wanted in plain.items():
        assert torch.equal(found[name], recomputed[name]), name
        error = (found[name] - wanted).norm() / wanted.norm() if sum(counts) else found[name].norm()
        exact = not sum(counts) or name == "bias2"
        assert error < 1e-12 if exact else 5e-3 < error < 0.15, (name, error)


def test_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(**SIZES, bf16=True)
    assert describe_fp8(config, CPU) == "fp8 hybrid tensorwise (emulated)"
    monkeypatch.setattr("megatron_lite.transformer.fp8.has_fp8_kernels", lambda: True)
    assert describe_fp8(config, CUDA) == "fp8 hybrid tensorwise (torch scaled_mm)"
    assert describe_fp8(config, CPU) == "fp8 hybrid tensorwise (emulated)"
    assert describe_fp8(TransformerConfig(**SIZES, fp64=True), CUDA) == "fp8 hybrid tensorwise (emulated)"


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_description_of_experts(has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: the kernel without --moe-grouped-gemm, or where there is none."""
    monkeypatch.setattr("megatron_lite.transformer.fp8.has_grouped_fp8_kernels", lambda: has_kernels)
    for grouped in (True, False):
        config = TransformerConfig(**SIZES, bf16=True, num_moe_experts=2, moe_grouped_gemm=grouped)
        how = "torch scaled_grouped_mm" if has_kernels and grouped else "emulated"
        assert describe_fp8(config, CUDA) == (
            f"fp8 hybrid tensorwise (emulated), routed experts e4m3 rowwise ({how}), the gradients of their weights "
            "not in fp8"
        )
        experts = TransformerLayer(config).mlp.experts
        assert isinstance(experts, GroupedMLP)
        assert experts.fp8_fc1 is not None
        assert experts.fp8_fc2 is not None
        assert experts.fp8_fc1.kernels == experts.fp8_fc2.kernels == (has_kernels and grouped)
