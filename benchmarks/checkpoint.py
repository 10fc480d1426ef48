"""Saving and loading checkpoints beside a plain copy of the same bytes, and how long training waits for a save.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint --folder /path/on/the/disk

A GPT with Adam's state is saved and loaded in turns with plain copies of the files, all of them synced to the disk. The
pages that were written stay in the system's cache, so reading measures the program and not the disk. Between the start
of a save in the background and its end the model is trained, as a run would. The first round, in which memory comes
from the system, does not count; of the others the median does. Further flags are pretrain_gpt.py's and change the
model and the layout.
"""

import argparse
import functools
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contenders import model_chunks, step_of
from benchmarks.measure import DEFAULTS, synthetic_batches
from benchmarks.pipeline import write
from benchmarks.report import environment
from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.checkpoint import BackgroundSaver, load_checkpoint, save_checkpoint
from megatron_lite.checkpoint.agreement import from_rank_zero, gathered
from megatron_lite.checkpoint.checksums import checksums_of
from megatron_lite.errors import ConfigError, exit_with
from megatron_lite.optimizer import get_megatron_optimizer
from megatron_lite.pipeline_parallel import get_forward_backward_func
from megatron_lite.training.initialize import initialize_parallel_groups, training_device

MODEL = (
    *("--num-layers", "8", "--hidden-size", "512", "--num-attention-heads", "8", "--seq-length", "128"),
    *("--vocab-size", "8192", "--micro-batch-size", "1"),
)
ROWS = {
    "copy": "plain copy of the files, synced",
    "save": "save",
    "wait": "save in the background: training waits",
    "whole": "save in the background: until it is complete",
    "read": "plain read of the files",
    "digest": "plain read of the files, with SHA-256",
    "load": "load",
    "verified": "load with --verify-checkpoint",
}


def copy_files(source: Path, target: Path) -> None:
    """A plain copy of a checkpoint, durable: each rank copies its share of the files."""
    names = sorted(path.name for path in source.iterdir())[dist.get_rank() :: dist.get_world_size()]
    for name in names:
        shutil.copyfile(source / name, target / name)
        with open(target / name, "rb") as file:
            os.fsync(file.fileno())


def read_files(source: Path, digest: bool) -> None:
    """Read all files of a checkpoint, each rank its share."""
    names = sorted(path.name for path in source.iterdir())[dist.get_rank() :: dist.get_world_size()]
    if digest:
        checksums_of(source, names)
        return
    buffer = bytearray(1 << 24)
    for name in names:
        with open(source / name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds(action: Callable[[], object]) -> float:
    """How long it takes until every rank is done."""
    dist.barrier()
    begin = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - begin


def measure(config: RunConfig, folder: Path, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes of a checkpoint, and for each of ROWS the seconds of every round."""
    initialize_parallel_groups(config)
    device = training_device(config.distributed.distributed_backend)
    model = model_chunks(config, device)
    optimizer = get_megatron_optimizer(config.optimizer, model)
    batch = synthetic_batches(config, device)[0]
    step = step_of(config, model, optimizer, get_forward_backward_func(config.transformer))
    saver = BackgroundSaver()

    def save(background: BackgroundSaver | None = None) -> Path:
        return save_checkpoint(folder, 1, model, optimizer, extra={}, config_dict={}, background=background)

    def load(verify: bool) -> None:
        load_checkpoint(folder, model, optimizer, verify=verify)

    def in_background() -> tuple[float, float]:
        dist.barrier()
        begin = time.perf_counter()
        save(saver)
        waited = time.perf_counter() - begin
        while any(gathered(saver.is_busy)):
            step(batch)
            saver.poll()
        return max(gathered(waited)), max(gathered(time.perf_counter() - begin))

    step(batch)
    saved = save()
    total = sum(path.stat().st_size for path in saved.iterdir())
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for turn in range(-1, rounds):  # the first time memory comes from the system, which does not count
        if dist.get_rank() == 0:
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        copied = Path(from_rank_zero("Copying", lambda: tempfile.mkdtemp(dir=folder)))
        found["copy"].append(seconds(functools.partial(copy_files, saved, copied)))
        found["save"].append(seconds(save))
        waited, whole = in_background()
        found["wait"].append(waited)
        found["whole"].append(whole)
        found["read"].append(seconds(lambda: read_files(saved, digest=False)))
        found["digest"].append(seconds(lambda: read_files(saved, digest=True)))
        found["load"].append(seconds(lambda: load(verify=False)))
        found["verified"].append(seconds(lambda: load(verify=True)))
        if dist.get_rank() == 0:
            shutil.rmtree(copied)
    saver.close()
    parallel_state.destroy_model_parallel()
    return total, {row: measured[1:] for row, measured in found.items()}


def page(result: dict[str, Any]) -> str:
    """Markdown: the environment and the table."""
    about, total = result["environment"], result["bytes"]
    medians = {row: median(result["seconds"][row]) for row in ROWS}
    lines = [f"# Saving and loading checkpoints, {about['date']}", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in about.items() if value is not None]
    lines += [
        f"- command: `{result['command']}`",
        f"- model: `{result['model']}`",
        f"- {total / 1e6:,.0f} MB of weights, Adam's moments and random number streams; medians of "
        f"{len(result['seconds']['copy'])} rounds",
        "",
        "| | seconds | MB/s | times a plain copy or read |",
        "|---|---:|---:|---:|",
    ]
    for row, title in ROWS.items():
        against = medians["copy" if row in ("copy", "save", "wait", "whole") else "read"]
        rate = total / medians[row] / 1e6
        lines.append(f"| {title} | {medians[row]:.2f} | {rate:,.0f} | {medians[row] / against:.2f} |")
    share = medians["wait"] / medians["save"]
    lines += ["", f"With --async-save training waits {100 * share:.0f}% of the time of a save without it."]
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The flags of the measurement; the rest is pretrain_gpt.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", default=".", help="A folder on the disk to measure; default the current one.")
    parser.add_argument("--rounds", type=int, default=5, help="Default %(default)s.")
    parser.add_argument("--output", metavar="PATH", help="Write PATH.json and PATH.md too.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on all ranks; the first prints, and writes if asked to."""
    words = list(sys.argv[1:] if argv is None else argv)
    options, flags = build_parser().parse_known_args(words)
    parallel_state.initialize_torch_distributed()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = Path(from_rank_zero("Making a folder", lambda: tempfile.mkdtemp(prefix="ckpt-", dir=options.folder)))
    try:
        config = parse_args([*MODEL, "--global-batch-size", str(ranks), *flags], DEFAULTS)
        about = environment(training_device(config.distributed.distributed_backend), torch.get_num_threads())
        total, found = measure(config, folder, options.rounds)
    except ConfigError as error:
        exit_with("benchmarks.checkpoint", error)
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    parallel_state.shutdown()
    if rank > 0:
        return
    launcher = f"OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node {ranks}"
    result = {
        "environment": about,
        "command": f"{launcher} -m benchmarks.checkpoint {shlex.join(words)}".rstrip(),
        "model": shlex.join([*MODEL, *flags]),
        "bytes": total,
        "seconds": found,
    }
    text = page(result)
    print(text, end="")
    if options.output is not None:
        write(result, text, options.output)


if __name__ == "__main__":
    main()
