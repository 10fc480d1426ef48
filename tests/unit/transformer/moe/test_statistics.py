"""Statistics of all MoE layers of a model in one process, against counts made by hand."""

import math

import pytest
import torch
from torch import nn

from megatron_lite.transformer.moe import statistics
from megatron_lite.transformer.moe.router import TopKRouter
from megatron_lite.transformer.transformer_config import TransformerConfig

E, K, H, S, B = 4, 2, 6, 5, 3


def build(layer_number: int | None = None) -> TopKRouter:
    config = TransformerConfig(
        num_layers=3,
        hidden_size=H,
        num_attention_heads=2,
        num_moe_experts=E,
        moe_router_topk=K,
        params_dtype=torch.float64,
        init_method_std=0.5,
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[0.1, 0.0, 0.3],
        moe_z_loss_coeff=0.01,
    )
    return TopKRouter(config, layer_number=layer_number)


def test_values_of_one_layer() -> None:
    """Mutations: log the losses times their coefficients; divide by tokens in place of micro-batches; balance by the

    least load; entropy in bits; log a loss without a coefficient.
    """
    torch.manual_seed(0)
    router = build(layer_number=3)
    batches = [torch.randn(S, B, H, dtype=torch.float64) for _ in range(2)]
    aux, z, entropy, loads = [], [], 0.0, torch.zeros(E)
    for x in batches:
        _, indices = router(x)
        logits = router._logits(x).detach().flatten(0, 1)
        scores = logits.softmax(-1)
        counts = indices.flatten().bincount(minlength=E).double()
        aux.append(sum(E * counts[e] / (K * S * B) * scores[:, e].mean() for e in range(E)).item())
        z.append(logits.logsumexp(-1).square().mean().item())
        entropy -= (scores * scores.log()).sum().item()
        loads += counts
    router.record_dropped(torch.tensor(3))
    values = statistics.collect(router, None)
    assert list(values)[:6] == [
        "load_balancing_loss",
        "global_load_balancing_loss",
        "z_loss",
        "moe_balance",
        "moe_dropped",
        "moe_entropy",
    ]
    assert values["load_balancing_loss"] == pytest.approx(sum(aux) / 2, rel=1e-12)
    assert values["z_loss"] == pytest.approx(sum(z) / 2, rel=1e-12)
    assert values["moe_balance"] == pytest.approx(loads.max().item() / loads.mean().item())
    assert values["moe_dropped"] == pytest.approx(3 / (2 * S * B * K))
    assert values["moe_entropy"] == pytest.approx(entropy / (2 * S * B), rel=1e-12)
    for name in ("load_balancing_loss", "global_load_balancing_loss", "z_loss"):
        assert values[f"moe/{name}_layer_2"] == values[name]
    for name in ("balance", "dropped", "entropy"):
        assert values[f"moe/{name}_layer_2"] == values[f"moe_{name}"]
    assert len(values) == 12


def test_layers_are_averaged_and_named() -> None:
    """Mutations: sum the layers; number them from 1."""
    torch.manual_seed(1)
    model = nn.Sequential(build(layer_number=1), build(layer_number=3))
    x = torch.randn(S, B, H, dtype=torch.float64)
    for router in model:
        router(x)
    values = statistics.collect(model, None)
    for name in ("load_balancing_loss", "z_loss"):
        layers = [values[f"moe/{name}_layer_{i}"] for i in (0, 2)]
        assert layers[0] != layers[1]
        assert values[name] == pytest.approx(sum(layers) / 2)
    assert {"moe/balance_layer_0", "moe/dropped_layer_2", "moe/entropy_layer_2"} <= set(values)


def test_collecting_starts_anew() -> None:
    """Mutation: keep the sums."""
    router = build()
    x = torch.randn(S, B, H, dtype=torch.float64)
    router(x)
    first = statistics.collect(router, None)
    assert first["moe_balance"] >= 1.0
    assert statistics.collect(router, None) == {}
    router(x)
    assert statistics.collect(router, None)["moe_entropy"] == pytest.approx(first["moe_entropy"])


def test_nothing_counts_without_training_or_gradient() -> None:
    """T45. Mutations: do not ask for `training`; do not ask for a gradient."""
    router = build()
    x = torch.randn(S, B, H, dtype=torch.float64)
    with torch.no_grad():
        router(x)
        router.record_dropped(torch.tensor(3))
    router.eval()(x)
    router.record_dropped(torch.tensor(3))
    assert not router.sums.any()
    assert statistics.collect(router, None) == {}
    assert not router.tokens_per_expert.any()


def test_models_without_experts_have_no_statistics() -> None:
    """Mutation: reduce an empty stack."""
    assert statistics.collect(nn.Linear(2, 2), None) == {}
    statistics.update_expert_bias(nn.Linear(2, 2), None)


def test_entropy_of_undecided_routers() -> None:
    """Mutation: a mean over experts in place of the sum."""
    router = build()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    router(torch.randn(S, B, H, dtype=torch.float64))
    values = statistics.collect(router, None)
    assert values["moe_entropy"] == pytest.approx(math.log(E))
    assert values["load_balancing_loss"] == pytest.approx(1.0)
    assert values["moe_balance"] == pytest.approx(E / K)  # ties: all tokens to the first k
