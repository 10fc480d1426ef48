"""The timeline of a step: the bubbles the papers give, dependencies kept, activations counted."""

from itertools import pairwise

import pytest
from torch.distributed.pipelining.schedules import _Action

from megatron_lite.errors import ConfigError
from megatron_lite.pipeline_layout import V_SHAPED, PipelineLayout, Stage, even_layout
from megatron_lite.pipeline_parallel.timeline import (
    Durations,
    Timeline,
    pipeline_timeline,
    stage_times,
    timeline_of,
)
from megatron_lite.pipeline_parallel_config import SCHEDULES


def equal_stages(schedule: str, ranks: int, chunks: int = 2) -> PipelineLayout:
    """A layer a stage; one stage a rank for 1f1b."""
    chunks = 1 if schedule == "1f1b" else chunks
    return even_layout(ranks * chunks, ranks, chunks, v_shaped=schedule in V_SHAPED)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (4, 8), (4, 3), (8, 32)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_bubble_of_one_chunk(schedule: str, ranks: int, microbatches: int) -> None:
    """(p - 1) / (m + p - 1), whatever backward passes take. Mutation: a rank's actions wait for their input only."""
    layout = even_layout(ranks, ranks)
    for durations in (Durations(), Durations(forward=3, backward_input=1, backward_weight=0.5)):
        timeline = pipeline_timeline(schedule, layout, microbatches, durations)
        assert timeline.bubble_fraction == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert pipeline_timeline(schedule, layout, microbatches).makespan == pytest.approx(3 * (microbatches + ranks - 1))


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 4), (4, 8), (8, 32)])
def test_bubble_of_interleaving(ranks: int, microbatches: int, chunks: int) -> None:
    """(p - 1) / (v m + p - 1), Narayanan et al. 2021; the working time is that of one chunk a rank."""
    timeline = pipeline_timeline("interleaved", even_layout(ranks * chunks, ranks, chunks), microbatches)
    assert timeline.bubble_fraction == pytest.approx((ranks - 1) / (chunks * microbatches + ranks - 1))
    assert sum(span.end - span.start for span in timeline.spans) == pytest.approx(3 * microbatches * ranks)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zero_bubble_v_waits_at_the_beginning_only(ranks: int) -> None:
    """Qi et al. 2023: with equal F, I and W a rank once begun never waits, so a step has the staggered start.

    It takes (p - 1) forward passes of a stage, half those of a rank.
    """
    microbatches = 4 * ranks
    timeline = pipeline_timeline("zbv", equal_stages("zbv", ranks), microbatches)
    assert timeline.makespan == pytest.approx(3 * microbatches + (ranks - 1) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 8, 13])
def test_every_action_waits_for_what_it_needs(schedule: str, microbatches: int) -> None:
    """Every stage does everything once, a rank one thing at a time, each after its inputs have come.

    Mutations: no communication time; a backward pass that does not wait for the stage after.
    """
    ranks, late = 4, 0.25
    layout = equal_stages(schedule, ranks)
    timeline = pipeline_timeline(schedule, layout, microbatches, Durations(communication=late))
    span_of = {(span.stage, span.kind, span.microbatch): span for span in timeline.spans}
    assert len(span_of) == len(timeline.spans)
    last = len(layout.stages) - 1

    def wait(stage: int, other: int) -> float:
        return late if layout.rank_of(stage) != layout.rank_of(other) else 0.0

    for stage in range(last + 1):
        for n in range(microbatches):
            forward = span_of[stage, "F", n]
            assert forward.rank == layout.rank_of(stage)
            backward = span_of.get((stage, "B", n)) or span_of[stage, "I", n]
            assert ((stage, "B", n) in span_of) != ((stage, "W", n) in span_of)
            assert backward.start >= forward.end
            if backward.kind == "I":
                assert span_of[stage, "W", n].start >= backward.end
            if stage > 0:
                assert forward.start >= span_of[stage - 1, "F", n].end + wait(stage, stage - 1)
            if stage < last:
                after = span_of.get((stage + 1, "B", n)) or span_of[stage + 1, "I", n]
                assert backward.start >= after.end + wait(stage, stage + 1)
    for rank in range(ranks):
        own = [span for span in timeline.spans if span.rank == rank]
        assert all(before.end <= after.start for before, after in pairwise(own))


