"""Norms and AdamW by apex behind ours, with a stand-in for the package, which needs a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig
from megatron_lite.transformer.norms import build_norm
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests import apex_stand_in as stand_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("normalization", "called"), [("LayerNorm", "layer_norm"), ("RMSNorm", "rms_norm")])
def test_norms(normalization: str, called: str, dtype: torch.dtype) -> None:
    """Mutations: epsilon not handed on; the weight in the dtype it is stored in."""

    def results(impl: str) -> list[Tensor]:
        torch.manual_seed(1)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            normalization=normalization,
            layernorm_epsilon=0.5,
            bf16=dtype == torch.bfloat16,
            norm_impl=impl,
        )
        norm = build_norm(config, 16)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(3, 2, 16, dtype=dtype, requires_grad=True)
        output = norm(x)
        return [output, *torch.autograd.grad(output.float().square().sum(), [x, *norm.parameters()])]

    wanted = results("torch")
    with stand_in.installed():
        found = results("apex")
        assert stand_in.calls == [called]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_weights_stored_minus_one_stay_torch() -> None:
    """1 + weight would be rounded. Mutation: hand over the weight as it is stored."""
    sizes: Any = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "norm_impl": "apex"}
    with stand_in.installed():
        build_norm(TransformerConfig(**sizes, layernorm_zero_centered_gamma=True), 16)(torch.randn(2, 16))
        assert not stand_in.calls


def train(impl: str, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Tensor]:
    """Weights and state after steps, in the third of which a gradient is infinite."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"linear.weight": (5, 3), "empty.weight": (0, 3), "norm.weight": (3,), "empty.bias": (0,)}
    named = {n: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for n, shape in shapes.items()}
    constants = {"lr": 0.05, "weight_decay": 0.1, "adam_beta2": 0.95, "adam_eps": 1e-3} | settings
    optimizer = MegatronOptimizer(OptimizerConfig(**constants, adam_impl=impl), named)
    for step in range(5):
        for parameter in named.values():
            parameter.grad = 100 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        if step == 2:
            named["norm.weight"].grad[1] = torch.inf  # type: ignore[index]
        optimizer.step()
    return {**{name: one.detach() for name, one in named.items()}, **optimizer.state_dict()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad": 0.0},
        {"loss_scale": 64.0},
        {"fp16": True, "initial_loss_scale": 8.0},
        {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"},
        {"optimizer_cpu_offload": True},
    ],
    ids=str,
)
def test_adamw(settings: dict[str, Any]) -> None:
    """Also of a rank that has empty shards.

    Mutations: the divisor instead of its reciprocal; steps counted where a step is skipped; no skip; eps lost; empty
    shards handed over.
    """
    wanted = train("torch", **settings)
    with stand_in.installed():
        found = train("apex", **settings)
        assert set(stand_in.calls) == {"adamw"}
    assert found.keys() == wanted.keys()
    for name, ours in found.items():
        torch.testing.assert_close(ours, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_adamw_of_float64_stays_torch() -> None:
    """Mutation: every dtype handed over."""
    wanted = train("torch", torch.float64)
    with stand_in.installed():
        found = train("apex", torch.float64)
        assert not stand_in.calls
    for name, ours in found.items():
        assert torch.equal(ours, wanted[name])
