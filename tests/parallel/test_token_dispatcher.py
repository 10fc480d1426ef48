"""Token dispatchers and MoELayer on real processes, in float64, against the dense formula and one process.

T40, T41, T44, T46, T47. Each worker computes the reference too. The docstring of each test names mutations of the code
that were tried and make it fail; those in BROKEN, at the end, are run.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.instruments import count_sent_bytes
from megatron_lite import parallel_state
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.parameters import (
    _shard_of,
    initialize_parameters,
    local,
    named_parameter_specs,
)
from megatron_lite.transformer.moe import token_dispatcher
from megatron_lite.transformer.moe.capacity import expert_capacity, pairs_within_capacity
from megatron_lite.transformer.moe.moe_layer import MoELayer
from megatron_lite.transformer.moe.token_dispatcher import TokenDispatcher, build_token_dispatcher
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.parallel.pool import WorkerError, WorkerPool

EXPERTS, TOKENS, HIDDEN, FFN = 8, 5, 6, 4
BOUND = 1e-12
TIMEOUT_S = 30.0
DEFAULT_ORDER = "tp-cp-ep-dp-pp"
SIZES = pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
KINDS = ("allgather", "alltoall")


def meet(rank: int, world_size: int) -> None:
    """Nobody leaves before all have come: those on their way would lose a connection."""
    torch.distributed.barrier()


@pytest.fixture(autouse=True, scope="module")
def imported(pool: WorkerPool) -> None:
    """Workers that have imported everything: the timeouts of the tests are those of a hang."""
    pool.run(meet, world_size=4)


def run(pool: WorkerPool, world_size: int, function: Any, *arguments: Any, broken: str | None = None) -> list[Any]:
    """`function(rank, world_size, *arguments)` on all ranks, with the code broken as named; results by rank."""
    return pool.run(_with_code, broken, function, arguments, world_size=world_size, timeout_s=TIMEOUT_S)


def _with_code(rank: int, world_size: int, broken: str | None, function: Any, arguments: tuple[Any, ...]) -> Any:
    with nullcontext() if broken is None else BROKEN[broken]():
        return function(rank, world_size, *arguments)


def draw(seed: int, *shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_choices(seed: int, tokens: int, topk: int, experts: range = range(EXPERTS)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(len(experts), generator=generator)[:topk] for _ in range(tokens)]) + experts[0]


# name: the choices [world * t, k] of all ranks' tokens
ROUTINGS = {
    "random": lambda tokens: random_choices(1, tokens, 3),
    "top-1": lambda tokens: random_choices(2, tokens, 1),
    "every expert": lambda tokens: random_choices(3, tokens, EXPERTS),
    "all to the first": lambda tokens: torch.zeros(tokens, 1, dtype=torch.int64),
    "all to the last": lambda tokens: torch.full((tokens, 1), EXPERTS - 1),
    "an expert without tokens": lambda tokens: random_choices(4, tokens, 2, range(1, EXPERTS)),
    "only the first rank's experts": lambda tokens: random_choices(5, tokens, 2, range(2)),
}


class Experts(nn.Module):
    """Expert e is tanh(x A_e) B_e; this rank holds some of them, and of those 1/etp of the columns of A."""

    def __init__(self, experts: range, columns: slice) -> None:
        super().__init__()
        self.first = nn.Parameter(draw(10, EXPERTS, HIDDEN, FFN)[experts.start : experts.stop, :, columns].clone())
        self.second = nn.Parameter(draw(11, EXPERTS, FFN, HIDDEN)[experts.start : experts.stop, columns].clone())

    def forward(self, rows: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        assert int(tokens_per_expert.sum()) == rows.size(0) == probs.size(0)
        parts = zip(rows.split(tokens_per_expert.tolist()), probs.split(tokens_per_expert.tolist()), strict=True)
        return torch.cat(
            [(torch.tanh(x @ self.first[e]) * p[:, None]) @ self.second[e] for e, (x, p) in enumerate(parts)]
        )

    def dense(self, tokens: Tensor, probs: Tensor, indices: Tensor) -> Tensor:
        """sum_j p_tj expert_{i_tj}(x_t), for a module that holds all experts."""
        of_all = torch.einsum("tef,efh->teh", torch.tanh(torch.einsum("th,ehf->tef", tokens, self.first)), self.second)
        chosen = of_all.gather(1, indices[:, :, None].expand(-1, -1, HIDDEN))
        return (chosen * probs[:, :, None]).sum(1)


def dispatcher_of(kind: str, ep: int, **settings: Any) -> TokenDispatcher:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_token_dispatcher_type=kind,
        **settings,
    )
    return build_token_dispatcher(config, EXPERTS // ep)


@dataclass
class Result:
    """What one rank computes, and what it should."""

    ours: dict[str, Tensor]
    reference: dict[str, Tensor]


def compute(rank: int, dispatcher: TokenDispatcher, routing: str, kept: Tensor | None = None) -> Result:
    """Output and gradients of this rank's tokens and experts; `kept` [world * t, k]: pairs that are not dropped."""
    world, etp = dispatcher.size, dispatcher.etp_size
    tokens, indices = draw(20, world * TOKENS, HIDDEN), ROUTINGS[routing](world * TOKENS)
    probs, weight = draw(21, *indices.shape).sigmoid(), draw(22, world * TOKENS, HIDDEN)
    own = slice(rank * TOKENS, (rank + 1) * TOKENS)

    everything = Experts(range(EXPERTS), slice(None))
    inputs = [tokens.clone().requires_grad_(), probs.clone().requires_grad_()]
    used = inputs[1] if kept is None else inputs[1] * kept
    out = everything.dense(inputs[0], used, indices)
    gradients = torch.autograd.grad((out * weight).sum(), [*inputs, everything.first, everything.second])
    width = FFN // etp
    etp_rank = parallel_state.get_expert_tensor_parallel_rank()
    columns = slice(etp_rank * width, (etp_rank + 1) * width)
    local_experts = range(EXPERTS)[dispatcher.ep_rank * dispatcher.num_local_experts :][: dispatcher.num_local_experts]
    held = slice(local_experts.start, local_experts.stop)
    reference = {
        "output": out[own].detach(),
        "tokens": gradients[0][own],
        "probs": gradients[1][own],
        "first": gradients[2][held, :, columns],
        "second": gradients[3][held, columns],
    }

    experts = Experts(local_experts, columns)
    inputs = [tokens[own].clone().requires_grad_(), probs[own].clone().requires_grad_()]
    rows, row_probs, tokens_per_expert, state = dispatcher.dispatch(*inputs, indices[own])
    out = dispatcher.combine(experts(rows, row_probs, tokens_per_expert), state)
    gradients = torch.autograd.grad((out * weight[own]).sum(), [*inputs, experts.first, experts.second])
    names = ("tokens", "probs", "first", "second")
    return Result({"output": out.detach(), **dict(zip(names, gradients, strict=True))}, reference)


