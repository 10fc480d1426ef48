"""The bubble of pipeline schedules, measured on two ranks beside what the timeline computes.

OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE torchrun --standalone --nproc-per-node 2 -m benchmarks.pipeline

Each row trains a small GPT. A rank is busy while it is inside the forward or backward pass of a stage; the rest of the
time, from the moment the first rank begins with a step's micro-batches to the moment the last one is done with them,
counts as bubble: waiting, sending, receiving and what torch and the framework do between actions. The quickest step
counts, the one that other programs disturbed least. Further flags are pretrain_gpt.py's and change the model.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.contenders import model_chunks, step_of
from benchmarks.measure import DEFAULTS, synthetic_batches
from benchmarks.report import environment
from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.checkpoint.agreement import gathered
from megatron_lite.dry_run_memory import micro_batches
from megatron_lite.errors import ConfigError, exit_with
from megatron_lite.optimizer import get_megatron_optimizer
from megatron_lite.pipeline_layout import V_SHAPED
from megatron_lite.pipeline_parallel import get_forward_backward_func
from megatron_lite.pipeline_parallel.orders import pipeline_order
from megatron_lite.pipeline_parallel.pipelined import _Stage
from megatron_lite.pipeline_parallel.timeline import pipeline_timeline, timeline_of
from megatron_lite.pipeline_parallel_config import SCHEDULES
from megatron_lite.training.initialize import initialize_parallel_groups, training_device

MODEL = (
    *("--num-layers", "8", "--hidden-size", "256", "--num-attention-heads", "8", "--seq-length", "256"),
    *("--vocab-size", "1024", "--untie-embeddings-and-output-weights", "--micro-batch-size", "2"),
)
ONE_CHUNK = ("gpipe", "1f1b")


@dataclass(frozen=True)
class Action:
    """One call of a stage: its number, the kind (a key of timeline.KINDS) and how long it took."""

    stage: int
    kind: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """The forward and backward passes of one step on all ranks: how long they took, and what was done meanwhile."""

    seconds: float
    actions: list[Action]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        schedule: one of SCHEDULES.
        chunks: model chunks of a rank.
        num_microbatches: micro-batches of a step.
        computed: bubble where all stages are alike and forward, gradients of activations and of weights take as long.
        computed_with_measured: bubble with the mean duration of each kind of action of each stage.
        measured: bubble measured.
        step_seconds: forward and backward passes of the quickest step.
        milliseconds: "stage kind" -> mean duration in that step.
    """

    schedule: str
    chunks: int
    num_microbatches: int
    computed: float
    computed_with_measured: float
    measured: float
    step_seconds: float
    milliseconds: dict[str, float]


