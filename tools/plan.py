#!/usr/bin/env python3
"""Plan the pipeline of a run before it has a cluster: stages, bubble, activations, and the schedules to choose from.

tools/plan.py --config configs/gpt3_175b.yaml --world-size 1024 --pipeline-model-parallel-size 8
tools/plan.py --config configs/gpt3_175b.yaml --world-size 1024 --pipeline-model-parallel-size 8 \\
    --num-virtual-stages-per-pipeline-rank 2 --draw-pipeline pipeline.svg

All flags of pretrain_gpt.py work here too and mean the same; nothing is trained, as under --dry-run.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.dry_run_memory import micro_batches
from megatron_lite.errors import ConfigError, exit_with
from megatron_lite.pipeline_layout import V_SHAPED, PipelineLayout
from megatron_lite.pipeline_parallel.drawing import pipeline_svg
from megatron_lite.pipeline_parallel.timeline import Durations, Timeline, pipeline_timeline
from megatron_lite.pipeline_parallel_config import SCHEDULES


def build_parser() -> argparse.ArgumentParser:
    """The tool's own flag; the rest belongs to pretrain_gpt.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--draw-pipeline", type=Path, metavar="FILE.svg", help="draw when each rank works on what")
    return parser


def plan(run: RunConfig, picture: Path | None = None) -> str:
    """The report on the pipeline of a run; draws it into `picture` too.

    Raises:
        ConfigError: the run has no pipeline, or the picture is no SVG.
    """
    sizes = run.transformer
    if sizes.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "pipeline_model_parallel_size is 1, so there is no pipeline to plan: write --pipeline-model-parallel-size "
            "2 or more."
        )
    if picture is not None and picture.suffix.lower() != ".svg":
        raise ConfigError(f"--draw-pipeline is {picture}, but the picture is an SVG: end its name in .svg.")
    layout, count = sizes.pipeline_layout, micro_batches(run)
    durations = durations_of(run)
    timelines = {
        schedule: pipeline_timeline(schedule, as_laid_out(schedule, layout), count, durations)
        for schedule in schedules_for(layout)
    }
    chosen = timelines[sizes.schedule]
    if picture is not None:
        title = f"{sizes.schedule}, {_ranks_and_chunks(layout)}, {count:,} micro-batches"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(pipeline_svg([(title, chosen)]), encoding="utf-8")
    sections = {
        f"Stages of {_ranks_and_chunks(layout)}": layout.describe(),
        "Schedule": list(_schedule_lines(sizes.schedule, chosen, count, durations)),
        "Schedules that fit these stages": list(_comparison(sizes.schedule, timelines)),
    }
    blocks = ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()]
    return "\n".join([*run.notices, *blocks, *([f"picture: {picture}"] if picture is not None else [])])


def durations_of(run: RunConfig) -> Durations:
    """What actions are assumed to take, in forward passes.

    The gradients of activations and of weights one each, a full recomputation one more; where both gradients are
    computed together (compiled layers, or for the reasons of `gradients_together`), nothing is left for the second.
    """
    sizes = run.transformer
    together = bool(run.training.compile) or sizes.gradients_together is not None
    again = float(sizes.recompute_granularity == "full")
    return Durations(
        backward_input=1.0 + together + again,
        backward_weight=0.0 if together else 1.0,
        embedding=float(sizes.account_for_embedding_in_pipeline_split),
        loss=float(sizes.account_for_loss_in_pipeline_split),
    )


def schedules_for(layout: PipelineLayout) -> list[str]:
    """The schedules for as many model chunks a rank: V-shaped ones need two, 1f1b one, interleaved more than one."""
    chunks = layout.stages_per_rank
    return [
        schedule
        for schedule in SCHEDULES
        if not (schedule in V_SHAPED and chunks != 2)
        and not (schedule == "1f1b" and chunks > 1)
        and not (schedule == "interleaved" and chunks == 1)
    ]


def as_laid_out(schedule: str, layout: PipelineLayout) -> PipelineLayout:
    """The same stages on the ranks where the schedule wants them."""
    return PipelineLayout(layout.stages, layout.ranks, v_shaped=schedule in V_SHAPED)


def _ranks_and_chunks(layout: PipelineLayout) -> str:
    chunks = layout.stages_per_rank
    return f"{layout.ranks} ranks" + (f" x {chunks} chunks" if chunks > 1 else "")


def _schedule_lines(schedule: str, timeline: Timeline, count: int, durations: Durations) -> Iterator[str]:
    """The chosen schedule in numbers."""
    yield f"{schedule}, {count:,} micro-batch{'es' if count > 1 else ''} a step"
    yield f"bubble: {100 * timeline.bubble_fraction:.1f}% of the ranks' time is waiting"
    yield f"most activations held by ranks 0 to {timeline.ranks - 1}: {', '.join(map(str, timeline.peak_activations))}"
    yield "An activation is what one stage keeps of one micro-batch."
    backward = durations.backward_input + durations.backward_weight
    halves = "half of it for the gradients of weights" if durations.backward_weight else "which is not split in two"
    yield f"Assumed: a backward pass takes {backward:g} forward passes, {halves}; a stage's time goes by its"
    yield f"layers, embedding {durations.embedding:g}, loss {durations.loss:g}; communication takes no time."


def _comparison(chosen: str, timelines: dict[str, Timeline]) -> Iterator[str]:
    """A line for each schedule, with the most activations that any rank holds."""
    yield f"{'':<24} {'bubble':>7} {'activations':>12}"
    for schedule, timeline in timelines.items():
        bubble, peak = f"{100 * timeline.bubble_fraction:.1f}%", max(timeline.peak_activations)
        yield f"{schedule:<24} {bubble:>7} {peak:>12,}" + ("  <- this run" if schedule == chosen else "")


def main(argv: list[str] | None = None) -> None:
    """Print the plan; user mistakes end in a message and exit status 1."""
    own, flags = build_parser().parse_known_args(argv)
    try:
        run = parse_args(flags if "--dry-run" in flags else [*flags, "--dry-run"])
        print(plan(run, own.draw_pipeline))
    except (ConfigError, OSError) as error:
        exit_with("plan.py", error)


if __name__ == "__main__":
    main()
