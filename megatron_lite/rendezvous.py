"""The store through which the ranks of a run find each other, one for each attempt.

torchrun keeps one store for all attempts of a run: after a rank has died, the ranks that are started again find in it
where the dead ones listened. So each attempt keeps to keys of its own, under a number that its ranks agree on here.
TORCHELASTIC_RESTART_COUNT is not that number: each node's agent counts the deaths among its own ranks only.
"""

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_lite.launcher import torchrun_is_gone

_RANKS_SHOWN = 8
_attempt: int | None = None


def current_attempt() -> str:
    """A name for this attempt: the number its ranks agreed on, or torchrun's where somebody else made them meet."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _attempt is None else str(_attempt)


def join(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return this attempt's store, this rank and the world size, from torchrun's environment.

    Raises:
        DistStoreError: not all ranks came within `timeout`.
    """
    global _attempt
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    _attempt = agree_on_attempt(dist.PrefixStore("attempts", store), rank, world_size, timeout)
    return dist.PrefixStore(f"attempt {_attempt}", store), rank, world_size


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """Return a number that all ranks of this attempt get, and that no earlier attempt used.

    Rank 0 counts up. The others may read the count before it does, and find an older number and everything that older
    ranks left under it. So each writes under the number a word that nobody else knows, and believes the number when
    rank 0 has repeated that word. Ranks of an earlier attempt have ended: torchrun ends them, or they notice here that
    torchrun is gone.

    Raises:
        DistStoreError: not all ranks came within `timeout`, or this rank's torchrun is gone.
    """
    if rank > 0:
        return _believe(store, rank, world_size, timeout)
    number = store.add("number", 1)
    words = [f"{number}/word of {other}" for other in range(1, world_size)]
    if not words:
        return number
    if not _poll(lambda: store.check(words), world_size, timeout):
        late = [other for other, word in enumerate(words, 1) if not store.check([word])]
        shown = ", ".join(map(str, late[:_RANKS_SHOWN])) + (", ..." if len(late) > _RANKS_SHOWN else "")
        raise dist.DistStoreError(
            f"ranks {shown} ({len(late)} of {world_size}) did not come within {timeout.total_seconds():.0f} s"
        )
    answers = [f"{number}/repeated to {other}" for other in range(1, world_size)]
    store.multi_set(answers, store.multi_get(words))  # type: ignore[attr-defined]  # two messages at any size
    return number


def _believe(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """The part of a rank that is not the first."""
    mine = uuid.uuid4().hex
    number = -1

    def is_repeated() -> bool:
        nonlocal number
        newest = store.add("number", 0)
        if newest != number:
            number = newest
            store.set(f"{number}/word of {rank}", mine)
        answer = f"{number}/repeated to {rank}"
        return store.check([answer]) and store.get(answer).decode() == mine

    if not _poll(is_repeated, world_size, timeout):
        raise dist.DistStoreError(
            f"rank {rank}: not all ranks came within {timeout.total_seconds():.0f} s; rank 0 says which"
        )
    return number


def _poll(condition: Callable[[], bool], world_size: int, timeout: timedelta) -> bool:
    """Return True once the condition holds, False after `timeout`; the more ranks there are, the less often each asks.

    Raises:
        DistStoreError: this rank's torchrun is gone.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    pause, longest = 0.02, max(1.0, world_size / 2000)
    while not condition():
        if torchrun_is_gone():
            raise dist.DistStoreError("torchrun, which started this rank, is gone")
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True
