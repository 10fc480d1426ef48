"""In which order each pipeline rank works: the schedules, as lists of actions.

An action is torch's: stage, kind (F forward, B backward, or I and W for its two halves, the gradients of activations
and of weights) and micro-batch. The interleaved and zero-bubble orders are torch's own, made for a number of
micro-batches that they accept and then freed of those there are not: what is left still waits for nothing later.
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import (
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD, RECV_F, SEND_F, _Action

from megatron_lite.pipeline_layout import PipelineLayout

Order = dict[int, list[_Action]]
"""The actions of each pipeline rank. One that torch calls OVERLAP_F_B holds two that may be done together."""

_TORCH = {
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


@functools.lru_cache(maxsize=4)
def pipeline_order(schedule: str, layout: PipelineLayout, num_microbatches: int) -> Order:
    """What each rank does, first to last, in one step. Large orders take seconds, so the last ones are kept.

    Args:
        schedule: one of SCHEDULES.
        layout: how many stages there are, and where.
        num_microbatches: any number from 1 on.
    """
    if schedule == "gpipe":
        return {rank: _fill_and_drain(layout.stages_of(rank), num_microbatches) for rank in range(layout.ranks)}
    if schedule == "1f1b":
        return {rank: _one_forward_one_backward(rank, layout.ranks, num_microbatches) for rank in range(layout.ranks)}
    made = _TORCH[schedule](_stand_ins(layout), _accepted(schedule, layout, num_microbatches))  # type: ignore[arg-type]
    return {rank: _without_missing(actions, num_microbatches) for rank, actions in made.pipeline_order.items()}


def forward_actions(actions: list[_Action]) -> list[_Action]:
    """What is left of a rank's work in an evaluation, sends and receives included: nothing goes back."""
    return [action for action in _one_by_one(actions) if action.computation_type in (FORWARD, SEND_F, RECV_F)]


def _one_by_one(actions: list[_Action]) -> list[_Action]:
    return [single for action in actions for single in action.sub_actions or (action,)]


def most_held(actions: list[_Action], of_stages: Sequence[int]) -> int:
    """The most that a rank holds for backward passes to come at any time of a step.

    Args:
        actions: of the rank.
        of_stages: what each stage holds for one micro-batch, from its forward to the end of its backward.
    """
    held = most = 0
    for action in _one_by_one(actions):
        if action.computation_type == FORWARD:
            held += of_stages[action.stage_index]
        elif action.computation_type in (FULL_BACKWARD, BACKWARD_WEIGHT):
            held -= of_stages[action.stage_index]
        most = max(most, held)
    return most


def _fill_and_drain(stages: list[int], num_microbatches: int) -> list[_Action]:
    """GPipe (Huang et al. 2019): all micro-batches forward, then all backward, one stage after the other."""
    numbers = range(num_microbatches)
    forward = [_Action(stage, FORWARD, n) for stage in stages for n in numbers]
    return forward + [_Action(stage, FULL_BACKWARD, n) for stage in reversed(stages) for n in numbers]


def _one_forward_one_backward(rank: int, ranks: int, num_microbatches: int) -> list[_Action]:
    """PipeDream-Flush (Narayanan et al. 2021): at most ranks - rank micro-batches under way at a time."""
    ahead = min(ranks - 1 - rank, num_microbatches)
    forward = [_Action(rank, FORWARD, n) for n in range(num_microbatches)]
    backward = [_Action(rank, FULL_BACKWARD, n) for n in range(num_microbatches)]
    steady = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
    return forward[:ahead] + steady + backward[num_microbatches - ahead :]


def _accepted(schedule: str, layout: PipelineLayout, num_microbatches: int) -> int:
    """The next number of micro-batches for which torch makes the schedule."""
    if schedule == "dualpipev":
        return max(num_microbatches, len(layout.stages))
    if schedule == "zbv":
        return num_microbatches
    accepted = num_microbatches
    while accepted % max(1, accepted // layout.ranks):
        accepted += 1
    return accepted


def _stand_ins(layout: PipelineLayout) -> list[Any]:
    """What torch's schedules ask of the stages of a rank in order to make an order, without processes or modules."""
    module = SimpleNamespace()
    return [
        SimpleNamespace(group_size=layout.ranks, group_rank=0, num_stages=len(layout.stages), submod=module)
        for _ in range(layout.stages_per_rank)
    ]


def _without_missing(actions: list[_Action | None], num_microbatches: int) -> list[_Action]:
    """The actions on micro-batches that exist; None, where torch draws a rank waiting, is left out."""
    kept = []
    for action in actions:
        if action is None:
            continue
        pair = (action,) if action.sub_actions is None else action.sub_actions
        existing = [a for a in pair if a.microbatch_index is not None and a.microbatch_index < num_microbatches]
        kept += [action] if len(existing) == len(pair) else existing
    return kept
