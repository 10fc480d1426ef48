"""From router logits to experts: pure functions of logits [t, E], in the dtype they are given (float32 or float64).

Symbols: t = tokens of this rank, E = experts, k = experts of each token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel import collectives

# Below this mean change of the experts' factors Sinkhorn's iteration ends (Megatron's tolerance); the limit is for
# logits so far apart that it would hardly move.
_SINKHORN_TOLERANCE = 1e-4
_SINKHORN_EPSILON = 1e-8
_SINKHORN_ITERATIONS = 1000


def route(
    logits: Tensor,
    topk: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    scaling_factor: float | None = None,
    num_groups: int | None = None,
    group_topk: int | None = None,
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each token, best first, and the weights of their outputs.

    softmax: the k largest logits, softmax over those k; with `pre_softmax` softmax over all E, then the k largest,
    whose sum is not made 1. sigmoid and sqrtsoftplus: the k largest of score + bias; weights score / (their sum +
    1e-20) for k > 1, else the score. All times `scaling_factor`.

    Args:
        logits: [t, E].
        topk: k.
        score_function: softmax, sigmoid or sqrtsoftplus (sqrt(log(1 + e^x))).
        pre_softmax: see above.
        scaling_factor: None for one.
        num_groups: with `group_topk`: a token's experts come from its `group_topk` best of `num_groups` groups.
        group_topk: see `best_experts`.
        expert_bias: [E], added for the choice alone (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing").

    Returns:
        weights [t, k], with a gradient, and indices [t, k] int64.

    Raises:
        ConfigError: an expert bias with softmax, or a score function that does not exist.
    """
    if score_function == "softmax":
        if expert_bias is not None:
            raise ConfigError(
                "moe_router_enable_expert_bias is True, but moe_router_score_function is softmax, whose scores compete "
                "with each other; use sigmoid or sqrtsoftplus, or no bias."
            )
        scores = logits.softmax(-1) if pre_softmax else logits
    else:
        scores = _pointwise_score(logits, score_function)
    biased = scores if expert_bias is None else scores + expert_bias.to(scores.dtype)
    indices = best_experts(biased, topk, num_groups, group_topk)
    weights = scores.gather(-1, indices)
    if score_function == "softmax":
        weights = weights if pre_softmax else weights.softmax(-1)
    elif topk > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights if scaling_factor is None else weights * scaling_factor), indices


def scores_over_all_experts(logits: Tensor, score_function: str) -> Tensor:
    """Scores [t, E] that sum to 1 for each token, whatever the score function: what balance losses are made of."""
    if score_function == "softmax":
        return logits.softmax(-1)
    scores = _pointwise_score(logits, score_function)
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def _pointwise_score(logits: Tensor, score_function: str) -> Tensor:
    if score_function == "sigmoid":
        return logits.sigmoid()
    if score_function == "sqrtsoftplus":
        # The derivative of the root at 0, to which softplus of logits below about -100 rounds, is infinite.
        return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    raise ConfigError(
        f"moe_router_score_function is {score_function!r}, but it must be softmax, sigmoid or sqrtsoftplus; choose one."
    )


@torch.no_grad()
def best_experts(scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None) -> Tensor:
    """Indices [t, k] of the k largest scores [t, E] of each token, the largest first.

    Among equal scores the lower index comes first, on every device and for every number of tokens, so that the choice
    is the same at every layout; torch.topk promises no order. With groups (DeepSeek-V3, Liu et al. 2024, section 2.1.2)
    the experts, in order, form `num_groups` equal groups; a group scores the sum of its topk // group_topk best
    experts, and only the `group_topk` best groups are chosen from.
    """
    if group_topk:
        assert num_groups is not None, "group_topk without num_groups"
        grouped = scores.unflatten(-1, (num_groups, -1))
        group_scores = _sorted(grouped)[0][..., : topk // group_topk].sum(-1)
        allowed = torch.zeros_like(group_scores, dtype=torch.bool)
        allowed.scatter_(-1, _sorted(group_scores)[1][..., :group_topk], True)
        scores = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    return _sorted(scores)[1][..., :topk]


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sort(values, dim=-1, descending=True, stable=True)


def route_by_sinkhorn(
    logits: Tensor, topk: int, *, balance: bool = True, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Experts chosen by Sinkhorn's balanced assignment (Clark et al. 2022, "Unified Scaling Laws"), k of each token.

    Weights are sigmoid(logits) for k = 1, else softmax over all E, at the chosen experts.

    Args:
        logits: [t, E].
        topk: k.
        balance: choose from the balanced assignment; False (evaluation) chooses the largest weights.
        group: the ranks whose tokens are balanced together.

    Returns:
        weights [t, k], with a gradient, and indices [t, k] int64.
    """
    scores = logits.sigmoid() if topk == 1 else logits.softmax(-1)
    indices = best_experts(sinkhorn(logits, group) if balance else scores, topk)
    return scores.gather(-1, indices), indices


@torch.no_grad()
def sinkhorn(logits: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """exp(logits) [t, E], rows and columns scaled so that each token and each expert has the same sum.

    Ends when the experts' factors change by less than 1e-4 in the mean; reading that number waits for the device at
    every iteration. Sums over tokens are taken over `group`, whose ranks hold equal numbers of tokens.
    """
    # A row's largest logit cancels in its factor, and exp of the rest cannot overflow.
    cost = (logits - logits.amax(-1, keepdim=True)).exp()
    tokens, experts = cost.size(0) * group_size(group), cost.size(1)
    expert_factors = cost.new_ones(experts)
    token_factors = cost.new_ones(cost.size(0))
    for _ in range(_SINKHORN_ITERATIONS):
        before = expert_factors
        token_factors = 1 / (tokens * ((cost * before).sum(1) + _SINKHORN_EPSILON))
        column_sums = (token_factors.unsqueeze(1) * cost).sum(0)
        if group is not None and group_size(group) > 1:
            column_sums = collectives.all_reduce(column_sums, group)
        expert_factors = 1 / (experts * (column_sums + _SINKHORN_EPSILON))
        if not (expert_factors - before).abs().mean() > _SINKHORN_TOLERANCE:
            break
    return expert_factors * cost * token_factors.unsqueeze(1)


class _RandomLogits(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return torch.randn_like(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def random_logits(logits: Tensor) -> Tensor:
    """Forward: normal noise of the shape of `logits`, from the ambient random stream. Backward: identity.

    For benchmarks: every expert gets about as many tokens, and the backward pass costs what it always costs.
    """
    return _RandomLogits.apply(logits)  # type: ignore[no-any-return]
