"""Batches for one data parallel rank, prefetched by worker processes."""

import atexit
import functools
import signal
from collections.abc import Collection, Sequence, Sized
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from megatron_lite.datasets.samplers import MegatronPretrainingRandomSampler, MegatronPretrainingSampler
from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import computes_on_gpu

DATALOADER_TYPES = ("single", "cyclic")


def build_pretraining_data_loader(
    dataset: torch.utils.data.Dataset[Any] | None,
    consumed_samples: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    dataloader_type: str = "single",
    num_workers: int = 0,
    exit_signals: Sequence[signal.Signals] = (),
) -> torch.utils.data.DataLoader[Any] | None:
    """A loader of micro-batches that begins after `consumed_samples` samples of the whole run.

    The batches, dicts of [b, ...] tensors, are the same for every number of workers. They lie in pinned memory in
    a run on a GPU.

    Args:
        dataset: what to load; None or an empty one gives None.
        consumed_samples: samples read before, by all ranks together.
        micro_batch_size: b, the samples of a batch.
        data_parallel_rank: this rank. Ranks that differ in tensor, context or pipeline position alone pass the same.
        data_parallel_size: number of such ranks.
        dataloader_type: "single" reads the dataset in order and ends with it, "cyclic" in random orders without end.
        num_workers: processes that prepare batches; 0 prepares them in this one.
        exit_signals: those the training process answers by saving; the workers leave them to that process.

    Raises:
        ConfigError: another `dataloader_type`, or nothing left to read.
    """
    num_samples = 0 if dataset is None else len(cast(Sized, dataset))
    if dataset is None or num_samples == 0:
        return None
    sampler: MegatronPretrainingSampler | MegatronPretrainingRandomSampler
    position = (num_samples, consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
    if dataloader_type == "single":
        sampler = MegatronPretrainingSampler(*position)
    elif dataloader_type == "cyclic":
        sampler = MegatronPretrainingRandomSampler(dataset, *position)
    else:
        raise ConfigError(f"dataloader_type is {dataloader_type!r}, but must be one of: {', '.join(DATALOADER_TYPES)}.")
    return _PretrainingDataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=computes_on_gpu(),
        persistent_workers=num_workers > 0,
        # The seed of the workers, which draw nothing. Without a generator of its own the loader would take it from the
        # training's stream, and a resumed run, which makes a new loader, would differ from an uninterrupted one.
        generator=torch.Generator(),
        worker_init_fn=functools.partial(_leave_signals_to_trainer, exit_signals) if num_workers > 0 else None,
    )


class _PretrainingDataLoader(torch.utils.data.DataLoader[Any]):
    """A DataLoader whose worker processes never keep the training process from ending."""

    _workers_known: list[BaseProcess] | None = None

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        workers = getattr(iterator, "_workers", [])
        if workers and workers is not self._workers_known:  # those of the first iterator stay for the next ones
            self._workers_known = workers
            atexit.register(_kill, workers)
        return iterator


def _kill(workers: Collection[BaseProcess]) -> None:
    """End what is left of the workers when the interpreter exits.

    Without errors the loader has ended them by then. After one, multiprocessing would send each a SIGTERM, which they
    may ignore, and wait for it without limit.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a worker that is killed
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _leave_signals_to_trainer(exit_signals: Sequence[signal.Signals], worker_id: int) -> None:
    """A signal sent to the whole job must not end the workers before the training process has saved."""
    for one in (signal.SIGINT, *exit_signals):
        signal.signal(one, signal.SIG_IGN)
