"""A watchdog for runs that hang: it says where each rank is, and ends the run so that it can be started again.

A rank that waits for another one, or for a disk, stands at one line of Python. A thread looks where its rank stands
every second, which costs the training nothing. When that has not changed for long, all ranks write down where they are,
one of them prints it, and all end. Nothing is told of in advance: the iteration, the phase and the group that a
collective is waiting for are read off the stack.

The same thread ends a rank whose torchrun has died. Nothing else would end it.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import CodeType, FrameType

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store, TCPStore

from megatron_lite import parallel_state, rendezvous
from megatron_lite.arguments import RunConfig
from megatron_lite.launcher import started_by_torchrun, torchrun_is_gone
from megatron_lite.training.hooks import Hook

STATUS = 3
"""Exit status of the ranks of a run that hung."""
SHARE_OF_TIMEOUT = 0.8
"""Of --distributed-timeout-minutes: earlier than the collectives give up, each with a message of its own."""
_PACKAGE = str(Path(__file__).resolve().parents[1])
_PHASES = {
    "next_global_batch": "reading data",
    "forward_backward": "forward and backward",
    "finalize_model_grads": "summing gradients",
    "train_step": "updating weights",
    "evaluate": "evaluating",
    "save_checkpoint": "saving a checkpoint",
    "load_checkpoint": "loading a checkpoint",
    "read_metrics": "reading metrics",
    "assemble": "building the datasets",
}
_GROUPS = ("tp", "cp", "pp", "ep", "expt_tp", "tp_ep", "tp_cp", "dp", "dp_cp", "expt_dp", "tp_dp_cp", "mp")


def watch(config: RunConfig) -> "Watchdog | None":
    """A watchdog for a run of several ranks, or one that torchrun started; None for a process alone."""
    if config.world_size > 1:
        return Watchdog(SHARE_OF_TIMEOUT * 60.0 * config.distributed.distributed_timeout_minutes)
    return Watchdog(math.inf) if started_by_torchrun() else None


class Watchdog(Hook):
    """Watches the thread that made it.

    Args:
        timeout_s: seconds at one place after which the run hangs.
        store: where ranks write down where they are; default a connection of its own to that of torch.distributed.
        interval_s: seconds between two looks.
        grace_s: seconds in which the other ranks may answer.
    """

    def __init__(
        self, timeout_s: float, store: Store | None = None, interval_s: float = 1.0, grace_s: float = 5.0
    ) -> None:
        self.timeout_s, self.interval_s, self.grace_s = timeout_s, interval_s, grace_s
        self.iteration = 0
        self._store = own_store() if store is None else store
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def before_step(self, iteration: int) -> None:
        """Remember it for the report."""
        self.iteration = iteration

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join(timeout=2 * self.interval_s)

    def _watch(self) -> None:
        place: tuple[tuple[CodeType, int], ...] = ()
        since = time.monotonic()
        looks = 0
        while not self._closed.wait(self.interval_s):
            if torchrun_is_gone():
                self._end_orphan()
            now = self._place()
            if now != place:
                place, since = now, time.monotonic()
            looks += 1
            stuck = time.monotonic() - since > self.timeout_s
            # A rank that is busy itself, and makes others wait, hears it from them.
            if stuck or (looks % 10 == 0 and self._is_alarmed()):
                self._end(stuck)

    def _place(self) -> tuple[tuple[CodeType, int], ...]:
        """Every function on the stack of the watched thread, and how far each is."""
        return tuple((frame.f_code, frame.f_lasti) for frame in _frames(sys._current_frames().get(self._watched)))

    def _is_alarmed(self) -> bool:
        try:
            return self._store is not None and self._store.check(["alarm"])
        except RuntimeError:  # the rank that keeps the store has gone; others will notice that
            return False

    def _end_orphan(self) -> None:
        """End without a word from torchrun: it may have been started again, and its new ranks write the same files."""
        with suppress(OSError):  # whoever read this rank's output may have gone too
            rank = os.environ.get("RANK", "0")
            text = f"rank {rank}: torchrun, which started this rank, is gone; the rank ends with status {STATUS}\n"
            os.write(sys.stderr.fileno(), text.encode())
        os._exit(STATUS)

    def _end(self, stuck: bool) -> None:
        """Write down where this rank is, print what all of them wrote if this rank is the first to, and end."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        where = describe_stack(sys._current_frames(), self._watched, self.iteration)
        places, is_first = {rank: where}, True
        try:
            if self._store is not None:
                self._store.set(f"rank {rank}", where if stuck else f"{where}, not at one place for long")
                is_first = self._store.add("alarm", 1) == 1
                time.sleep(self.grace_s)
                there = [number for number in range(size) if self._store.check([f"rank {number}"])]
                places = {number: self._store.get(f"rank {number}").decode() for number in there}
        except RuntimeError as error:
            places[rank] = f"{where}; the other ranks do not answer ({str(error).splitlines()[0]})"
        if is_first:
            print(report(places, size, self.timeout_s), file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr)
        time.sleep(self.grace_s if is_first else 2 * self.grace_s)  # the report first, then the end
        os._exit(STATUS)