def worst(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == reference.keys()
    for name in ours:
        assert ours[name].shape == reference[name].shape, name
    return {name: float((ours[name] - reference[name]).abs().max()) for name in ours}


def start(ep: int, etp: int, **sizes: Any) -> None:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, **sizes)


def all_routings(rank: int, world_size: int, ep: int, etp: int, order: str) -> dict[str, dict[str, float]]:
    start(ep, etp, order=order)
    errors = {}
    for routing in ROUTINGS:
        results = {kind: compute(rank, dispatcher_of(kind, ep), routing) for kind in KINDS}
        for kind, result in results.items():
            errors[f"{kind}, {routing}"] = worst(result.ours, result.reference)
        errors[f"difference, {routing}"] = worst(results["allgather"].ours, results["alltoall"].ours)
    return errors


def assert_small(per_rank: list[dict[str, dict[str, float]]], bound: float = BOUND) -> None:
    for rank, errors in enumerate(per_rank):
        for case, worst_of in errors.items():
            limit = 1e-14 if case.startswith("difference") else bound
            assert max(worst_of.values()) < limit, f"rank {rank}, {case}: {worst_of}"


def check_dense_formula(
    pool: WorkerPool, ep: int, etp: int, order: str = DEFAULT_ORDER, broken: str | None = None
) -> None:
    assert_small(run(pool, ep * etp, all_routings, ep, etp, order, broken=broken))


@SIZES
def test_dispatch_experts_combine_equals_the_dense_formula(pool: WorkerPool, ep: int, etp: int) -> None:
    """T40, T41, T47: output and gradients of tokens, probabilities and experts, and the dispatchers agree.

    Fails with: gathered tokens whose gradients are split instead of summed; probabilities gathered outside of the
    graph; received rows left in the order of their source (`rows_left_by_source`); one expert tensor rank getting all
    copies; a rank without rows that skips the all-to-all.
    """
    check_dense_formula(pool, ep, etp)


