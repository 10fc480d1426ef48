"""Routing formulas in float64, values and gradients, against loops over tokens written from their definitions."""

import math

import pytest
import torch
from torch import Tensor

from megatron_lite.errors import ConfigError
from megatron_lite.transformer.moe import routing

TOKENS, EXPERTS = 7, 8


def logits_of(seed: int = 0, scale: float = 2.0, experts: int = EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, experts, dtype=torch.float64, generator=generator).mul(scale).requires_grad_()


def naive_route(
    row: Tensor, topk: int, function: str, pre: bool, factor: float, groups: tuple[int, int] | None, bias: Tensor | None
) -> tuple[list[Tensor], list[int]]:
    """Weights and experts of one token, [E] -> k of each."""
    if function == "softmax":
        total = sum(math.e**one for one in row)
        score = [math.e**one / total for one in row]
    elif function == "sigmoid":
        score = [1 / (1 + math.e ** (-one)) for one in row]
    else:
        score = [torch.log(1 + math.e**one) ** 0.5 for one in row]
    keys = [one.item() + (0.0 if bias is None else bias[e].item()) for e, one in enumerate(score)]
    allowed = set(range(len(row)))
    if groups is not None:
        num_groups, group_topk = groups
        size = len(row) // num_groups
        # Post-softmax routing ranks logits, and adds logits up in a group.
        values = [one.item() for one in row] if function == "softmax" and not pre else keys
        best = [
            sum(sorted(values[g * size : (g + 1) * size], reverse=True)[: topk // group_topk])
            for g in range(num_groups)
        ]
        chosen_groups = sorted(range(num_groups), key=lambda g: -best[g])[:group_topk]
        allowed = {e for g in chosen_groups for e in range(g * size, (g + 1) * size)}
    chosen = sorted(allowed, key=lambda e: -keys[e])[:topk]
    weights = [score[e] for e in chosen]
    if (function == "softmax" and not pre) or (function != "softmax" and topk > 1):
        # softmax over the chosen logits is the softmax over all, made to sum to one.
        total = sum(weights) + (0.0 if function == "softmax" else 1e-20)
        weights = [one / total for one in weights]
    return [one * factor for one in weights], chosen


CASES = {
    "softmax": dict(score_function="softmax"),
    "softmax before top-k": dict(score_function="softmax", pre_softmax=True),
    "sigmoid": dict(score_function="sigmoid"),
    "sqrtsoftplus": dict(score_function="sqrtsoftplus"),
    "scaled": dict(score_function="sigmoid", scaling_factor=2.5),
    "scaled softmax": dict(score_function="softmax", scaling_factor=0.7),
    "biased": dict(score_function="sigmoid", expert_bias=torch.linspace(-0.5, 0.5, EXPERTS)),
    "groups": dict(score_function="softmax", num_groups=4, group_topk=2),
    "groups and bias": dict(
        score_function="sqrtsoftplus", num_groups=4, group_topk=2, expert_bias=torch.linspace(1.0, -1.0, EXPERTS)
    ),
    "groups, softmax before top-k": dict(score_function="softmax", pre_softmax=True, num_groups=2, group_topk=1),
}


@pytest.mark.parametrize(
    ("case", "topk"),
    # A group scores its topk // group_topk best experts, at least one.
    [(case, topk) for case in CASES for topk in (1, 2, 4) if CASES[case].get("group_topk", 1) <= topk],
)
def test_route_equals_its_definition(case: str, topk: int) -> None:
    """Mutations: softmax over all E after top-k; weights of score + bias; normalize for k = 1; forget the scaling

    factor; rank groups by one expert; leave the softplus without its root.
    """
    arguments = dict(CASES[case])
    logits, reference = logits_of(), logits_of()
    weights, indices = routing.route(logits, topk, **arguments)
    groups = (arguments["num_groups"], arguments["group_topk"]) if "num_groups" in arguments else None
    rows = [
        naive_route(
            row,
            topk,
            arguments["score_function"],
            arguments.get("pre_softmax", False),
            arguments.get("scaling_factor", 1.0),
            groups,
            arguments.get("expert_bias"),
        )
        for row in reference
    ]
    expected = torch.stack([torch.stack(row[0]) for row in rows])
    assert indices.tolist() == [row[1] for row in rows]
    assert indices.dtype == torch.int64
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(TOKENS, topk, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (weights * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-11, atol=1e-13)


def test_a_bias_moves_the_choice_and_not_the_weight() -> None:
    """Mutation: gather the weights from score + bias, or leave the bias out."""
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    weights, indices = routing.route(logits, 1, score_function="sigmoid", expert_bias=torch.tensor([-1.0, 0.0, 0.0]))
    assert indices.tolist() == [[1]]
    assert weights.item() == pytest.approx(1 / (1 + math.exp(-1.0)))


def test_equal_scores_go_to_the_lowest_index() -> None:
    """T41, for any number of tokens and experts. Mutation: torch.topk, or a sort that is not stable."""
    for experts in (4, 8, 64, 256):
        for tokens in (1, 3, 50):
            ties = torch.zeros(tokens, experts)
            assert routing.best_experts(ties, 3).tolist() == [[0, 1, 2]] * tokens
            ties[:, experts // 2 :] = 1.0
            first = experts // 2
            assert routing.best_experts(ties, 2).tolist() == [[first, first + 1]] * tokens
            assert routing.best_experts(ties, 2, 2, 1).tolist() == [[first, first + 1]] * tokens


def test_saturated_sigmoids_are_ties_by_index() -> None:
    """Logits of 30 and 40 have the same sigmoid in float32. Mutation: torch.topk."""
    logits = torch.tensor([[-1.0, 30.0, 40.0, 35.0, 50.0, 20.0]])
    assert routing.route(logits, 3, score_function="sigmoid")[1].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_scores_over_all_experts(function: str) -> None:
    """Mutation: leave scores other than softmax's as they are."""
    logits = logits_of(3)
    scores = routing.scores_over_all_experts(logits, function)
    raw = {
        "softmax": logits.exp(),
        "sigmoid": 1 / (1 + (-logits).exp()),
        "sqrtsoftplus": torch.log1p(logits.exp()).sqrt(),
    }[function]
    torch.testing.assert_close(scores, raw / raw.sum(-1, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_have_finite_gradients(function: str, size: float) -> None:
    """In float32, whose exp(-104) is 0. Mutation: the root of softplus without a lower bound (0 * inf is nan)."""
    logits = (torch.linspace(-1.0, 1.0, 8).repeat(2, 1) * size).requires_grad_()
    weights, _ = routing.route(logits, 3, score_function=function)
    scores = routing.scores_over_all_experts(logits, function)
    (weights * torch.arange(3.0)).sum().add((scores * torch.arange(8.0)).sum()).backward()
    assert weights.isfinite().all()
    assert scores.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def naive_sinkhorn(logits: list[list[float]]) -> list[list[float]]:
    """Rows, then columns, scaled in turn, ten thousand times."""
    cost = [[math.exp(one) for one in row] for row in logits]
    tokens, experts = len(cost), len(cost[0])
    for _ in range(10_000):
        cost = [[one / sum(row) / tokens for one in row] for row in cost]
        columns = [sum(row[e] for row in cost) for e in range(experts)]
        cost = [[one / columns[e] / experts for e, one in enumerate(row)] for row in cost]
    return cost


def test_sinkhorn_balances() -> None:
    """Mutation: scale columns only; end after one iteration."""
    logits = logits_of(4, experts=3).detach()
    ours = routing.sinkhorn(logits)
    torch.testing.assert_close(
        ours, torch.tensor(naive_sinkhorn(logits.tolist()), dtype=torch.float64), rtol=2e-3, atol=0
    )
    torch.testing.assert_close(ours.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_sinkhorn_spreads_tokens_that_agree() -> None:
    """All tokens like expert 0 best. Mutation: choose by the scores in training too."""
    logits = torch.tensor([[3.0 + 0.1 * token, 0.0] for token in range(10)], dtype=torch.float64)
    weights, indices = routing.route_by_sinkhorn(logits, 1)
    assert sorted(indices.flatten().tolist()) == [0] * 5 + [1] * 5
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, indices))
    assert routing.route_by_sinkhorn(logits, 1, balance=False)[1].tolist() == [[0]] * 10


def test_sinkhorn_weights_of_several_experts_have_a_gradient() -> None:
    """Mutation: sigmoid for k > 1 too; compute the weights without gradient."""
    logits, reference = logits_of(5), logits_of(5)
    weights, indices = routing.route_by_sinkhorn(logits, 2)
    expected = (reference.exp() / reference.exp().sum(1, keepdim=True)).gather(1, indices)
    torch.testing.assert_close(weights, expected)
    weights.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


def test_sinkhorn_survives_huge_logits() -> None:
    """Mutation: exp without taking the largest logit of a row off."""
    assert routing.sinkhorn(torch.tensor([[200.0, 100.0], [150.0, 149.0]])).isfinite().all()


def test_random_logits_let_gradients_through() -> None:
    """Mutation: draw the noise outside the Function, so that the gradient is lost."""
    logits = logits_of(6)
    noise = routing.random_logits(logits)
    assert not torch.equal(noise, logits)
    upstream = torch.randn_like(noise)
    (noise * upstream).sum().backward()
    assert torch.equal(logits.grad, upstream)


def test_what_cannot_be_is_refused() -> None:
    """Mutation: leave the checks out."""
    with pytest.raises(ConfigError, match="softmax, whose scores compete"):
        routing.route(logits_of(), 2, expert_bias=torch.zeros(EXPERTS))
    with pytest.raises(ConfigError, match="'tanh', but it must be"):
        routing.route(logits_of(), 2, score_function="tanh")
