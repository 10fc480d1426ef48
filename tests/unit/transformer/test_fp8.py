"""Which linear layers of a model are in fp8, and what is said of those that are not."""

from typing import Any

import pytest
import torch

from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron_lite.training.setup import build_gpt
from megatron_lite.transformer.fp8 import describe_fp8, fp8_remarks
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer

CPU = torch.device("cpu")


def linears(**settings: Any) -> dict[str, bool]:
    """Name of each column and row layer of a model of four layers -> whether it is in fp8."""
    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "bf16": True, "fp8": "hybrid"}
    gpt = GPTModelConfig(share_embeddings_and_output_weights=False, position_embedding_type="rope")
    model = build_gpt(TransformerConfig(**{**sizes, **settings}), gpt, 64, 16)
    kinds = (ColumnParallelLinear, RowParallelLinear)
    return {name: one.product is not None for name, one in model.named_modules() if isinstance(one, kinds)}


def test_linear_layers_of_transformer_layers_are_in_fp8_and_no_others() -> None:
    """Mutation: the whole model instead of its layers."""
    found = linears()
    assert not found.pop("output_layer")
    assert {name.rpartition(".")[2] for name in found} == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert len(found) == 16
    assert all(found.values())
    assert not any(linears(fp8=None).values())


def test_shared_experts_and_latent_attention_too() -> None:
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
    assert ends == {"linear_fc1", "linear_fc2", "linear_proj", "linear_q_proj", "linear_kv_up_proj"}


@pytest.mark.parametrize(("start", "end", "wanted"), [(1, 1, {1, 2}), (0, 1, {0, 1, 2}), (2, 0, {2, 3})])
def test_layers_at_the_ends_stay_out(start: int, end: int, wanted: set[int]) -> None:
    """Megatron counts from 0, layers are numbered from 1. Mutation: either bound moved by one."""
    ends = {"num_layers_at_start_in_bf16": start, "num_layers_at_end_in_bf16": end}
    found = linears(first_last_layers_bf16=True, **ends)
    assert {int(name.split(".")[2]) for name, is_fp8 in found.items() if is_fp8} == wanted
    assert all(value for name, value in linears(**ends).items() if name != "output_layer")


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


def test_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "fp8": "hybrid"}
    config = TransformerConfig(**sizes, bf16=True)
    assert describe_fp8(config, CPU) == "fp8 hybrid tensorwise (emulated)"
    monkeypatch.setattr("megatron_lite.transformer.fp8.has_fp8_kernels", lambda: True)
    cuda = torch.device("cuda")
    assert describe_fp8(config, cuda) == "fp8 hybrid tensorwise (torch scaled_mm)"
    assert describe_fp8(config, CPU) == "fp8 hybrid tensorwise (emulated)"
    assert describe_fp8(TransformerConfig(**sizes, fp64=True), cuda) == "fp8 hybrid tensorwise (emulated)"
    with_experts = TransformerConfig(**sizes, bf16=True, num_moe_experts=2, fp8_recipe="rowwise")
    assert describe_fp8(with_experts, cuda) == "fp8 hybrid rowwise (torch scaled_mm), routed experts not in fp8"
