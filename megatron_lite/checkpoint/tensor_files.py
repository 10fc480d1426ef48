"""The tensors of a checkpoint folder, written and read by torch.distributed.checkpoint (DCP)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_lite.checkpoint.agreement import describe_failures, world
from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader


def write_tensors(what: str, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write each rank's part of the tensors, replicas once, and make the files durable. Collective over the world.

    Args:
        what: the step in words, for the message.
        folder: an empty folder that every rank sees.
        tensors: by global name; ranks may hold different names.

    Raises:
        CheckpointError: on every rank, with the ranks that failed and why.
    """
    # Flat names need no mapping back to nested dictionaries, which DCP would add to the metadata.
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with _plain_dcp(what):
        dcp.save(tensors, storage_writer=_Writer(folder), planner=planner, no_dist=world()[1] == 1)


def read_tensors(reader: SafeFileSystemReader, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place, each rank its own part. Collective over the world.

    Raises:
        CheckpointError: on every rank, with the ranks that failed and why.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with _plain_dcp(f"Reading {reader.folder}"):
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=world()[1] == 1)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer of a folder; its metadata names no path of this machine, since the folder is renamed."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


@contextmanager
def _plain_dcp(what: str) -> Iterator[None]:
    """DCP without its remarks on a single process, and with failures of any rank told as a CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = {
            rank: str(cause) if isinstance(cause, CheckpointError) else f"{type(cause).__name__}: {cause}"
            for rank, (cause, _) in error.failures.items()
        }
        raise CheckpointError(describe_failures(what, failures)) from error
