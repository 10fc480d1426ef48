#!/usr/bin/env python3
"""Run one configuration at two parallel layouts and say whether they compute the same, and where they first differ.

python tools/compare_layouts.py --config configs/quickstart.yaml --mock-data \\
    --left="--tensor-model-parallel-size 2" --right="--pipeline-model-parallel-size 2"

Flags of pretrain_gpt.py are for both sides, those in --left and --right for one. Both sides start from the same weights
and read the same data. The tool starts the ranks itself, one layout after the other, on GPUs where there are enough.
Dropout and other random numbers, which differ between ranks, are off; nothing is saved.
"""

import argparse
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_lite.arguments import RunConfig, build_run_config, read_settings
from megatron_lite.arguments.command_line import Settings
from megatron_lite.arguments.validation import all_violations
from megatron_lite.checkpoint import CheckpointError
from megatron_lite.errors import ConfigError, exit_with

if TYPE_CHECKING:
    from megatron_lite.training.comparison import Comparison, Deviation, LayoutRecord

PROGRAM = "compare_layouts.py"
SHOWN = 5
VERDICTS = """\
Two correct layouts differ by rounding alone. The verdict is "equal to rounding" (exit status 0) if nothing deviates by
more than the bound of the precision, and "DIFFERENT" (exit status 1) otherwise:

  fp64  1e-9    losses, gradient norms, outputs of modules, gradients, weights. The default: rounding shows at 1e-12,
                a mistake at 1e-6 or more, so this decides.
  fp32  1e-4    the same without weights: Adam divides a gradient by its size, so an element whose gradient is rounding
  bf16  5e-2    moves by a whole learning rate, in either direction. Weights are shown all the same.

Deviations are relative: of an output to its largest number in all tokens, of a gradient to its largest element or, if
that is smaller, to 1e-4 (fp32: 1e-2, bf16: 1e-1) of the largest of the model, of a weight to the largest of the model.
Of hidden states the L2 norm and a projection on a fixed random vector are compared, token by token. Exit status 2: a
setting is wrong, or a layout did not run to its end."""

RANDOM = "ranks draw random numbers of their own"
FORCED: dict[str, tuple[Any, str]] = {
    "hidden_dropout": (0.0, RANDOM),
    "attention_dropout": (0.0, RANDOM),
    "moe_input_jitter_eps": (None, RANDOM),
    "moe_router_force_load_balancing": (False, RANDOM),
    "compile": (False, "nobody can listen to what is inside a compiled layer"),
    "skip_train": (False, "steps are compared"),
}
"""Settings with the value they have here, and why."""

REDUCED = ("fp32_residual_connection", "grad_reduce_in_bf16")
"""Switches that belong to low precision, off in fp64 and fp32."""


@dataclass
class Side:
    """One of the two layouts: left or right, the flags it has of its own, all its flags, and its configuration."""

    name: str
    own: list[str]
    words: list[str]
    config: RunConfig

    @property
    def title(self) -> str:
        """Its flags and ranks."""
        ranks = self.config.world_size
        return f"{shlex.join(self.own) or '(as configured)'}, {ranks} rank{'s' if ranks > 1 else ''}"