def test_the_order_of_the_axes_is_free(pool: WorkerPool) -> None:
    """Expert ranks may be neighbours, not expert tensor ranks. Fails with strides exchanged, or taken as known."""
    check_dense_formula(pool, 2, 2, "ep-tp-cp-dp-pp")


def waits_in_vain(rank: int, world_size: int) -> str:
    """What the forward pass says on a rank that waits for another one which does not come; nothing if all come.

    Forward alone: a backward pass would take the next message of that rank for the one that is missed, and gloo ends
    the process where their sizes differ.
    """
    start(world_size, 1)
    dispatcher, indices = dispatcher_of("alltoall", world_size), ROUTINGS["all to the first"](TOKENS)
    try:
        rows, _, _, state = dispatcher.dispatch(draw(20, TOKENS, HIDDEN), draw(21, *indices.shape), indices)
        dispatcher.combine(rows, state)
    except RuntimeError as error:
        if "closed by peer" in str(error) or "Timed out" in str(error):
            return str(error)
        raise
    return ""


def check_nobody_waits(pool: WorkerPool, broken: str | None = None) -> None:
    assert run(pool, 2, waits_in_vain, broken=broken) == ["", ""]


def test_a_rank_without_rows_takes_part(pool: WorkerPool) -> None:
    """T40: no hang. Fails if a rank that has no rows to send leaves the all-to-all out (`empty_all_to_all_skipped`)."""
    check_nobody_waits(pool)


def with_capacity(rank: int, world_size: int, ep: int, etp: int) -> dict[str, dict[str, float]]:
    start(ep, etp)
    errors = {}
    for routing in ("random", "all to the last", "every expert"):
        for policy in ("probs", "position"):
            for factor in (0.4, 1.0, 3.0):
                results = []
                kept, dropped = kept_pairs(world_size, routing, factor, policy)
                for kind in KINDS:
                    for pad in (False, True):
                        settings = {
                            "moe_expert_capacity_factor": factor,
                            "moe_pad_expert_input_to_capacity": pad,
                            "moe_token_drop_policy": policy,
                        }
                        result = compute(rank, dispatcher_of(kind, ep, **settings), routing, kept)
                        name = f"{kind}, {routing}, {policy}, {factor}, padded: {pad}"
                        errors[name] = worst(result.ours, result.reference)
                        results.append(result.ours)
                assert dropped or not (factor < 1 or routing == "all to the last"), "the cases drop something"
                for other in results[1:]:
                    errors[f"difference, {routing}, {policy}, {factor}"] = worst(results[0], other)
    return errors


def kept_pairs(world_size: int, routing: str, factor: float, policy: str) -> tuple[Tensor, bool]:
    """[world * t, k]: what capacities per rank leave, and whether anything is dropped."""
    indices = ROUTINGS[routing](world_size * TOKENS)
    probs = draw(21, *indices.shape).sigmoid()
    capacity = expert_capacity(TOKENS, indices.size(1), EXPERTS, factor)
    per_rank = zip(probs.split(TOKENS), indices.split(TOKENS), strict=True)
    kept = torch.cat([pairs_within_capacity(p, i, EXPERTS, capacity, policy) for p, i in per_rank])
    return kept, not bool(kept.all())


def check_capacity(pool: WorkerPool, ep: int, etp: int, broken: str | None = None) -> None:
    assert_small(run(pool, ep * etp, with_capacity, ep, etp, broken=broken))


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_capacity_counts_the_tokens_of_a_rank(pool: WorkerPool, ep: int, etp: int) -> None:
    """T44. Every dispatcher, padded or not, leaves out the same pairs: those beyond each rank's own capacity.

    Fails with: the capacity of all ranks' tokens (`capacity_of_the_group`); dropped pairs that keep their probability;
    padding by expert only, without the source rank.
    """
    check_capacity(pool, ep, etp)


