"""The router's losses, statistics and choices at every layout, in float64, against one process.

Each worker routes its own part of the tokens: of its data parallel replica's micro-batches, its slice of the sequence
over context and tensor parallel ranks (sequence parallelism). One process routes the same micro-batches one after the
other. Parts of the sequence prefer different experts, so that no rank's load resembles the whole's. Mutations in
backticks are run: see BROKEN, at the end.
"""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel import checkpoint, model_parallel_cuda_manual_seed
from megatron_lite.transformer.moe import auxiliary_losses, routing, statistics
from megatron_lite.transformer.moe.router import TopKRouter
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.parallel.pool import WorkerError, WorkerPool

S, B, H, E, K, MICRO_BATCHES = 8, 2, 6, 8, 2, 2  # micro-batches of one replica

LAYOUTS = pytest.mark.parametrize(("tp", "cp", "dp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2)])

LOSSES: dict[str, dict[str, Any]] = {
    "aux_loss": dict(moe_aux_loss_coeff=0.3),
    "seq_aux_loss": dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.3),
    "z_loss": dict(moe_z_loss_coeff=0.3),
    "all but global": dict(
        moe_router_load_balancing_type=["seq_aux_loss", "aux_loss"],
        moe_aux_loss_coeff=[0.2, 0.3],
        moe_z_loss_coeff=0.1,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.05,
    ),
}
GLOBAL = dict(moe_router_load_balancing_type=["global_aux_loss", "aux_loss"], moe_aux_loss_coeff=[0.3, 0.1])


def run(pool: WorkerPool, world_size: int, function: Any, *arguments: Any, broken: str | None = None) -> list[Any]:
    """`function(rank, world_size, *arguments)` on all ranks, with the code broken as named; results by rank."""
    return pool.run(_with_code, broken, function, arguments, world_size=world_size)


def _with_code(rank: int, world_size: int, broken: str | None, function: Any, arguments: tuple[Any, ...]) -> Any:
    with nullcontext() if broken is None else BROKEN[broken]():
        return function(rank, world_size, *arguments)


def build(groups: ProcessGroupCollection | None, settings: dict[str, Any], tp: int = 1) -> TopKRouter:
    config = TransformerConfig(
        **dict(
            num_layers=1,
            hidden_size=H,
            num_attention_heads=2,
            num_moe_experts=E,
            moe_router_topk=K,
            params_dtype=torch.float64,
            tensor_model_parallel_size=tp,
            sequence_parallel=tp > 1,
        )
        | settings
    )
    router = TopKRouter(config, groups, layer_number=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return router


def micro_batch(step: int, number: int) -> Tensor:
    """[S, B, H]: positions and sequences lean to different sides, so their experts differ."""
    generator = torch.Generator().manual_seed(100 * step + number)
    x = torch.randn(S, B, H, dtype=torch.float64, generator=generator)
    x[S // 2 :] += 1.5 * torch.randn(H, dtype=torch.float64, generator=generator)
    x[:, 0] += 1.5 * torch.randn(H, dtype=torch.float64, generator=generator)
    return x


def own_part(x: Tensor, tp: int, cp: int) -> Tensor:
    """[S, B, H] -> this rank's [S / (tp cp), B, H]: every cp-th position, and of those a stretch for each tp rank."""
    of_context = x[parallel_state.get_context_parallel_rank() :: cp]
    return of_context.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]


def step_through(
    router: TopKRouter, batches: list[Tensor], replicas: int, group: Any = None, *, recompute: bool = False
) -> dict[str, float]:
    """Forward and backward of one step, then the statistics and the bias update."""
    forward_backward(router, batches, replicas, recompute=recompute)
    statistics.update_expert_bias(router, group)
    return statistics.collect(router, group)


def forward_backward(router: TopKRouter, batches: list[Tensor], replicas: int, *, recompute: bool = False) -> None:
    auxiliary_losses.begin_step(torch.tensor(1.0 / (len(batches) * replicas), dtype=torch.float64))
    for x in batches:
        if recompute:
            objective = checkpoint(lambda hidden: router(hidden)[0].square(), False, x).sum()
        else:
            objective = router(x)[0].square().sum()
        objective.backward()


def assert_close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def check_losses(rank: int, world_size: int, tp: int, cp: int, dp: int, settings: dict[str, Any]) -> dict[str, float]:
    """Two steps; weights are moved alike between them, through nothing but the expert bias."""
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(3)
    everyone = parallel_state.get_group("tp_dp_cp")
    router, single = build(None, settings, tp), build(ProcessGroupCollection(), settings)
    assert all(spec.partial_over_tp == (tp > 1) for spec in router.__dict__["parameter_specs"].values())
    replica, is_global = parallel_state.get_data_parallel_rank(), "global_aux_loss" in router.coefficients
    values: dict[str, float] = {}
    for step in range(2):
        batches = [micro_batch(step, number) for number in range(MICRO_BATCHES * dp)]
        own = [own_part(x, tp, cp) for x in batches[replica::dp]]
        if is_global:  # what all replicas route at a time is one micro-batch of one process
            batches = [torch.cat(batches[i : i + dp], dim=1) for i in range(0, len(batches), dp)]
        values = step_through(router, own, dp, everyone)
        expected = step_through(single, batches, 1)
        assert values == pytest.approx(expected, rel=1e-10, abs=1e-12)
        for ours, reference in zip(router.parameters(), single.parameters(), strict=True):
            assert ours.grad is not None
            assert reference.grad is not None
            torch.distributed.all_reduce(ours.grad, group=everyone)
            assert_close(ours.grad, reference.grad)
            ours.grad = reference.grad = None
        for (name, ours), (_, reference) in zip(router.named_buffers(), single.named_buffers(), strict=True):
            if name == "expert_bias":
                assert torch.equal(ours, reference)
                assert ours.any()
    return values


@LAYOUTS
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_equal_one_process(pool: WorkerPool, tp: int, cp: int, dp: int, loss: str) -> None:
    """T43, T45. Mutations: counts of this rank alone, or of its tensor parallel group; tokens of this rank alone;

    counts of a sequence mixed with the others'; scale without the data parallel size; statistics or bias of this rank
    alone; a micro-batch counted once for each rank; parameters not declared partial.
    """
    values = pool.run(check_losses, tp, cp, dp, LOSSES[loss], world_size=tp * cp * dp)
    assert all(value == values[0] for value in values)
    assert values[0]["moe_balance"] > 1.2  # the load is unequal, or equality would say little


@LAYOUTS
def test_global_loss_equals_one_process(pool: WorkerPool, tp: int, cp: int, dp: int) -> None:
    """T43. The micro-batches of all replicas at a time are one. Mutations: counts of tensor x context ranks only;

    scores averaged over the tokens of all replicas (the gradient is then dp times too small).
    """
    if dp == 1:
        pool.run(check_losses, tp, cp, dp, GLOBAL, world_size=tp * cp)
        return
    # aux_loss looks at micro-batches one by one: not where one process takes those of two replicas together.
    alone = dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.3)
    pool.run(check_losses, tp, cp, dp, alone, world_size=tp * cp * dp)


def choices(rank: int, world_size: int, tp: int, cp: int, settings: dict[str, Any], tied: bool) -> None:
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    router, single = build(None, settings, tp), build(ProcessGroupCollection(), settings)
    for number in range(3):
        x = micro_batch(0, number)
        if tied:
            x = x.round() * 0.0
            with torch.no_grad():
                for one in (router, single):
                    if one.bias is not None:
                        one.bias.zero_()
        weights, indices = router(own_part(x, tp, cp))
        all_weights, all_indices = single(x)
        assert torch.equal(indices, own_part(all_indices, tp, cp))
        assert_close(weights, own_part(all_weights, tp, cp))
        if tied:
            assert (all_indices == torch.arange(K)).all()


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ("settings", "tied"),
    [({}, False), ({}, True), (dict(moe_router_load_balancing_type="sinkhorn"), False)],
    ids=["top-k", "ties", "sinkhorn"],
)
def test_choices_equal_one_process(pool: WorkerPool, tp: int, cp: int, settings: dict[str, Any], tied: bool) -> None:
    """T41. Mutations: the highest index among equals (`ties_to_the_last`), torch.topk's (`ties_left_to_topk`), or a

    rank's own experts (`ties_to_own_experts`); Sinkhorn over this rank's tokens alone.
    """
    run(pool, tp * cp, choices, tp, cp, settings, tied)