def report(places: Mapping[int, str], world_size: int, seconds: float) -> str:
    """The places of all ranks, equal ones told once."""
    ranks_at: dict[str, list[int]] = {}
    for rank in range(world_size):
        ranks_at.setdefault(places.get(rank, "no answer: stopped, dead, or unreachable"), []).append(rank)
    lines = [f"THE RUN HANGS: a rank has not moved for {seconds:.0f} s. Where the ranks are:"]
    for place, ranks in ranks_at.items():
        shown = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)} in all)" if len(ranks) > 8 else "")
        lines.append(f"  rank{'s' if len(ranks) > 1 else ''} {shown}: {place}")
    lines.append(
        f"Who waits for a group waits for a rank of it that is somewhere else. All end with status {STATUS}. Under "
        "torchrun --max-restarts N the run goes on from its last checkpoint, with --load."
    )
    return "\n".join(lines)


def describe_stack(frames: Mapping[int, FrameType], watched: int, iteration: int) -> str:
    """Where a rank is: iteration, phase, the innermost line of this package, and a group that it waits for."""
    stack = list(_frames(frames.get(watched)))
    # A backward pass on a GPU runs in threads of torch.
    others = [list(_frames(frame)) for thread, frame in frames.items() if thread != watched]
    deeper = [other for other in others if any(frame.f_code.co_name == "backward" for frame in other)]
    innermost = max([stack, *deeper], key=lambda found: sum(map(_is_ours, found)))
    names = [frame.f_code.co_name for frame in stack]
    phase = next((_PHASES[name] for name in names if name in _PHASES), "between steps")
    line = next((frame for frame in innermost if _is_ours(frame)), None)
    place = "" if line is None else f", at {os.path.relpath(line.f_code.co_filename, _PACKAGE)}:{line.f_lineno}"
    place += "" if line is None else f" ({line.f_code.co_name})"
    group = next((group for frame in innermost for group in _groups_of(frame)), None)
    waits = "" if group is None else f", waiting for {describe_group(group)}"
    return f"iteration {iteration}, {phase}{place}{waits}"


def describe_group(group: ProcessGroup) -> str:
    """Its name, and its ranks."""
    ranks = dist.get_process_group_ranks(group)
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    names = [name for name in _GROUPS if parallel_state.is_initialized() and parallel_state.get_group(name) is group]
    return f"the group {names[0] if names else group.group_name} of ranks {shown}"


def own_store() -> Store | None:
    """A second connection to the store of torch.distributed, under a prefix; None for a single process.

    The first one is in use while a collective is set up, and then answers nobody.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or "MASTER_PORT" not in os.environ:
        return None
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
    )
    return dist.PrefixStore(f"watchdog {rendezvous.current_attempt()}", store)


def _frames(innermost: FrameType | None) -> Iterator[FrameType]:
    """A stack from the innermost function outwards."""
    while innermost is not None:
        yield innermost
        innermost = innermost.f_back


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_PACKAGE)


def _groups_of(frame: FrameType) -> Iterator[ProcessGroup]:
    """Process groups of several ranks among the local variables of a function of this package, or of torch."""
    for value in list(frame.f_locals.values()):
        if isinstance(value, ProcessGroup) and value.size() > 1:
            yield value