def rows_of_dispatchers(rank: int, world_size: int, ep: int, etp: int) -> list[list[list[Tensor]]]:
    start(ep, etp)
    found = []
    for settings in ({}, {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True}):
        indices = ROUTINGS["random"](world_size * TOKENS)[rank * TOKENS :][:TOKENS]
        numbers = torch.arange(rank * TOKENS, (rank + 1) * TOKENS, dtype=torch.float64)[:, None]
        probs = indices.to(torch.float64) + 1.0
        results = [dispatcher_of(kind, ep, **settings).dispatch(numbers, probs, indices) for kind in KINDS]
        found.append([[rows, row_probs, counts] for rows, row_probs, counts, _ in results])
    return found


def test_rows_are_ordered_by_expert_then_by_token(pool: WorkerPool) -> None:
    """T41: in both dispatchers, so that sums over the rows of an expert are taken in one order.

    Fails with: equal keys sorted in reverse (`equal_rows_reversed`); received rows left in the order of their source.
    """
    check_order_of_rows(pool)


def check_order_of_rows(pool: WorkerPool, broken: str | None = None) -> None:
    for rank, (dropless, padded) in enumerate(run(pool, 4, rows_of_dispatchers, 2, 2, broken=broken)):
        for (gathered, gathered_probs, gathered_counts), (rows, probs, counts) in (dropless, padded):
            assert torch.equal(gathered, rows)
            assert torch.equal(gathered_probs, probs)
            assert torch.equal(gathered_counts, counts)
        rows, probs, counts = dropless[0]
        indices = ROUTINGS["random"](4 * TOKENS)
        first = rank // 2 * 4
        expected = [(e, t) for e in range(first, first + 4) for t in range(4 * TOKENS) if e in indices[t]]
        assert [(int(p) - 1, int(t)) for p, t in zip(probs, rows[:, 0], strict=True)] == expected
        assert counts.tolist() == [sum(e == expert for e, _ in expected) for expert in range(first, first + 4)]


def count_bytes(rank: int, world_size: int, ep: int, etp: int, kind: str, pad: bool) -> tuple[list[int], list[int]]:
    """Bytes sent forward and backward: counted, and by the formula."""
    start(ep, etp)
    settings = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True} if pad else {}
    dispatcher = dispatcher_of(kind, ep, **settings)
    indices = ROUTINGS["random"](world_size * TOKENS)
    own, topk = slice(rank * TOKENS, (rank + 1) * TOKENS), indices.size(1)
    tokens = draw(20, TOKENS, HIDDEN).to(torch.bfloat16).requires_grad_()
    probs = draw(21, TOKENS, topk).float().requires_grad_()
    with count_sent_bytes() as forward:
        rows, row_probs, _, state = dispatcher.dispatch(tokens, probs, indices[own])
        out = dispatcher.combine(rows * row_probs[:, None].to(rows.dtype), state)
    with count_sent_bytes() as backward:
        (out * out).sum().backward()
    e, p, local_experts = 2, 4, EXPERTS // ep
    if kind == "allgather":
        alike = (world_size - 1) * TOKENS * (2 * HIDDEN * e + topk * p)
        return [total(forward), total(backward)], [alike + (world_size - 1) * TOKENS * 4 * topk, alike]
    if pad:
        a = b = (world_size - 1) * local_experts * expert_capacity(TOKENS, topk, EXPERTS, 1.0)
        counts = 0
    else:
        # a: the copies of each pair, less those for this rank; b: this rank's experts' pairs, less its own.
        mine = indices // local_experts == rank // etp
        a = TOKENS * topk * etp - int(mine[own].sum())
        b = int(mine.sum()) - int(mine[own].sum())
        counts = 8 * (world_size - 1) * local_experts
    expected = [a * (HIDDEN * e + p) + b * HIDDEN * e + counts, a * HIDDEN * e + b * (HIDDEN * e + p)]
    return [total(forward), total(backward)], expected


def total(sent: Counter[str]) -> int:
    return sum(sent.values())


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("kind", "pad"), [("allgather", False), ("alltoall", False), ("alltoall", True)])
def test_what_is_sent_is_what_the_formulas_say(pool: WorkerPool, ep: int, etp: int, kind: str, pad: bool) -> None:
    """The formulas are in the docstring of token_dispatcher. Fails with int64 indices, or with probabilities cast."""
    world = ep * etp
    for counted, expected in pool.run(count_bytes, ep, etp, kind, pad, world_size=world, timeout_s=TIMEOUT_S):
        assert counted == expected
        assert (sum(counted) > 0) == (world > 1)


