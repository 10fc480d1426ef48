"""Running the project's command lines as a user does."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.warm_launcher import launch

REPOSITORY = Path(__file__).resolve().parents[2]
# A model of a few thousand parameters on made-up data: start-up dominates.
TINY = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "64"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--mock-data", "--num-workers", "0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--make-vocab-size-divisible-by", "32"),
    *(
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "8",
        "--lr",
        "1e-2",
        "--log-interval",
        "1",
        "--eval-iters",
        "2",
    ),
]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: one thread, no spinning, this checkout first on the path."""
    cleaned = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {
        **cleaned,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **changes,
    }


def pretrain_command(processes: int, arguments: list[str]) -> list[str]:
    """The command line of a run: plain Python for one process, torchrun for more."""
    if processes == 1:
        return [sys.executable, "pretrain_gpt.py", *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "pretrain_gpt.py", *arguments]


def run(command: list[str], *, expect: int | None = 0, timeout: float = 300.0, folder: Path = REPOSITORY) -> str:
    """Run a command in a folder; returns what it printed. Fails with that output if it ends otherwise."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert expect is None or done.returncode == expect, f"exit code {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def pretrain(processes: int, *arguments: str, expect: int | None = 0) -> str:
    """Run pretrain_gpt.py to its end on so many processes (see warm_launcher); returns what it printed.

    Fails with that if it ends with another status; `expect` None takes any.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        output.touch()
        status = launch(processes, list(arguments), output, environment(), timeout=300.0)
        printed = output.read_text()
    assert expect is None or status == expect, f"exit status {status}:\n{printed[-6000:]}"
    return printed


def pretrain_until(condition: Callable[[], bool], processes: int, *arguments: str, output: Path | None = None) -> bool:
    """Start pretrain_gpt.py and kill all of it, with SIGKILL, once `condition` holds. Returns whether it had to die.

    What it prints goes to `output`, which is emptied first.
    """
    with (
        open(output or os.devnull, "w") as printed,
        subprocess.Popen(
            pretrain_command(processes, list(arguments)),
            cwd=REPOSITORY,
            env=environment(),
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        while process.poll() is None:
            if condition():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=60)
                return True
            time.sleep(0.002)
        return False


def training_metrics(path: Path, *names: str) -> list[tuple[float, ...]]:
    """(iteration, values...) of each training line of a metrics file."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [tuple(entry[name] for name in ("iteration", *names)) for entry in entries if "lm_loss" in entry]