def test_one_micro_batch_goes_there_and_back() -> None:
    """Nothing waits longer than it must, and nothing is sent at the turn of a V.

    Mutations: communication counted at both ends; between stages instead of ranks.
    """
    slow = Durations(communication=0.5)
    assert pipeline_timeline("1f1b", even_layout(4, 4), 1, slow).makespan == pytest.approx(4 * 3 + 2 * 3 * 0.5)
    turned = even_layout(8, 4, 2, v_shaped=True)
    assert pipeline_timeline("gpipe", turned, 1, slow).makespan == pytest.approx(4 * 3 + 2 * 6 * 0.5)


def test_activations() -> None:
    """1f1b holds p - rank micro-batches, gpipe all; both halves of the V as much as the first rank of 1f1b.

    Mutation: an activation let go with I instead of W, which gives the last rank of interleaved-zero-bubble 1.
    """
    assert pipeline_timeline("gpipe", even_layout(4, 4), 8).peak_activations == [8] * 4
    assert pipeline_timeline("1f1b", even_layout(4, 4), 8).peak_activations == [4, 3, 2, 1]
    assert pipeline_timeline("1f1b", even_layout(4, 4), 2).peak_activations == [2, 2, 2, 1]
    assert pipeline_timeline("zbv", equal_stages("zbv", 4), 8).peak_activations == [8] * 4
    assert pipeline_timeline("interleaved-zero-bubble", even_layout(4, 4), 8).peak_activations == [4] * 4
    # 2 (p - rank - 1) + (v - 1) p + 1, Narayanan et al. 2021
    assert pipeline_timeline("interleaved", equal_stages("interleaved", 4), 8).peak_activations == [11, 9, 7, 5]


def test_stages_take_time_by_their_layers() -> None:
    """One unit is an average rank's forward pass. Mutation: of an average stage."""
    stages = (Stage((0,), embedding=True), Stage((1, 2)), Stage((3, 4, 5)), Stage((6, 7), loss=True))
    layout = PipelineLayout(stages, ranks=2)
    times = stage_times(layout, Durations(backward_weight=0.5))
    assert [times[stage, "F"] for stage in range(4)] == [0.25, 0.5, 0.75, 0.5]
    assert [times[2, kind] for kind in "FBIW"] == [0.75, 1.125, 0.75, 0.375]
    counted = stage_times(layout, Durations(embedding=2, loss=6))
    assert [counted[stage, "F"] for stage in range(4)] == [3 / 8, 2 / 8, 3 / 8, 1]
    further = PipelineLayout((Stage((0,), embedding=True), Stage((1,), loss=True, mtp_layers=2)), ranks=2)
    assert stage_times(further, Durations(loss=1))[1, "F"] == 2 * (1 + 2 + 3) / 7


def test_the_slowest_stage_sets_the_pace() -> None:
    """1f1b with many micro-batches: the others wait for the rank with most layers."""
    stages = (Stage((0,), embedding=True), Stage((1, 2, 3), loss=True))
    timeline = pipeline_timeline("1f1b", PipelineLayout(stages, ranks=2), 1000)
    assert timeline.bubble_fraction == pytest.approx(1 - 4 / 6, abs=1e-3)


@pytest.mark.parametrize(
    ("orders", "waiting"),
    [
        (["0B0 0F0", "1F0 1B0"], r"0: \(0, 'B', 0\), 1: \(1, 'F', 0\)"),
        (["0F0 0B0", "1B0 1F0"], r"0: \(0, 'B', 0\), 1: \(1, 'B', 0\)"),
        (["0F0 0W0 0I0", "1F0 1B0"], r"0: \(0, 'W', 0\)}"),
    ],
)
def test_ranks_that_wait_for_ever_are_told(orders: list[str], waiting: str) -> None:
    """Mutations: a backward pass that does not wait for its own forward pass; W that does not wait for I."""
    layout = even_layout(2, 2)
    order = {rank: [_Action.from_str(word) for word in text.split()] for rank, text in enumerate(orders)}
    with pytest.raises(ValueError, match=f"wait for each other: .*{waiting}"):
        timeline_of(order, layout, stage_times(layout, Durations()))


def test_nothing_to_do() -> None:
    assert Timeline(2, ()).bubble_fraction == 0
    assert Timeline(2, ()).peak_activations == [0, 0]
    with pytest.raises(ConfigError, match="no layers"):
        pipeline_timeline("1f1b", PipelineLayout((Stage((), embedding=True), Stage((), loss=True)), ranks=2), 2)
