"""Attempts of one run at meeting each other, in threads over one store, as torchrun keeps it."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_lite import launcher
from megatron_lite.rendezvous import agree_on_attempt

LONG, SHORT = timedelta(seconds=20), timedelta(seconds=0.3)


def attempt(store: dist.Store, ranks: list[int], world_size: int, timeout: timedelta, late: int = -1) -> list[int]:
    """What each of `ranks` believes; -1 for one that gave up. Rank `late` comes last."""

    def one(rank: int) -> int:
        time.sleep(0.1 * (rank == late))
        try:
            return agree_on_attempt(store, rank, world_size, timeout)
        except dist.DistStoreError:
            return -1

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


@pytest.mark.parametrize("late", [0, 2])
def test_all_ranks_get_a_new_number_whatever_earlier_attempts_left(late):
    """Attempts that succeed, one that rank 2 did not live to join, and one without rank 0.

    Mutations: a rank believes the number it reads first; a word that is the same in each attempt (then a late rank 0
    leaves the others with the number before).
    """
    store = dist.HashStore()
    assert attempt(store, [0, 1, 2, 3], 4, LONG, late) == [1] * 4
    assert attempt(store, [0, 1, 3], 4, SHORT) == [-1] * 3
    assert attempt(store, [1, 2, 3], 4, SHORT) == [-1] * 3
    assert attempt(store, [0, 1, 2, 3], 4, LONG, late) == [3] * 4
    assert attempt(store, [0, 1, 2, 3], 4, LONG, late) == [4] * 4


def test_a_rank_that_died_while_it_waited_is_not_taken_for_its_successor():
    """Rank 0 dies after rank 1's word came and before it repeats it."""
    store = dist.HashStore()
    store.add("number", 1)
    assert attempt(store, [1], 2, SHORT) == [-1]
    assert attempt(store, [0, 1], 2, LONG, late=0) == [2, 2]


def test_one_process_agrees_with_itself():
    """No words to wait for."""
    assert agree_on_attempt(dist.HashStore(), 0, 1, SHORT) == 1


def test_who_did_not_come_is_named():
    """By rank 0 alone; the others point at it."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(agree_on_attempt, store, rank, 4, SHORT) for rank in (0, 1))
        with pytest.raises(dist.DistStoreError, match=r"ranks 2, 3 \(2 of 4\) did not come within 0 s"):
            first.result()
        with pytest.raises(dist.DistStoreError, match="rank 1: not all ranks came within 0 s; rank 0 says which"):
            second.result()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_torchrun_takes_no_part(monkeypatch, rank):
    """It would be taken for its successor. Mutation: no look at the parent."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(launcher, "_PARENT", -1)
    with pytest.raises(dist.DistStoreError, match="torchrun, which started this rank, is gone"):
        agree_on_attempt(dist.HashStore(), rank, 2, LONG)
