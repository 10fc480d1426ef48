"""Balance and z losses in float64, values and gradients, against loops over tokens; and how they are attached."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_lite.errors import ConfigError
from megatron_lite.transformer.moe import auxiliary_losses, load_balancing
from megatron_lite.transformer.transformer_config import TransformerConfig

S, B, E, K = 5, 3, 4, 2


@pytest.fixture(autouse=True)
def scale_of_one() -> Iterator[None]:
    yield
    auxiliary_losses.begin_step(None)


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(S, B, E, dtype=torch.float64, generator=generator)
    logits[:, 0, 1] += 2.0  # sequences prefer different experts
    logits[:, 1, 3] += 2.0
    return logits.requires_grad_(), logits.detach().clone().requires_grad_()


def naive_balance(tokens: list[Tensor]) -> Tensor:
    """E sum_e f_e P_e over tokens of logits [E]."""
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(E):
        chosen = sum(e in sorted(range(E), key=lambda i: -row[i].item())[:K] for row in tokens)
        probability = sum(torch.exp(row[e]) / sum(torch.exp(one) for one in row) for row in tokens)
        loss = loss + E * chosen / (K * len(tokens)) * probability / len(tokens)
    return loss


def test_tokens_per_expert_by_sequence() -> None:
    """Mutation: count all sequences together; number sequences along s."""
    indices = draw()[0].topk(K).indices
    counts = load_balancing.tokens_per_expert(indices, E)
    expected = [[int((indices[:, b] == e).sum()) for e in range(E)] for b in range(B)]
    assert counts.tolist() == expected
    assert counts.dtype == torch.int64


def test_balance_loss_equals_its_definition() -> None:
    """Mutations: T for T^2; leave k out; give the counts a gradient."""
    ours, reference = draw()
    counts = load_balancing.tokens_per_expert(ours.topk(K).indices, E).sum(0)
    loss = load_balancing.balance_share(ours.softmax(-1).sum((0, 1)), counts, K, S * B, S * B)
    expected = naive_balance(list(reference.flatten(0, 1)))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-11, atol=1e-14)


def test_balance_loss_by_sequence() -> None:
    """Mutation: scores or counts summed over the sequences first."""
    ours, reference = draw()
    counts = load_balancing.tokens_per_expert(ours.topk(K).indices, E)
    loss = load_balancing.balance_share(ours.softmax(-1).sum(0), counts, K, S, S) / B
    expected = sum(naive_balance(list(reference[:, b])) for b in range(B)) / B
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-11, atol=1e-14)


def test_perfect_balance_is_one() -> None:
    """Mutation: leave E out of the factor."""
    counts = torch.full((E,), 6)
    loss = load_balancing.balance_share(torch.full((E,), 3.0), counts, K, 12, 12)
    assert loss.item() == pytest.approx(1.0)


def test_z_loss_equals_its_definition() -> None:
    """Mutations: no square; the mean over own tokens instead of all."""
    ours, reference = draw()
    loss = load_balancing.z_loss_share(ours, 2 * S * B)  # twice as many tokens with another rank
    expected = sum(torch.log(sum(torch.exp(one) for one in row)) ** 2 for row in reference.flatten(0, 1)) / (2 * S * B)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("types", "coefficients", "expected"),
    [
        ("aux_loss", 0.1, {"aux_loss": 0.1}),
        ("aux_loss", [0.1], {"aux_loss": 0.1}),
        ("none", 0.1, {}),
        ("sinkhorn", 0.0, {}),
        ("aux_loss", 0.0, {}),
        (["aux_loss", "seq_aux_loss"], [0.1, 0.2], {"aux_loss": 0.1, "seq_aux_loss": 0.2}),
        (["seq_aux_loss", "global_aux_loss"], [0.0, 0.2], {"global_aux_loss": 0.2}),
    ],
)
def test_coefficients(types: str | list[str], coefficients: float | list[float], expected: dict[str, float]) -> None:
    """Mutation: keep zeros; the first coefficient for all."""
    config = TransformerConfig(moe_router_load_balancing_type=types, moe_aux_loss_coeff=coefficients)
    assert config.balance_coefficients == expected


@pytest.mark.parametrize("coefficients", [0.1, [0.1, 0.2, 0.3]])
def test_coefficients_that_do_not_match_are_refused(coefficients: float | list[float]) -> None:
    """Mutation: zip without strict."""
    config = TransformerConfig(
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=coefficients
    )
    with pytest.raises(ConfigError, match="one coefficient for each"):
        _ = config.balance_coefficients


def test_attach_changes_nothing_and_scales_in_the_backward() -> None:
    """The scale of a step is that at the time of its backward. Mutations: read it in the forward; add the loss to x."""
    x, w = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = auxiliary_losses.attach(x, w.square())
    assert torch.equal(out, x)
    auxiliary_losses.begin_step(torch.tensor(0.25))
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    assert w.grad.item() == pytest.approx(0.25 * 2 * 2.0)


def test_without_a_scale_losses_have_gradient_one() -> None:
    """Mutation: a default of zero."""
    auxiliary_losses.begin_step(None)
    w = torch.tensor(3.0, requires_grad=True, dtype=torch.float64)
    auxiliary_losses.attach(torch.zeros(2, requires_grad=True), w * 1.0).sum().backward()
    assert w.grad.item() == 1.0


def test_uniform_experts_have_the_entropy_and_z_loss_of_a_uniform_distribution() -> None:
    """Mutation: logsumexp over tokens."""
    assert load_balancing.z_loss_share(torch.zeros(6, E), 6).item() == pytest.approx(math.log(E) ** 2)
