"""When to stop: decided together, at step boundaries.

A signal or a clock reaches one rank earlier than another. If each acted on its own, one would save a checkpoint while
the next one waits in a collective of the following step. So ranks vote at the end of every step, over a CPU group
that does not make the host wait for a GPU.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from megatron_lite.training.config import TrainingConfig


class StopVote:
    """Asks after each step whether any rank has a reason to stop; use as a context manager around training."""

    def __init__(self, config: TrainingConfig) -> None:
        """Prepare the vote; it costs nothing unless a signal handler or a time limit is asked for."""
        self.config = config
        self._signal = getattr(signal, config.exit_signal) if config.exit_signal_handler else None
        self._received = False
        self._start = time.monotonic()
        self._previous_handler: signal._HANDLER = signal.SIG_DFL
        self._voting = self._signal is not None or config.exit_duration_in_mins is not None
        self._group = dist.new_group(backend="gloo") if self._voting and dist.get_world_size() > 1 else None

    def __enter__(self) -> "StopVote":
        if self._signal is not None:
            self._previous_handler = signal.signal(self._signal, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        if self._signal is not None:
            signal.signal(self._signal, self._previous_handler)
        self._group = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def reason(self, iteration: int) -> str | None:
        """Why training stops after `iteration`, in Megatron's words, or None to go on. A collective over all ranks."""
        config = self.config
        if self._voting:
            minutes = (time.monotonic() - self._start) / 60.0
            limit = config.exit_duration_in_mins
            signalled, out_of_time = self._vote(self._received, limit is not None and minutes > limit)
            if signalled:
                return f"exiting program after receiving {config.exit_signal}."
            if out_of_time:
                return f"exiting program after {minutes:.1f} minutes"
        if config.exit_interval and iteration % config.exit_interval == 0:
            return f"exiting program at iteration {iteration}"
        return None

    def _vote(self, *mine: bool) -> list[bool]:
        """For each question, whether any rank answers yes."""
        ballot = torch.tensor(mine, dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(answer) for answer in ballot.tolist()]
