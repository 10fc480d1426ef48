"""The store through which the ranks of a run find each other, one for each attempt.

torchrun keeps one store for all attempts of a run: after a rank has died, the ranks that are started again find in it
where the dead ones listened. So each attempt keeps to keys of its own, under a number that its ranks agree on here.
TORCHELASTIC_RESTART_COUNT is not that number: each node's agent counts the deaths among its own ranks only.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_S = (0.02, 1.0)
_attempt = 0


def current_attempt() -> int:
    """The number that the ranks of this attempt agreed on; 0 where nothing had to be agreed on."""
    return _attempt


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
    """Return a number that all ranks that are running now get, and that no earlier attempt used.

    Rank 0 counts up. The others may read the count before it does, and find an older number and everything that older
    ranks left under it. So each writes under the number a word that nobody else knows, and believes the number when
    rank 0 has repeated that word.

    Raises:
        DistStoreError: not all ranks came within `timeout`.
    """
    others = range(1, world_size)
    if rank == 0:
        number = store.add("number", 1)
        words = [f"{number}/word of {other}" for other in others]
        if words:
            store.wait(words, timeout)
        for other, word in zip(others, words, strict=True):
            store.set(f"{number}/repeated to {other}", store.get(word).decode())
        return number
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    pause, number = _POLL_S[0], -1
    while time.monotonic() < deadline:
        newest = store.add("number", 0)
        if newest != number:
            number = newest
            store.set(f"{number}/word of {rank}", mine)
        repeated = f"{number}/repeated to {rank}"
        if store.check([repeated]) and store.get(repeated).decode() == mine:
            return number
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S[1])
    raise dist.DistStoreError(f"rank {rank} heard nothing of rank 0 within {timeout.total_seconds():.0f} s")