def build_parser() -> argparse.ArgumentParser:
    """The tool's own flags."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage='%(prog)s [flags of pretrain_gpt.py] --left "FLAGS" --right "FLAGS" [options]',
        description=__doc__,
        epilog=VERDICTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for side in ("left", "right"):
        parser.add_argument(f"--{side}", required=True, metavar="FLAGS", help="Flags of this side alone, as one word.")
        text = "Ranks of this side; default the fewest that its parallel sizes need."
        parser.add_argument(f"--{side}-ranks", type=int, metavar="N", help=text)
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="Optimizer steps; default 2.")
    text = "What to compute in, whatever the configuration says; default fp64."
    parser.add_argument("--precision", choices=("fp64", "fp32", "bf16"), default="fp64", help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see VERDICTS for what it returns."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["--worker"]:
            work(Path(words[1]))
            return 0
        arguments, shared = build_parser().parse_known_args(_joined(words))
        sides = read_sides(arguments, shared)
        with tempfile.TemporaryDirectory(prefix="compare_layouts_") as folder:
            left, right = (run_side(side, arguments, Path(folder)) for side in sides)
    except (ConfigError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    from megatron_lite.training.comparison import PRECISIONS, compare

    comparison = compare(left, right, PRECISIONS[arguments.precision])
    print(report(sides, (left, right), comparison, arguments.precision))
    return 0 if comparison.is_rounding else 1


def _joined(words: list[str]) -> list[str]:
    """argparse takes a value that begins with a dash only when it is in one word with its flag."""
    found: list[str] = []
    for word in words:
        if found and found[-1] in ("--left", "--right"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def read_sides(arguments: argparse.Namespace, shared: list[str]) -> tuple[Side, Side]:
    """Both layouts, validated.

    Raises:
        ConfigError: with all that is wrong, before anything has started.
    """
    problems = []
    if "RANK" in os.environ:
        problems.append(f"RANK is set, as by torchrun, but {PROGRAM} starts the ranks itself: run it with python.")
    if arguments.steps < 1:
        problems.append(f"--steps is {arguments.steps}, but must be at least 1: write 1 or more.")
    sides, lines = [], []
    for name in ("left", "right"):
        ranks = getattr(arguments, f"{name}_ranks")
        try:
            own = split_words(getattr(arguments, name))
            settings = read_settings([*shared, *own])
            lines += force(settings, arguments.precision)
            side = Side(name, own, [*shared, *own], configure(settings, ranks))
        except ConfigError as error:
            problems.append(f"{name}: {error}")
            continue
        sides.append(side)
        problems += [f"{name}: {text}" for text in violations(settings, side.config)]
    if not problems:
        problems = disagreements(sides[0].config, sides[1].config, arguments.steps)
    if problems:
        raise ConfigError.from_violations(problems)
    lines += layout_dependent(sides[0].config, sides[1].config) + same_devices(sides)
    for line in dict.fromkeys(lines):
        print(f"note: {line}")
    return sides[0], sides[1]


def split_words(text: str) -> list[str]:
    """The words of --left or --right.

    Raises:
        ConfigError: a quotation mark without its other half.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} cannot be split into words ({error}): close the quotation mark.") from error


def force(settings: Settings, precision: str) -> list[str]:
    """Set what makes two layouts comparable; a sentence for each choice of the user's that is not kept."""
    given_values = {name: value for name, (value, _) in settings.values.items()}
    forced, reason = dict(FORCED), f"everything is computed in {precision}"
    if precision != "bf16":
        forced |= {name: (False, reason) for name in REDUCED}
        if given_values.get("attention_backend") in ("flash", "fused"):
            forced["attention_backend"] = ("auto", reason)
    if precision == "fp64":
        forced["moe_router_dtype"] = (None, reason)
    lines = []
    for name, (value, reason) in forced.items():
        given = given_values.get(name, value)
        if given != value:
            lines.append(f"{name} is {given} in this configuration, but {value} in the comparison: {reason}.")
        settings.values[name] = (value, "comparison")
    settings.values["num_workers"] = (0, "comparison")
    for name in ("fp16", "bf16", "fp64"):
        settings.values[name] = (name == precision, "comparison")
    return lines


def configure(settings: Settings, ranks: int | None) -> RunConfig:
    """The configuration of a layout on so many ranks, by default on the fewest; not validated yet."""
    config = build_run_config(settings)
    config.world_size = fewest_ranks(config) if ranks is None else ranks
    return config


def fewest_ranks(config: RunConfig) -> int:
    """The smallest world that is a multiple of tp x cp x pp and of etp x ep x pp."""
    sizes = config.transformer
    dense = sizes.tensor_model_parallel_size * sizes.context_parallel_size
    experts = (sizes.expert_tensor_parallel_size or 1) * sizes.expert_model_parallel_size
    return math.lcm(dense, experts) * sizes.pipeline_model_parallel_size


