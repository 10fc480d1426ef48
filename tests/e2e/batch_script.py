"""scripts/slurm/pretrain.sbatch as SLURM would run it, with stand-ins for `srun`, `scontrol` and `torchrun`."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from tests.e2e.commands import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "slurm" / "pretrain.sbatch"
# As the real one, srun hands a signal on, here to nobody: it ends when it has got one, or with its program.
SRUN = """#!/usr/bin/env bash
trap 'echo srun got USR1; kill -KILL $!; exit "$SRUN_STATUS"' USR1
"${@:2}" & # the first one is --kill-on-bad-exit=1
wait $! || exit
exit "$SRUN_STATUS"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'node7\\nnode8\\n' ;;
    "show job") echo "JobId=$3 JobState=$JOB_STATE Reason=None Requeue=1 Restarts=0 PreemptTime=$PREEMPT_TIME" ;;
    requeue*) echo "requeued $2" ;;
esac
"""
# It tries whether it survives the signals of SLURM, and records what it was called with.
TORCHRUN = """#!/usr/bin/env bash
kill -TERM $$
kill -USR1 $$
[ -z "$TRAINING_TIME" ] || sleep 0.1 # until the script waits
printf '%s\\n' "$@" > "$RECORD"
[ -z "$TRAINING_TIME" ] || exec sleep "$TRAINING_TIME"
"""


class Ended(NamedTuple):
    """A job: its exit status, what it printed, and the arguments of torchrun, empty if it was not started."""

    status: int
    output: str
    torchrun: list[str]

    @property
    def pretraining(self) -> list[str]:
        """The arguments of pretrain_gpt.py."""
        return self.torchrun[self.torchrun.index("pretrain_gpt.py") + 1 :]

    def option(self, name: str) -> str:
        """What follows an option of torchrun."""
        return self.torchrun[self.torchrun.index(name) + 1]


def submit(
    folder: Path, *arguments: str, time_limit: bool = False, start: Path = REPOSITORY, **variables: str
) -> Ended:
    """Run the script in a job of two nodes, from the folder `start`.

    Args:
        folder: scratch space.
        arguments: those of the script.
        time_limit: send SIGUSR1 to the script once the training runs.
        start: where the job is submitted.
        variables: changes of the environment; an empty one unsets.
    """
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    record = folder / "torchrun.txt"
    record.unlink(missing_ok=True)
    known = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "1234", "SLURM_NNODES": "2"}
    known |= {"SLURM_JOB_NODELIST": "node[7-8]", "DATA_PATH": "data/x", "TOKENIZER_MODEL": "data/t"}
    known |= {"RUN": str(folder / "run"), "RECORD": str(record), "TRAINING_TIME": "60" if time_limit else ""}
    known |= {"SRUN_STATUS": "0", "JOB_STATE": "RUNNING", "PREEMPT_TIME": "None"} | variables
    with subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=start,
        env={name: value for name, value in known.items() if value or name == "TRAINING_TIME"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        while time_limit and job.poll() is None and not (record.exists() and record.read_text()):
            time.sleep(0.01)
        if time_limit:
            job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    return Ended(job.returncode, output, record.read_text().splitlines() if record.exists() else [])
