"""pretrain_gpt.py with a pause before each iteration, so that faults meet a run at work.

The file $PAUSE_FILE says how many seconds, and may change meanwhile.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from megatron_lite.training import train

one_iteration = train.one_iteration


def slow_iteration(run: train.Run) -> None:
    """Pause, then train."""
    time.sleep(float(Path(os.environ["PAUSE_FILE"]).read_text()))
    one_iteration(run)


train.one_iteration = slow_iteration
sys.argv[0] = "pretrain_gpt.py"
runpy.run_path(str(Path(__file__).resolve().parents[2] / "pretrain_gpt.py"), run_name="__main__")
