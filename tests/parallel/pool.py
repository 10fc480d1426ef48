"""Worker processes that stay alive across tests, so that a layout costs milliseconds, not an import of torch.

def losses(rank: int, world_size: int, tp: int) -> float: ...
pool.run(losses, 2, world_size=4)    # [loss of rank 0, ..., loss of rank 3]
"""

import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from megatron_lite import parallel_state
from megatron_lite.tensor_parallel.random import get_cuda_rng_tracker

MAX_WORKERS = 8
DEFAULT_TIMEOUT_S = 120.0
_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class WorkerError(AssertionError):
    """A function raised in a worker; the message holds its traceback."""


class _Job(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    rank: int
    world_size: int
    number: int
    timeout_s: float


class _Failure(NamedTuple):
    """What went wrong; the earliest is the cause, the others mostly lost their connection to that rank."""

    when: float
    rank: int
    traceback: str


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class WorkerPool:
    """Persistent workers, grown on demand; each call of `run` is one world of processes over gloo.

    Functions travel by name: they must be at the top level of a module. Arguments and results are pickled.
    """

    def __init__(self) -> None:
        # The server imports torch once, and every worker is forked from it.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._workers: list[_Worker] = []
        self._numbers = itertools.count()

    def run(
        self, function: Callable[..., Any], *arguments: Any, world_size: int, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[Any]:
        """Call `function(rank, world_size, *arguments)` in `world_size` processes joined by gloo.

        Returns:
            What each rank returned, by rank.

        Raises:
            WorkerError: a rank raised; the first failure's traceback and the ranks that failed.
            TimeoutError: the ranks did not finish; they are killed, after printing where they hang to stderr.
        """
        self._grow_to(world_size)
        number = next(self._numbers)
        workers = self._workers[:world_size]
        for rank, worker in enumerate(workers):
            job = _Job(function, arguments, rank, world_size, number, timeout_s)
            worker.connection.send_bytes(pickle.dumps((sys.path, pickle.dumps(job))))
        return self._collect(function.__name__, workers, timeout_s)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
        self._kill()

    def _grow_to(self, count: int) -> None:
        if count > MAX_WORKERS:
            raise ValueError(f"world_size is {count}, but the pool has at most {MAX_WORKERS} workers.")
        with mock.patch.dict(os.environ, _WORKER_ENVIRONMENT):
            while len(self._workers) < count:
                ours, theirs = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(theirs, self._store.port), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))

    def _collect(self, name: str, workers: list[_Worker], timeout_s: float) -> list[Any]:
        results: list[Any] = [None] * len(workers)
        failures: list[_Failure] = []
        pending = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout_s
        while pending:
            ready = wait(list(pending), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    answer = _Failure(0.0, rank, f"the process died with exit code {workers[rank].process.exitcode}")
                if isinstance(answer, _Failure):
                    failures.append(answer)
                    # The others fail on their next collective with this rank; they need not be waited for long.
                    deadline = min(deadline, time.monotonic() + 10.0)
                else:
                    results[rank] = answer
        if pending:
            self._show_and_kill([workers[rank] for rank in pending.values()])
        elif any(not worker.process.is_alive() for worker in workers):
            self._kill()
        if failures:
            first = min(failures)
            ranks = sorted(failure.rank for failure in failures)
            raise WorkerError(
                f"{name} failed on ranks {ranks} of {len(workers)}; first on rank {first.rank}:\n{first.traceback}"
            )
        if pending:
            raise TimeoutError(
                f"{name}: ranks {sorted(pending.values())} of {len(workers)} hung for {timeout_s:.0f} s."
            )
        return results

    def _show_and_kill(self, hanging: list[_Worker]) -> None:
        for worker in hanging:
            if worker.process.is_alive() and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers.clear()


def _serve(connection: Connection, port: int) -> None:
    """Life of a worker: jobs in, results out, until the other end closes."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            path, job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path
        connection.send_bytes(_execute(job, store))


def _execute(pickled_job: bytes, store: dist.Store) -> bytes:
    """The pickled result of a job, or its _Failure."""
    rank = -1
    try:
        job: _Job = pickle.loads(pickled_job)
        rank = job.rank
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"job{job.number}", store),
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.timeout_s),
        )
        torch.manual_seed(0)
        return pickle.dumps(job.function(job.rank, job.world_size, *job.arguments))
    except BaseException:  # whatever it is, the test that asked must see it
        return pickle.dumps(_Failure(time.monotonic(), rank, traceback.format_exc()))
    finally:
        parallel_state.destroy_model_parallel()
        get_cuda_rng_tracker().reset()
        if dist.is_initialized():
            dist.destroy_process_group()
        # Models are cycles that hold groups. Gloo's threads of a group that nobody frees wake up a hundred times a
        # second, and after some dozens of jobs that is most of what the cores do. What is left, modules and caches,
        # stays, and need not be looked through again.
        gc.collect()
        gc.freeze()
