"""Gated MLPs read interleaved gates and ups in two ways."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from megatron_lite.transformer.mlp import MLP, reorders_weight
from megatron_lite.transformer.transformer_config import TransformerConfig


def gated(x: Tensor, mlp: MLP) -> Tensor:
    """The MLP as it is defined: row 2i of fc1 is gate i, row 2i+1 its up."""
    fused = F.linear(x, mlp.linear_fc1.weight, mlp.linear_fc1.bias)
    gate, up = fused[..., 0::2], fused[..., 1::2]
    if mlp.config.activation_func_clamp_value is not None:
        gate, up = gate.clamp(max=0.01), up.clamp(-0.01, 0.01)
    return F.linear(F.silu(gate) * up, mlp.linear_fc2.weight, mlp.linear_fc2.bias)


@pytest.mark.parametrize("clamp", [None, 0.01])
@pytest.mark.parametrize(("tokens", "reorders"), [(1, False), (64, True)])
def test_gates_and_ups(clamp: float | None, tokens: int, reorders: bool) -> None:
    """Mutations: the flag of the order turned around; the bias left interleaved behind a reordered weight."""
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        gated_linear_unit=True,
        activation_func=F.silu,
        activation_func_clamp_value=clamp,
        params_dtype=torch.float64,
    )
    mlp = MLP(config)
    assert mlp.linear_fc1.bias is not None
    torch.nn.init.normal_(mlp.linear_fc1.bias)
    x = torch.randn(tokens, 1, 32, dtype=torch.float64, requires_grad=True)
    assert reorders_weight(x, mlp.linear_fc1.weight) is reorders
    inputs = [x, *mlp.parameters()]
    found, wanted = mlp(x), gated(x, mlp)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(wanted.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_gpu_reorders_no_weight() -> None:
    """However many rows there are. Mutation: the rule of a CPU."""
    with FakeTensorMode():
        for device, reorders in (("cuda", False), ("cpu", True)):
            x, weight = torch.empty(8192, 1, 32, device=device), torch.empty(64, 32, device=device)
            assert reorders_weight(x, weight) is reorders