@contextmanager
def recorded_actions() -> Iterator[list[Action]]:
    """The actions of this rank's stages inside the block. What a stage waits for is received before it is called."""
    actions: list[Action] = []

    def timed(name: str, kind_of: Callable[[dict[str, Any]], str]) -> Any:
        original = getattr(_Stage, name)

        def call(stage: _Stage, *arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = original(stage, *arguments, **options)
            actions.append(Action(stage.stage_index, kind_of(options), time.perf_counter() - begin))
            return result

        return mock.patch.object(_Stage, name, call)

    with ExitStack() as stack:
        stack.enter_context(timed("forward_one_chunk", lambda _: "F"))
        stack.enter_context(timed("backward_one_chunk", lambda options: "B" if options["full_backward"] else "I"))
        stack.enter_context(timed("backward_weight_one_chunk", lambda _: "W"))
        yield actions


def measure_steps(config: RunConfig, warmup: int, steps: int) -> list[Step]:
    """Train; the steps after the first `warmup` ones, the same on every rank."""
    initialize_parallel_groups(config)
    device = training_device(config.distributed.distributed_backend)
    model = model_chunks(config, device)
    optimizer = get_megatron_optimizer(config.optimizer, model)
    forward_backward = get_forward_backward_func(config.transformer)
    batch = synthetic_batches(config, device)[0]
    measured: list[Step] = []

    def timed_forward_backward(*arguments: Any, **options: Any) -> None:
        dist.barrier()
        with recorded_actions() as actions:
            begin = time.perf_counter()
            forward_backward(*arguments, **options)
            end = time.perf_counter()
        begins, ends, lists = zip(*gathered((begin, end, actions)), strict=True)  # one machine, one clock
        measured.append(Step(max(ends) - min(begins), [action for actions in lists for action in actions]))

    step = step_of(config, model, optimizer, timed_forward_backward)
    for _ in range(warmup + steps):
        step(batch)
    parallel_state.destroy_model_parallel()
    return measured[warmup:]


def row_of(config: RunConfig, steps: Sequence[Step]) -> Row:
    """The quickest step beside the timelines of its schedule."""
    layout, schedule = config.transformer.pipeline_layout, config.transformer.schedule
    step = min(steps, key=lambda step: step.seconds)
    count = micro_batches(config)
    keys = sorted({(action.stage, action.kind) for action in step.actions})
    times = {key: fmean(a.seconds for a in step.actions if (a.stage, a.kind) == key) for key in keys}
    busy = sum(action.seconds for action in step.actions)
    return Row(
        schedule,
        layout.stages_per_rank,
        count,
        pipeline_timeline(schedule, layout, count).bubble_fraction,
        timeline_of(pipeline_order(schedule, layout, count), layout, times).bubble_fraction,
        1 - busy / (layout.ranks * step.seconds),
        step.seconds,
        {f"{stage} {kind}": 1e3 * seconds for (stage, kind), seconds in times.items()},
    )


def configuration(schedule: str, num_microbatches: int, flags: Sequence[str]) -> RunConfig:
    """The run of one row; where a schedule allows several model chunks a rank, it has two.

    Raises:
        ConfigError: flags that do not make a run, or there is one rank only.
    """
    ranks = dist.get_world_size()
    if ranks == 1:
        raise ConfigError("there is one rank, but a pipeline has 2 or more: start it with torchrun --nproc-per-node 2.")
    words = [*MODEL, *flags, "--distributed-backend", "gloo", "--pipeline-schedule", schedule]
    words += ["--pipeline-model-parallel-size", str(ranks)]
    if schedule not in (*ONE_CHUNK, *V_SHAPED):
        words += ["--num-virtual-stages-per-pipeline-rank", "2"]
    micro_batch_size = parse_args(words, DEFAULTS).training.micro_batch_size or 1
    return parse_args([*words, "--global-batch-size", str(num_microbatches * micro_batch_size)], DEFAULTS)


def page(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """Markdown: the environment and the table."""
    about, settings = result["environment"], result["settings"]
    lines = [f"# Bubble of pipeline schedules, {about['date']}", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in about.items() if value is not None]
    lines += [
        f"- command: `{result['command']}`",
        f"- model: `{result['model']}`",
        f"- {settings['rounds']} rounds of {settings['steps']} steps each, after {settings['warmup']} of warm-up; the "
        "quickest step counts",
        "- measured: share of the ranks' time in which they are in no forward or backward pass of a stage",
        "- computed: every stage takes as long as the others, and gradients of activations and of weights as long as "
        "the forward pass each; with measured times: the mean duration of each kind of action of each stage in that "
        "step",
        "",
        "| schedule | chunks a rank | micro-batches | computed | computed with measured times | measured | step ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shares = (row.computed, row.computed_with_measured, row.measured)
        lines.append(
            f"| {row.schedule} | {row.chunks} | {row.num_microbatches} | "
            + " | ".join(f"{100 * share:.1f}%" for share in shares)
            + f" | {1e3 * row.step_seconds:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The flags of the measurement; the rest is pretrain_gpt.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="Default: all.")
    parser.add_argument("--num-microbatches", nargs="+", type=int, default=[2, 4, 8], help="Of a step; default 2 4 8.")
    parser.add_argument("--rounds", type=int, default=3, help="Times that all rows are measured; default %(default)s.")
    parser.add_argument("--steps", type=int, default=5, help="Steps of each row in a round; default %(default)s.")
    parser.add_argument("--warmup", type=int, default=2, help="Steps before these; default %(default)s.")
    parser.add_argument("--output", metavar="PATH", help="Write PATH.json and PATH.md too.")
    return parser


def measure(options: argparse.Namespace, flags: Sequence[str]) -> list[Row]:
    """A row for each number of micro-batches and schedule, all of them in turns.

    Raises:
        ConfigError: see configuration.
    """
    configs = [
        configuration(schedule, count, flags) for count in options.num_microbatches for schedule in options.schedules
    ]
    steps: list[list[Step]] = [[] for _ in configs]
    for turn in range(options.rounds):
        for config, measured in zip(configs, steps, strict=True):
            if dist.get_rank() == 0:
                what = f"{config.transformer.schedule}, {micro_batches(config)} micro-batches"
                print(f"round {turn + 1} of {options.rounds}: {what}", file=sys.stderr, flush=True)
            measured += measure_steps(config, options.warmup, options.steps)
    return [row_of(config, measured) for config, measured in zip(configs, steps, strict=True)]


def write(result: dict[str, Any], text: str, output: str) -> None:
    """PATH.json and PATH.md."""
    Path(f"{output}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Path(f"{output}.md").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on all ranks; the first prints, and writes if asked to."""
    words = list(sys.argv[1:] if argv is None else argv)
    options, flags = build_parser().parse_known_args(words)
    torch.set_num_threads(1)
    parallel_state.initialize_torch_distributed(backend="gloo")
    about = environment(torch.device("cpu"), torch.get_num_threads())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        rows = measure(options, flags)
    except ConfigError as error:
        exit_with("benchmarks.pipeline", error)
    parallel_state.shutdown()
    if rank > 0:
        return
    launcher = f"OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE torchrun --standalone --nproc-per-node {ranks}"
    result = {
        "environment": about,
        "command": f"{launcher} -m benchmarks.pipeline {shlex.join(words)}".rstrip(),
        "settings": {name: getattr(options, name) for name in ("rounds", "steps", "warmup")},
        "model": shlex.join([*MODEL, *flags]),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    text = page(result, rows)
    print(text, end="")
    if options.output is not None:
        write(result, text, options.output)


if __name__ == "__main__":
    main()
