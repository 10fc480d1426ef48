"""The order of work: everything once, nothing before what it waits for, for every number of micro-batches."""

import pytest
from torch.distributed.pipelining.schedules import RECV_F, SEND_F, _Action, _ComputationType

from megatron_lite.pipeline_layout import V_SHAPED, PipelineLayout, even_layout
from megatron_lite.pipeline_parallel.orders import Order, forward_actions, most_held, pipeline_order
from megatron_lite.pipeline_parallel_config import SCHEDULES, SPLIT_BACKWARD

CASES = [(schedule, 2) for schedule in SCHEDULES if schedule != "1f1b"]
CASES += [("1f1b", 1), ("gpipe", 1), ("interleaved-zero-bubble", 1), ("interleaved", 3)]


def layout_of(schedule: str, ranks: int, chunks: int) -> PipelineLayout:
    return even_layout(ranks * chunks, ranks, chunks, v_shaped=schedule in V_SHAPED)


def one_by_one(order: Order) -> dict[int, list[str]]:
    return {
        rank: [str(one) for action in actions for one in action.sub_actions or (action,)]
        for rank, actions in order.items()
    }


def follow(waiting: dict[int, list[str]], last: int) -> set[str]:
    """Let ranks work as far as they get; returns what was done."""
    done: set[str] = set()
    waiting = {rank: list(actions) for rank, actions in waiting.items()}
    moved = True
    while moved:
        moved = False
        for actions in waiting.values():
            while actions and needs(actions[0], last) <= done:
                done |= {actions[0], actions[0].replace("B", "I")}
                actions.pop(0)
                moved = True
    assert not any(waiting.values()), f"ranks wait for ever: {waiting}"
    return done


def needs(action: str, last: int) -> set[str]:
    parsed = _Action.from_str(action)
    stage, kind, number = parsed.stage_index, parsed.computation_type.value, parsed.microbatch_index
    if kind == "F":
        return {f"{stage - 1}F{number}"} if stage > 0 else set()
    if kind == "W":
        return {f"{stage}I{number}"}
    return {f"{stage}F{number}"} | ({f"{stage + 1}I{number}"} if stage < last else set())


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("schedule", "chunks"), CASES)
def test_orders_are_complete_and_never_stuck(schedule, chunks, ranks):
    """T32: fewer micro-batches than stages, as many, and numbers that torch itself refuses.

    Mutations: drop the micro-batches below the number asked for instead of those above; let 1f1b's first rank begin
    one micro-batch ahead too many (then it holds one more).
    """
    layout = layout_of(schedule, ranks, chunks)
    for num_microbatches in (*range(1, 10), 16, 17):
        order = pipeline_order(schedule, layout, num_microbatches)
        actions = one_by_one(order)
        done = follow(actions, len(layout.stages) - 1)
        flat = [action for rank in actions for action in actions[rank]]
        assert len(flat) == len(set(flat))
        for stage in range(len(layout.stages)):
            own = actions[layout.rank_of(stage)]
            forward = [one for one in own if one.startswith(f"{stage}F")]
            assert forward == [f"{stage}F{number}" for number in range(num_microbatches)]
            for number in range(num_microbatches):
                whole, halves = f"{stage}B{number}" in own, {f"{stage}I{number}", f"{stage}W{number}"} <= set(own)
                assert whole != halves, "a backward pass is whole or split, and there is one"
                assert f"{stage}I{number}" in done
        if schedule not in SPLIT_BACKWARD:
            assert not any("W" in one for one in flat)


@pytest.mark.parametrize("num_microbatches", [1, 3, 8, 20])
def test_one_forward_one_backward_holds_few(num_microbatches):
    """That is its point over gpipe: stage r of p holds p - r micro-batches at most."""
    for schedule, expected in (
        ("1f1b", [min(4 - rank, num_microbatches) for rank in range(4)]),
        ("gpipe", [num_microbatches] * 4),
    ):
        order = pipeline_order(schedule, layout_of(schedule, 4, 1), num_microbatches)
        assert [most_held(order[rank], [1] * 4) for rank in range(4)] == expected


def test_what_is_held_is_weighed_by_stage():
    order = pipeline_order("gpipe", layout_of("gpipe", 2, 2), 3)
    assert most_held(order[0], [10, 100, 1, 1000]) == 3 * 11


def test_an_evaluation_goes_forward_only():
    layout = layout_of("dualpipev", 2, 2)
    actions = pipeline_order("dualpipev", layout, 5)[0]
    communicating = [*actions, _Action(0, SEND_F, 0), _Action(0, RECV_F, 0), _Action(0, _ComputationType.SEND_B, 0)]
    kept = forward_actions(communicating)
    assert [str(one) for one in kept if one.computation_type.value == "F" and one.stage_index == 0] == [
        f"0F{number}" for number in range(5)
    ]
    assert {one.computation_type.value for one in kept} == {"F", "SEND_F", "RECV_F"}
