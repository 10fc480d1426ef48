"""The worker pool: results, failures and hangs arrive as they should."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.pool import WorkerError, WorkerPool


def sum_of_ranks(rank: int, world_size: int, offset: int) -> torch.Tensor:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return total


def fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def hang_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_each_rank_returns_its_result(pool: WorkerPool) -> None:
    for world_size in (1, 2, 3):
        expected = sum(range(world_size)) + 5 * world_size
        assert [int(value) for value in pool.run(sum_of_ranks, 5, world_size=world_size)] == [expected] * world_size


def test_a_failure_is_raised_with_its_traceback_and_the_pool_survives(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank one is unwell"):
        pool.run(fail_on_rank_one, world_size=2)
    assert len(pool.run(sum_of_ranks, 0, world_size=2)) == 2


def test_a_hang_ends_in_a_timeout_and_the_pool_survives(pool: WorkerPool) -> None:
    pool.run(sum_of_ranks, 0, world_size=2)  # the workers are up: the limit is for the hang alone
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        pool.run(hang_on_rank_one, world_size=2, timeout_s=5.0)
    assert len(pool.run(sum_of_ranks, 0, world_size=2)) == 2
