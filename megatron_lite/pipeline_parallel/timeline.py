"""When each action of a schedule runs: the bubble, and how many activations each rank holds, worked out beforehand.

A rank does the actions of its order one after the other. Each starts when the rank is free and what it needs is there:
a forward pass what the stage before computed, a backward pass its own forward pass and the gradient from the stage
after, the gradients of weights those of activations. What a cluster adds (launches, the reduction of gradients, the
optimizer) is not counted.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    OVERLAP_F_B,
    _Action,
)

from megatron_lite.errors import ConfigError
from megatron_lite.pipeline_layout import PipelineLayout
from megatron_lite.pipeline_parallel.orders import Order, pipeline_order

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, gradients of activations",
    "W": "backward, gradients of weights",
}
"""What an action does; B is I and W in one."""

_LETTERS = {FORWARD: "F", FULL_BACKWARD: "B", BACKWARD_INPUT: "I", BACKWARD_WEIGHT: "W"}

StageTimes = Mapping[tuple[int, str], float]
"""(stage, kind) -> time of one such action, in any unit."""

_Work = tuple[int, str, int]  # stage, kind, micro-batch


@dataclass(frozen=True)
class Durations:
    """How long actions take, in any unit of time.

    Attributes:
        forward: one micro-batch through an average rank's layers; a stage takes its share of that by its layers.
        backward_input: likewise the gradients of its activations.
        backward_weight: likewise the gradients of its weights; a full backward pass is the sum of both.
        embedding: what the embedding costs, in layers.
        loss: what final norm, output layer and loss cost, in layers.
        communication: from the end of an action until its result is on another rank.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    embedding: float = 0.0
    loss: float = 0.0
    communication: float = 0.0


@dataclass(frozen=True)
class Span:
    """One action on the clock.

    Attributes:
        rank: the pipeline rank that does it.
        stage: the stage it belongs to.
        kind: a key of KINDS.
        microbatch: the micro-batch, counted from 0.
        start, end: in the unit of the durations, counted from the beginning of the step.
    """

    rank: int
    stage: int
    kind: str
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step of a pipeline.

    Attributes:
        ranks: pipeline ranks.
        spans: what they do; those of one rank are in the order in which it does them.
    """

    ranks: int
    spans: tuple[Span, ...]

    @property
    def makespan(self) -> float:
        """Time from the beginning of the step to the end of its last action."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """Share of the ranks' time, ranks x makespan, in which they wait.

        Narayanan et al. 2021 (section 2.2) relate the waiting to the working time instead: x / (1 + x) of theirs.
        """
        busy = sum(span.end - span.start for span in self.spans)
        return 1 - busy / (self.ranks * self.makespan) if self.makespan else 0.0

    @property
    def peak_activations(self) -> list[int]:
        """The most activations that each rank holds at a time, [ranks].

        One is what one stage keeps of one micro-batch, from the beginning of its forward pass to the end of its
        backward pass, in two halves to the end of the second (which needs less of it: an upper bound).
        """
        held, peak = Counter[int](), [0] * self.ranks
        for span in self.spans:
            if span.kind == "F":
                held[span.rank] += 1
                peak[span.rank] = max(peak[span.rank], held[span.rank])
            elif span.kind in ("B", "W"):
                held[span.rank] -= 1
        return peak


def pipeline_timeline(
    schedule: str, layout: PipelineLayout, num_microbatches: int, durations: Durations | None = None
) -> Timeline:
    """A step under one of SCHEDULES, with the default durations or others.

    Raises:
        ConfigError: the layout has no layers to measure stages by.
    """
    durations = durations or Durations()
    order = pipeline_order(schedule, layout, num_microbatches)
    return timeline_of(order, layout, stage_times(layout, durations), durations.communication)


def stage_times(layout: PipelineLayout, durations: Durations) -> StageTimes:
    """The time of every action, each stage's in proportion to its layers.

    Raises:
        ConfigError: the layout has no layers to measure stages by.
    """
    work = [
        len(stage.layers)
        + stage.mtp_layers
        + durations.embedding * stage.embedding
        + durations.loss * stage.loss * (1 + stage.mtp_layers)
        for stage in layout.stages
    ]
    if not sum(work):
        raise ConfigError("the pipeline stages hold no layers, so it is not known how long they take: add some.")
    of_kind = {
        "F": durations.forward,
        "B": durations.backward_input + durations.backward_weight,
        "I": durations.backward_input,
        "W": durations.backward_weight,
    }
    of_rank = sum(work) / layout.ranks
    return {(stage, kind): time * w / of_rank for stage, w in enumerate(work) for kind, time in of_kind.items()}


def timeline_of(order: Order, layout: PipelineLayout, times: StageTimes, communication: float = 0.0) -> Timeline:
    """When the actions of an order run.

    Args:
        order: the actions of each rank.
        layout: where the stages are.
        times: how long each action takes.
        communication: see Durations; nothing where both stages are on one rank.

    Raises:
        ValueError: ranks wait for each other for ever.
    """
    rank_of = [layout.rank_of(stage) for stage in range(len(layout.stages))]
    to_do = {rank: deque(_one_by_one(actions)) for rank, actions in order.items()}
    free = dict.fromkeys(order, 0.0)
    ends: dict[_Work, float] = {}
    spans: list[Span] = []
    while any(to_do.values()):
        done_before = len(spans)
        for rank, actions in to_do.items():
            while actions and all(needed in ends for needed in _needed_by(actions[0], len(rank_of))):
                work = stage, kind, microbatch = actions.popleft()
                arrivals = [
                    ends[needed] + (communication if rank_of[needed[0]] != rank else 0.0)
                    for needed in _needed_by(work, len(rank_of))
                ]
                start = max([free[rank], *arrivals])
                free[rank] = start + times[stage, kind]
                # Either kind of backward pass gives the gradient that the stage before waits for.
                ends[stage, "I" if kind == "B" else kind, microbatch] = free[rank]
                spans.append(Span(rank, stage, kind, microbatch, start, free[rank]))
        if len(spans) == done_before:
            waiting = {rank: actions[0] for rank, actions in to_do.items() if actions}
            raise ValueError(f"pipeline ranks wait for each other: {waiting} (rank: stage, kind, micro-batch)")
    return Timeline(layout.ranks, tuple(spans))


def _one_by_one(actions: Iterable[_Action]) -> Iterator[_Work]:
    """The actions with those that may overlap one after the other."""
    for action in actions:
        if action.computation_type == OVERLAP_F_B:
            assert action.sub_actions is not None, "torch's action of two"
            yield from _one_by_one(action.sub_actions)
        else:
            assert action.microbatch_index is not None, "an order holds computations only"
            yield action.stage_index, _LETTERS[action.computation_type], action.microbatch_index


def _needed_by(work: _Work, stages: int) -> list[_Work]:
    """What must be done before; I stands for B too."""
    stage, kind, microbatch = work
    if kind == "W":
        return [(stage, "I", microbatch)]
    if kind == "F":
        return [(stage - 1, "F", microbatch)] if stage > 0 else []
    own = (stage, "F", microbatch)
    return [own, (stage + 1, "I", microbatch)] if stage + 1 < stages else [own]