def check_precision(rank: int, world_size: int) -> None:
    parallel_state.initialize_model_parallel(2)
    router = build(None, dict(params_dtype=torch.bfloat16), 2)
    assert router.weight is not None
    assert router.bias is not None
    for number in range(8):
        x = micro_batch(0, number).bfloat16()
        logits = x.double() @ router.weight.bfloat16().double().t() + router.bias.bfloat16().double()
        expected = logits.sort(dim=-1, descending=True, stable=True).indices[..., :K]
        weights, indices = router(own_part(x, 2, 1))
        assert torch.equal(indices, own_part(expected, 2, 1))
        wide = own_part(logits.gather(-1, expected).softmax(-1), 2, 1)
        torch.testing.assert_close(weights.double(), wide, rtol=1e-6, atol=1e-6)


def test_a_router_of_bfloat16_tokens_computes_wide(pool: WorkerPool) -> None:
    """T42: logits, scores and choices are those of float64, up to float32's rounding.

    Mutations: `logits_in_the_dtype_of_tokens`, `softmax_in_bfloat16`, `choices_in_bfloat16`.
    """
    run(pool, 2, check_precision)


def check_recomputation(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    parallel_state.initialize_model_parallel(2, context_parallel_size=2)
    model_parallel_cuda_manual_seed(3)
    everyone = parallel_state.get_group("tp_dp_cp")
    plain = build(None, settings, 2)
    again = build(None, settings | dict(recompute_granularity="selective", recompute_modules=["moe"]), 2)
    batches = [own_part(micro_batch(0, number), 2, 2) for number in range(MICRO_BATCHES)]
    forward_backward(plain, batches, 1)
    forward_backward(again, batches, 1, recompute=True)
    # Before they are used: were everything counted twice, neither a mean nor the bias's direction would show it.
    for (name, one_buffer), (_, other_buffer) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert name == "global_step" or torch.equal(one_buffer, other_buffer), name
    for router in (plain, again):
        statistics.update_expert_bias(router, everyone)
    assert statistics.collect(again, everyone) == statistics.collect(plain, everyone)
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert_close(other.grad, one.grad)
    for (name, one_buffer), (_, other_buffer) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert name == "global_step" or torch.equal(one_buffer, other_buffer), name


@pytest.mark.parametrize("settings", [LOSSES["all but global"], GLOBAL], ids=["bias", "global"])
def test_recomputation_counts_nothing_twice(pool: WorkerPool, settings: dict[str, Any]) -> None:
    """T37, T45. Mutations: `recomputation_recorded`; add to the global counts again (`recomputation_counted`)."""
    run(pool, 4, check_recomputation, settings)


def check_random_streams(rank: int, world_size: int) -> Tensor:
    parallel_state.initialize_model_parallel(2)
    model_parallel_cuda_manual_seed(3)
    router = build(None, dict(moe_router_force_load_balancing=True), 2)
    return router(torch.ones(16, 1, H, dtype=torch.float64))[1]


def test_noise_differs_over_tensor_parallel_ranks(pool: WorkerPool) -> None:
    """T12: they route different tokens. Mutation: draw from the default stream."""
    first, second = pool.run(check_random_streams, world_size=2)
    assert not torch.equal(first, second)


def check_compute_aux_loss(rank: int, world_size: int) -> None:
    parallel_state.initialize_model_parallel(2)
    router, single = build(None, {}, 2), build(ProcessGroupCollection(), {})
    x = micro_batch(0, 0)
    loss = router.compute_aux_loss(*router(own_part(x, 2, 1)))
    expected = single.compute_aux_loss(*single(x))
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert router.weight is not None
    assert single.weight is not None
    assert router.weight.grad is not None
    torch.distributed.all_reduce(router.weight.grad, group=parallel_state.get_tensor_model_parallel_group())
    assert_close(router.weight.grad, single.weight.grad)


def test_compute_aux_loss_is_of_all_ranks(pool: WorkerPool) -> None:
    """T47. Mutations: the value of this rank alone; a gradient of all ranks on each."""
    pool.run(check_compute_aux_loss, world_size=2)


# Mutations


def _choosing(choose: Any) -> Any:
    """`choose(scores [t, E], k)` instead of best_experts, without groups."""
    return mock.patch.object(routing, "best_experts", lambda scores, topk, *groups: choose(scores, topk))


def ties_to_the_last():
    original = routing.best_experts
    return _choosing(lambda scores, topk: E - 1 - original(scores.flip(-1), topk))


def ties_left_to_topk():
    return _choosing(lambda scores, topk: torch.topk(scores, topk).indices)


def ties_to_own_experts():
    """Each rank prefers, of equal experts, those that it holds."""
    original = routing.best_experts

    def broken(scores: Tensor, topk: int) -> Tensor:
        first = E // torch.distributed.get_world_size() * torch.distributed.get_rank()
        return (original(scores.roll(-first, -1), topk) + first) % E

    return _choosing(broken)


def logits_in_the_dtype_of_tokens():
    return mock.patch.object(TopKRouter, "_compute_dtype", lambda self, hidden: hidden.dtype)


def softmax_in_bfloat16():
    original = routing.route
    return mock.patch.object(routing, "route", lambda logits, *rest, **more: original(logits.bfloat16(), *rest, **more))


def choices_in_bfloat16():
    original = routing.best_experts
    return _choosing(lambda scores, topk: original(scores.bfloat16(), topk))


def recomputation_recorded():
    return mock.patch.object(statistics, "records", lambda router: router.training and torch.is_grad_enabled())


def recomputation_counted():
    return mock.patch.object(statistics, "is_recomputation", return_value=False)


BROKEN = {
    function.__name__: function
    for function in (
        ties_to_the_last,
        ties_left_to_topk,
        ties_to_own_experts,
        logits_in_the_dtype_of_tokens,
        softmax_in_bfloat16,
        choices_in_bfloat16,
        recomputation_recorded,
        recomputation_counted,
    )
}

CASES = [
    ("ties_to_the_last", choices, (2, 1, {}, True), "T41"),
    ("ties_left_to_topk", choices, (2, 1, {}, True), "T41"),
    ("ties_to_own_experts", choices, (2, 1, {}, True), "T41"),
    ("logits_in_the_dtype_of_tokens", check_precision, (), "T42"),
    ("softmax_in_bfloat16", check_precision, (), "T42"),
    ("choices_in_bfloat16", check_precision, (), "T42"),
    ("recomputation_recorded", check_recomputation, (LOSSES["all but global"],), "T37, T45"),
    ("recomputation_recorded", check_recomputation, (GLOBAL,), "T37, T45"),
    ("recomputation_counted", check_recomputation, (GLOBAL,), "T37, T43"),
]
"""Mutation, the check that fails with it and its arguments, and the traps it stands for."""


@pytest.mark.parametrize(("broken", "check", "arguments"), [row[:3] for row in CASES])
def test_broken_code_is_caught(pool: WorkerPool, broken: str, check: Any, arguments: tuple[Any, ...]) -> None:
    """An assertion fails on the ranks: the mutation does not crash."""
    with pytest.raises(WorkerError, match="AssertionError"):
        run(pool, 4 if check is check_recomputation else 2, check, *arguments, broken=broken)
