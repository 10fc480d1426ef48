"""pretrain_gpt.py with a pause of $PAUSE seconds before each iteration, so that faults meet a run at work."""

import os
import runpy
import sys
import time
from pathlib import Path

from megatron_lite.training import train

REPOSITORY = Path(__file__).resolve().parents[2]
one_iteration = train.one_iteration


def slow_iteration(run: train.Run) -> None:
    """Pause, then train."""
    time.sleep(float(os.environ.get("PAUSE", "0")))
    one_iteration(run)


train.one_iteration = slow_iteration
sys.argv[0] = "pretrain_gpt.py"
runpy.run_path(str(REPOSITORY / "pretrain_gpt.py"), run_name="__main__")