def count_waits(rank: int, world_size: int, ep: int, etp: int, kind: str, settings: dict[str, Any]) -> tuple[int, int]:
    """How often the host reads a value from the device, forward and backward."""
    start(ep, etp)
    dispatcher = dispatcher_of(kind, ep, **settings)
    indices = ROUTINGS["random"](TOKENS)
    tokens, probs = draw(20, TOKENS, HIDDEN).requires_grad_(), draw(21, *indices.shape).requires_grad_()
    seen = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(self: Tensor, *arguments: Any) -> Any:
            seen.append(name)
            return original(self, *arguments)

        return mock.patch.object(Tensor, name, read)

    with counted("tolist"), counted("item"), counted("__int__"), counted("__bool__"), counted("nonzero"):
        rows, row_probs, _, state = dispatcher.dispatch(tokens, probs, indices)
        out = dispatcher.combine(rows * row_probs[:, None], state)
        forward = len(seen)
        (out * out).sum().backward()
    return forward, len(seen) - forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ep", "etp", "settings", "waits"),
    [
        (2, 1, {}, 1),
        (2, 2, {}, 1),
        (1, 2, {}, 0),
        (2, 1, {"moe_expert_capacity_factor": 1.0}, 1),
        (2, 1, {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}, 0),
    ],
)
def test_the_host_waits_once_a_layer_at_most(
    pool: WorkerPool, kind: str, ep: int, etp: int, settings: dict[str, Any], waits: int
) -> None:
    """Fails with the lists of sent and received counts read one by one, or with counts exchanged under padding."""
    found = pool.run(count_waits, ep, etp, kind, settings, world_size=ep * etp, timeout_s=TIMEOUT_S)
    assert found == [(waits, 0)] * (ep * etp)


# The whole layer, over tensor, expert and data parallel ranks.

SEQUENCE, BATCH = 8, 2


@dataclass(frozen=True)
class Layout:
    """Ranks of one MoE layer."""

    world: int
    tp: int = 1
    sp: bool = False
    ep: int = 1
    etp: int = 1
    kind: str = "alltoall"

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"w{self.world}-tp{self.tp}{'sp' * self.sp}-ep{self.ep}-etp{self.etp}-{self.kind}"


LAYOUTS = [
    Layout(world, tp, sp, ep, etp, kind)
    for world, tp, ep, etp in [(2, 2, 1, 2), (2, 2, 2, 1), (2, 2, 1, 1), (4, 2, 2, 2), (4, 2, 2, 1), (4, 1, 2, 2)]
    for sp in ([False, True] if tp > 1 else [False])
    for kind in KINDS
]


def layer_config(layout: Layout, **settings: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        fp64=True,
        params_dtype=torch.float64,
        init_method_std=0.3,
        num_moe_experts=4,
        moe_ffn_hidden_size=12,
        moe_router_topk=2,
        moe_token_dispatcher_type=layout.kind,
        moe_shared_expert_intermediate_size=12,
        moe_shared_expert_gate=True,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        **{"swiglu": True, **settings},
    )


