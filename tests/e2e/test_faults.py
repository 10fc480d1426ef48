"""Runs in which a rank dies or hangs: they end with a report, and go on by themselves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, TINY, environment, pretrain, training_metrics

pytestmark = pytest.mark.e2e
NUMBERS = ("lm_loss", "grad_norm", "learning_rate", "consumed_samples")

# pretrain_gpt.py, in which `fault(run, iteration, rank, attempt)` happens before each iteration.
BROKEN = """
import os, runpy, signal, sys, time
from megatron_lite.training import train

original = train.one_iteration

def fault(run, iteration, rank, attempt):
    {fault}

def one_iteration(run):
    fault(run, run.progress.iteration + 1, int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    original(run)

train.one_iteration = one_iteration
sys.argv[0] = "pretrain_gpt.py"
runpy.run_path("pretrain_gpt.py", run_name="__main__")
"""


def torchrun(folder: Path, fault: str, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two ranks of pretrain_gpt.py with a fault, under torchrun."""
    script = folder / "broken.py"
    script.write_text(BROKEN.format(fault=fault))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, f"--max-restarts={restarts}", str(script), *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_rank_that_hangs_is_found_and_the_run_ends(tmp_path):
    """Rank 1 stands still before iteration 3, and rank 0 waits for it in the forward pass.

    Mutation: only the first rank ends.
    """
    fault = """
    if iteration == 3:
        run.hooks[-1].timeout_s = 3  # of the watchdog; from the start, that would be short for a busy machine
        time.sleep(1000 * rank)
"""
    done = torchrun(tmp_path, fault, *TINY, "--train-iters", "6", "--tensor-model-parallel-size", "2")
    assert done.returncode != 0
    assert "THE RUN HANGS: a rank has not moved for 3 s. Where the ranks are:" in done.stdout, done.stdout[-5000:]
    waiting = re.search(r"^  rank 0: (.*)$", done.stdout, re.MULTILINE)
    assert waiting is not None
    place = r"iteration 3, forward and backward, at tensor_parallel/\S+:\d+ \(\w+\)"
    assert re.fullmatch(place + ", waiting for the group tp of ranks 0, 1", waiting[1]), waiting[1]
    assert re.search(r"^  rank 1: iteration 2, between steps, at training/train.py:\d+ \(train\)$", done.stdout, re.M)
    assert "exitcode  : 3" in done.stdout


def test_a_killed_rank_is_started_again_by_torchrun(tmp_path):
    """Rank 1 is killed at iteration 6; the run goes on from iteration 4 by itself, with the numbers of one unbroken.

    Mutation: --load that does not find what the attempt before has saved.
    """
    arguments = [*TINY, "--train-iters", "8", "--tensor-model-parallel-size", "2", "--hidden-dropout", "0.1"]
    pretrain(2, *arguments, "--metrics-jsonl", str(tmp_path / "whole.jsonl"))
    folder = str(tmp_path / "ckpt")
    fault = "(iteration, rank, attempt) == (6, 1, 0) and os.kill(os.getpid(), signal.SIGKILL)"
    saving = ["--save", folder, "--load", folder, "--save-interval", "4"]
    saving += ["--metrics-jsonl", str(tmp_path / "killed.jsonl")]
    done = torchrun(tmp_path, fault, *arguments, *saving, restarts=1)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"successfully loaded checkpoint from {folder} at iteration 4" in done.stdout
    whole, killed = (training_metrics(tmp_path / name, *NUMBERS) for name in ("whole.jsonl", "killed.jsonl"))
    assert killed == whole
