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

from megatron_lite.training_config import TrainingConfig


class StopVote:
    """Asks after each step whether any rank has a reason to stop; use as a context manager around training."""

    def __init__(self, config: TrainingConfig) -> None:
        """Prepare the vote; it costs nothing unless a signal handler or a time limit is asked for."""
        self.config = config
        self._signals = [signal.Signals[name] for name in config.exit_signal] if config.exit_signal_handler else []
        self._received: set[int] = set()
        self._start = time.monotonic()
        self._previous_handlers: list[signal._HANDLER] = []
        self._voting = bool(self._signals) or config.exit_duration_in_mins is not None
        self._group = dist.new_group(backend="gloo") if self._voting and dist.get_world_size() > 1 else None

    def __enter__(self) -> "StopVote":
        self._previous_handlers = [signal.signal(one, self._remember) for one in self._signals]
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in zip(self._signals, self._previous_handlers, strict=True):
            signal.signal(one, handler)
        self._group = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)

    def reason(self, iteration: int) -> str | None:
        """Why training stops after `iteration`, in Megatron's words, or None to go on. A collective over all ranks."""
        config = self.config
        if self._voting:
            minutes = (time.monotonic() - self._start) / 60.0
            limit = config.exit_duration_in_mins
            came = [one in self._received for one in self._signals]
            out_of_time, *received = self._vote(limit is not None and minutes > limit, *came)
            if any(received):
                return f"exiting program after receiving {self._signals[received.index(True)].name}."
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