def violations(settings: Settings, config: RunConfig) -> list[str]:
    """What is wrong with one side."""
    found = settings.problems + all_violations(config)
    given = {"--print-config": settings.print_config, "--dry-run": settings.dry_run}
    found += [f"{flag} is given, but layouts are run here: leave it out." for flag, value in given.items() if value]
    if settings.world_size is not None:
        found.append(
            f"--world-size is {settings.world_size}, but the number of ranks is told by --left-ranks and --right-ranks."
        )
    return found


def disagreements(left: RunConfig, right: RunConfig, steps: int) -> list[str]:
    """What must be the same on both sides and is not."""
    from megatron_lite.training.setup import batch_calculator_of, total_iterations

    found = []
    if left.data.seq_length != right.data.seq_length:
        found.append(
            f"seq_length is {left.data.seq_length} on the left and {right.data.seq_length} on the right, but both must "
            "read the same samples: write --seq-length once, outside of --left and --right."
        )
    sizes = {}
    for name, config in (("left", left), ("right", right)):
        calculator = batch_calculator_of(config)
        iterations = total_iterations(config, calculator)
        if steps > iterations:
            found.append(
                f"{name}: --steps is {steps}, but the run ends after {iterations}: write --train-iters {steps} or more."
            )
        sizes[name] = [calculator.samples(step + 1) - calculator.samples(step) for step in range(steps)]
    if sizes["left"] != sizes["right"]:
        shown = [str(size[0]) if len(set(size)) == 1 else str(size) for size in sizes.values()]
        found.append(
            f"the global batch has {shown[0]} samples on the left and {shown[1]} on the right, but must be the same: "
            "write --global-batch-size N, which by default grows with the number of data parallel ranks."
        )
    return found


def layout_dependent(left: RunConfig, right: RunConfig) -> list[str]:
    """Why these two may differ although nothing is wrong."""
    found, sizes = [], (left.transformer, right.transformer)
    micro = (left.training.micro_batch_size or 1, right.training.micro_batch_size or 1)
    if any(one.num_moe_experts and one.moe_expert_capacity_factor is not None for one in sizes):
        found.append(
            "moe_expert_capacity_factor counts the tokens of a rank, so other tokens are dropped at another layout."
        )
    kinds = {kind for one in sizes if one.num_moe_experts for kind in one.balance_coefficients}
    kinds |= {"sinkhorn" for one in sizes if one.num_moe_experts and "sinkhorn" in one.balance_types}
    if "global_aux_loss" in kinds and micro[0] * left.data_parallel_size != micro[1] * right.data_parallel_size:
        found.append(
            "global_aux_loss counts the micro-batches of a step so far, so it is the same only where the data parallel "
            "size x --micro-batch-size is."
        )
    if micro[0] != micro[1] and (kinds & {"aux_loss", "sinkhorn"}):
        found.append("the balance of experts is counted within a micro-batch, and --micro-batch-size is not the same.")
    if micro[0] != micro[1] and not all(one.calculate_per_token_loss for one in sizes):
        found.append("the loss is the mean over micro-batches of their means, and --micro-batch-size is not the same.")
    return found


def same_devices(sides: Sequence[Side]) -> list[str]:
    """Both layouts run on GPUs, or both on the CPU where there are fewer GPUs than ranks; a sentence if so."""
    gpus, ranks = torch.cuda.device_count(), max(side.config.world_size for side in sides)
    if gpus == 0 or gpus >= ranks:
        return []
    for side in sides:
        side.words += ["--distributed-backend", "gloo"]
    return [f"both layouts run on the CPU, because one has {ranks} ranks and there are {gpus} GPUs."]


