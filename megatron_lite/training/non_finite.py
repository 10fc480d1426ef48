"""Losses and gradients that are not numbers: what is written down, and how a run goes on or ends.

The update of such a step is skipped on the device, so weights stay what they were. What happens next is the user's
choice: stop, skip (go on), or rewind to the last checkpoint and leave the data of that step out.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_lite.checkpoint import read_tracker
from megatron_lite.checkpoint.agreement import from_rank_zero
from megatron_lite.training.checkpointing import load, settle
from megatron_lite.training.initialize import print_rank_last
from megatron_lite.training.metrics import IterationRecord

if TYPE_CHECKING:
    from megatron_lite.training.train import Run

FILE = "non_finite.jsonl"


class Rewind(Exception):  # noqa: N818 (no error: the loop goes on)
    """Raised out of the reading of metrics: the run goes back to its last checkpoint.

    Attributes:
        iterations: those whose data are left out from then on.
    """

    def __init__(self, iterations: Sequence[int]) -> None:
        super().__init__(f"rewinding because of iterations {list(iterations)}")
        self.iterations = list(iterations)


def broken_records(records: Sequence[IterationRecord]) -> list[IterationRecord]:
    """Those whose loss or gradient norm is not a number; not those that overflow as a loss scale expects."""
    return [one for one in records if one.values["nan"] or not math.isfinite(one.values["lm_loss"])]


def write_down(folder: str | os.PathLike[str], records: Sequence[IterationRecord]) -> Path:
    """Append a line for each of them: iteration, the numbers of its samples in the order of training, what was seen.

    Sample n is the n-th of the run, counted from 0, whatever the layout; the samples of a step are [first, last].
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(describe(record)) + "\n" for record in records)
    return path


def describe(record: IterationRecord) -> dict[str, Any]:
    """One line of the file."""
    values = record.values
    return {
        "iteration": record.iteration,
        "samples": [record.consumed_samples - record.global_batch_size, record.consumed_samples - 1],
        "lm_loss": str(values["lm_loss"]),
        "grad_norm": str(values["grad_norm"]),
        "update": "skipped" if values["skipped"] else "applied",
    }


def explain(first: IterationRecord, path: Path) -> str:
    """The error of a run that stops."""
    update = "was skipped" if first.values["skipped"] else "was applied, its gradient being finite"
    return (
        f"iteration {first.iteration}: lm loss {first.values['lm_loss']}, grad norm {first.values['grad_norm']}. "
        f"Its update, from samples {first.consumed_samples - first.global_batch_size} to {first.consumed_samples}, "
        f"{update}; {path} has the numbers. Lower --lr or lengthen the warm-up; to leave these data out, resume with "
        f"--iterations-to-skip {first.iteration}, or let --on-nan rewind do so; to go on regardless, --on-nan skip."
    )


def act_on(run: "Run", records: Sequence[IterationRecord]) -> None:
    """Stop, go on or go back, as --on-nan says, if one of these iterations gave no numbers.

    Raises:
        FloatingPointError: the run stops.
        Rewind: it goes back to its last checkpoint.
    """
    training, broken = run.config.training, broken_records(records)
    if not broken or not training.check_for_nan_in_loss_and_grad or run.config.transformer.fp16:
        return
    path = Path(run.config.checkpoint.save or ".") / FILE
    if dist.get_rank() == dist.get_world_size() - 1:
        write_down(path.parent, broken)
    iterations = [record.iteration for record in broken]
    if training.on_nan == "rewind" and run.left_out.isdisjoint(iterations):
        raise Rewind(iterations)
    if training.on_nan != "skip":
        raise FloatingPointError(explain(broken[0], path))
    print_rank_last(
        f"WARNING: iterations {iterations} gave no numbers ({path}); training goes on, as --on-nan skip says"
    )


def rewind(run: "Run", found: Rewind) -> int:
    """Go back to the last checkpoint of --save; from then on the data of the broken iterations are left out.

    Returns:
        The iteration that the run is at.

    Raises:
        FloatingPointError: there is no checkpoint to go back to.
    """
    config, root = run.config, run.config.checkpoint.save
    settle(run.background, wait=True)
    latest = None if root is None else from_rank_zero("Looking for a checkpoint", lambda: read_tracker(root))
    if latest is None:
        raise FloatingPointError(
            f"iterations {found.iterations} gave no numbers, and there is no checkpoint yet to rewind to: lower --lr, "
            "or start again with --iterations-to-skip."
        )
    print_rank_last(
        f"WARNING: iterations {found.iterations} gave no numbers: rewinding to the checkpoint of iteration {latest}, "
        "and their data are left out from now on"
    )
    run.left_out.update(found.iterations)
    source = dataclasses.replace(
        config.checkpoint, load=root, ckpt_step=None, finetune=False, pretrained_checkpoint=None
    )
    progress = load(dataclasses.replace(config, checkpoint=source), run.model_chunks, run.optimizer, run.scheduler)
    vars(run.progress).update(vars(progress))
    run.train_stream, run.valid_stream, run.test_stream = run.open_streams(run.progress)
    run.writers.rewind(run.progress.iteration + 1)
    run.unprinted = []
    run.metrics.restart_clock()
    return run.progress.iteration