def run_layer(layer: MoELayer, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Output, input gradient; parameters get theirs."""
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * weight).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def layer_errors(rank: int, world_size: int, layout: Layout, bias: bool) -> dict[str, float]:
    dp = layout.world // layout.tp
    x, weight = draw(30, SEQUENCE, BATCH * dp, 16), draw(31, SEQUENCE, BATCH * dp, 16)
    alone = MoELayer(layer_config(Layout(1), add_bias_linear=bias), 1, ProcessGroupCollection())
    initialize_parameters(alone, 5)
    fill_zeros(alone)
    expected_out, expected_grad = run_layer(alone, x, weight)

    start(layout.ep, layout.etp, tensor_model_parallel_size=layout.tp)
    layer = MoELayer(layer_config(layout, add_bias_linear=bias), 1)
    initialize_parameters(layer, 5)
    fill_zeros(layer)
    replica = rank // layout.tp

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor[:, replica * BATCH : (replica + 1) * BATCH]
        return tensor.chunk(layout.tp)[rank % layout.tp] if layout.sp else tensor

    out, grad = run_layer(layer, own(x), own(weight))
    errors = worst({"out": out, "input": grad}, {"out": own(expected_out), "input": own(expected_grad)})
    reference = dict(alone.named_parameters())
    specs = named_parameter_specs(layer)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        full = reference[name].grad
        assert full is not None, name
        gradient = local(parameter.grad).clone()
        expert = specs[name].is_expert
        if specs[name].partial_over_tp:
            torch.distributed.all_reduce(gradient, group=groups.expt_tp if expert else groups.tp)
        torch.distributed.all_reduce(gradient, group=groups.expt_dp if expert else groups.dp_cp)
        errors[name] = float((gradient - _shard_of(local(full), parameter)).abs().max())
    return errors


def fill_zeros(layer: MoELayer) -> None:
    """Biases begin at zero, where they would prove little: give them values that do not depend on the layout."""
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            full = draw(len(name), *parameter.shape)
            with torch.no_grad():
                local(parameter).copy_(_shard_of(full, parameter))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_an_moe_layer_is_the_same_at_every_layout(pool: WorkerPool, layout: Layout) -> None:
    """T3, T39, T46, T47: output, gradient of the input and of every parameter, declared reductions applied.

    Fails with: ranks that dispatch the same tokens each; the gathered result's gradient summed; the shared experts'
    output reduced twice; the gate not declared partial.
    """
    for bias in (False, True):
        for rank, errors in enumerate(
            pool.run(layer_errors, layout, bias, world_size=layout.world, timeout_s=TIMEOUT_S)
        ):
            assert max(errors.values()) < BOUND, f"rank {rank}: {errors}"


def refuse_length(rank: int, world_size: int) -> None:
    start(1, 1, tensor_model_parallel_size=2)
    layer = MoELayer(layer_config(Layout(2, tp=2)), 1)
    with pytest.raises(ValueError, match=r"length of this rank is 5, .* parallel size \(2\).* use sequences of 6"):
        layer(draw(1, 5, 1, 16))


def test_a_sequence_that_does_not_divide_is_refused(pool: WorkerPool) -> None:
    pool.run(refuse_length, world_size=2, timeout_s=TIMEOUT_S)


# Mutations


def capacity_of_the_group():
    """T44: the capacity of an expert counts the tokens of all ranks of the group."""

    def broken(num_tokens: int, *arguments: Any) -> int:
        return expert_capacity(num_tokens * torch.distributed.get_world_size(), *arguments)

    return mock.patch.object(token_dispatcher, "expert_capacity", broken)


def empty_all_to_all_skipped():
    """T40: a rank that has no rows to send stays away."""
    original = token_dispatcher.all_to_all

    def broken(group: Any, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        if sum(sent):
            return original(group, rows, received, sent)
        return rows.new_zeros(sum(received), *rows.shape[1:])

    return mock.patch.object(token_dispatcher, "all_to_all", broken)


def rows_left_by_source():
    """T41: one of the dispatchers takes rows by source and expert for rows by expert."""
    return mock.patch.object(token_dispatcher.AlltoAllTokenDispatcher, "_order_of_experts", return_value=None)


def equal_rows_reversed():
    """T41: one of the dispatchers has the tokens of an expert the other way round; the results differ by rounding."""
    dispatcher, grouped = token_dispatcher.AlltoAllTokenDispatcher, token_dispatcher.group_slots
    original = dispatcher._dispatch

    def reversed_slots(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        order, counts = grouped(keys.flip(0), num_keys)
        return keys.numel() - 1 - order, counts

    def broken(self: TokenDispatcher, *arguments: Any) -> Any:
        with mock.patch.object(token_dispatcher, "group_slots", reversed_slots):
            return original(self, *arguments)

    return mock.patch.object(dispatcher, "_dispatch", broken)


BROKEN = {
    function.__name__: function
    for function in (capacity_of_the_group, empty_all_to_all_skipped, rows_left_by_source, equal_rows_reversed)
}

CASES = [
    ("empty_all_to_all_skipped", check_nobody_waits, (), "T40"),
    ("rows_left_by_source", check_dense_formula, (2, 1), "T41"),
    ("equal_rows_reversed", check_order_of_rows, (), "T41"),
    ("capacity_of_the_group", check_capacity, (2, 1), "T44"),
]
"""Mutation, the check that fails with it and its arguments, and the traps it stands for."""


@pytest.mark.parametrize(("broken", "check", "arguments"), [row[:3] for row in CASES])
def test_broken_code_is_caught(pool: WorkerPool, broken: str, check: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(AssertionError) as caught:
        check(pool, *arguments, broken=broken)
    assert not isinstance(caught.value, WorkerError), "the mutation itself crashed"
