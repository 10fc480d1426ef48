"""Shared experts: an MLP of their own width with an optional gate."""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_lite.tensor_parallel.parameters import named_parameter_specs
from megatron_lite.transformer.mlp import MLP
from megatron_lite.transformer.moe.shared_experts import SharedExperts
from megatron_lite.transformer.transformer_config import TransformerConfig


def config(**settings: Any) -> TransformerConfig:
    shape = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "fp64": True, "num_moe_experts": 2}
    return TransformerConfig(**{**shape, "moe_shared_expert_intermediate_size": 12, "swiglu": True, **settings})


def test_names_and_shapes() -> None:
    shapes = {
        name: tuple(one.shape) for name, one in SharedExperts(config(moe_shared_expert_gate=True)).named_parameters()
    }
    assert shapes == {
        "gate_weight": (1, 16),
        "linear_fc1.weight": (24, 16),
        "linear_fc1.bias": (24,),
        "linear_fc2.weight": (16, 12),
        "linear_fc2.bias": (16,),
    }
    assert "gate_weight" not in dict(SharedExperts(config()).named_parameters())


def test_the_gate_scales_what_the_mlp_gives() -> None:
    torch.manual_seed(0)
    shared = SharedExperts(config(moe_shared_expert_gate=True, moe_shared_expert_overlap=True))
    x = torch.randn(5, 2, 16, dtype=torch.float64)
    assert shared.gate_weight is not None
    expected = MLP.forward(shared, x) * torch.sigmoid(F.linear(x, shared.gate_weight))
    torch.testing.assert_close(shared(x), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(shared.wait(shared.start(x)), expected, rtol=1e-14, atol=1e-14)


def test_the_gates_gradient_is_partial_under_sequence_parallelism_only() -> None:
    """T1. Fails with partial_over_tp left out."""
    for sequence_parallel in (False, True):
        sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
        shared = SharedExperts(config(moe_shared_expert_gate=True, **sizes))
        assert named_parameter_specs(shared)["gate_weight"].partial_over_tp == sequence_parallel