def run_side(side: Side, arguments: argparse.Namespace, folder: Path) -> "LayoutRecord":
    """Start the ranks of a layout, show what they print, and read what they found.

    Raises:
        ConfigError: they did not end well.
    """
    from megatron_lite.training.comparison import LayoutRecord

    job, result, ranks = folder / f"{side.name}.json", folder / f"{side.name}.pt", side.config.world_size
    settings = {"words": side.words, "ranks": ranks, "steps": arguments.steps, "precision": arguments.precision}
    job.write_text(json.dumps({**settings, "result": str(result)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    print(f"{side.name}: {side.title}", flush=True)
    with subprocess.Popen(
        [sys.executable, *launcher, str(Path(__file__).resolve()), "--worker", str(job)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            print(f"{side.name:>5} | {line}", end="", flush=True)
    if process.returncode or not result.exists():
        raise ConfigError(f"the {side.name} layout ended with status {process.returncode}; its last words are above.")
    return LayoutRecord.read(result)


def work(path: Path) -> None:
    """What each rank of a layout does: the job that `run_side` wrote down."""
    from megatron_lite.training.comparison import PRECISIONS
    from megatron_lite.training.initialize import announce, distributed_environment
    from megatron_lite.training.recording import record_run

    # torch warns of a slower way to put tensors together, which is done once here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    job = json.loads(path.read_text())
    settings = read_settings(job["words"])
    force(settings, job["precision"])
    config = configure(settings, job["ranks"])
    config.freeze()
    try:
        with distributed_environment(config) as device:
            announce(config, device)
            record = record_run(config, device, job["steps"], PRECISIONS[job["precision"]].bound)
            if record is not None:
                record.save(Path(job["result"]))
    except (ConfigError, CheckpointError) as error:
        exit_with(PROGRAM, error)


def report(sides: Sequence[Side], records: Sequence["LayoutRecord"], comparison: "Comparison", precision: str) -> str:
    """The comparison in words and numbers."""
    left, right = records
    lines = ["", *(f"{side.name:<6}{side.title}" for side in sides)]
    lines.append(f"{precision}; what deviates by {comparison.precision.bound:.0e} or less, relative, is rounding")
    lines += ["", f"{'':<28}{'left':<22}{'right':<22}deviation"]
    numbers = zip(left.losses + left.grad_norms, right.losses + right.grad_norms, strict=True)
    for one, (ours, theirs) in zip(comparison.losses + comparison.grad_norms, numbers, strict=True):
        lines.append(f"{one.name:<28}{ours:<22.14g}{theirs:<22.14g}{one.value:.1e}")
    lines += ["", *first_difference(comparison)]
    lines += largest("gradients of step 1", comparison.gradients, comparison.precision.bound)
    counts = "" if comparison.precision.weights_count else f", which do not count in {precision}"
    lines += largest(f"weights after {len(left.losses)} steps{counts}", comparison.weights, comparison.precision.bound)
    lines += [f"copies that differ: {sentence}" for sentence in comparison.unequal]
    return "\n".join([*lines, "", f"verdict: {'equal to rounding' if comparison.is_rounding else 'DIFFERENT'}"])


def first_difference(comparison: "Comparison") -> list[str]:
    """Where the two part: the initial weights, or the first output."""
    if comparison.initial:
        names = comparison.initial[:SHOWN] + ["..."] * (len(comparison.initial) > SHOWN)
        lines = [f"initial weights: {len(comparison.initial)} parameters differ: {', '.join(names)}"]
    else:
        lines = ["initial weights: equal bit for bit"]
    outputs, first = comparison.outputs, comparison.first_difference
    before = outputs if first is None else outputs[: outputs.index(first)]
    agreeing = f"{len(before)} agree" + (f"; largest deviation: {largest_of(before)}" if before else "")
    if first is None:
        return [*lines, f"outputs in step 1: all {agreeing}"]
    return [*lines, f"first output that differs in step 1: {shown(first)}", f"    before it {agreeing}"]


def largest_of(deviations: Sequence["Deviation"]) -> str:
    """The largest of some deviations in words."""
    return shown(max(deviations, key=lambda one: one.value))


def shown(one: "Deviation") -> str:
    """A deviation in words."""
    return f"{one.value:.1e} in {one.name}" + (f" ({one.where})" if one.where else "")


def largest(title: str, deviations: Sequence["Deviation"], bound: float) -> list[str]:
    """The largest deviations of a kind."""
    beyond = sum(not one.value <= bound for one in deviations)
    lines = [f"{title}: {beyond} of {len(deviations)} differ; the largest deviations:"]
    return lines + [f"    {one.value:.1e}  {one.name}" for one in deviations[:SHOWN]]


if __name__ == "__main__":
    sys.exit(main())
