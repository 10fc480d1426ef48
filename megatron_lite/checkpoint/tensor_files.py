"""The tensors of a checkpoint folder, written and read by torch.distributed.checkpoint (DCP)."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta

from megatron_lite.checkpoint.agreement import Failure, agreed, failure, gathered, world
from megatron_lite.checkpoint.checksums import Checksums, checksums_of
from megatron_lite.checkpoint.safe_reader import METADATA, SafeFileSystemReader


def write_tensors(
    what: str,
    folder: Path,
    tensors: dict[str, Tensor],
    group: ProcessGroup | None = None,
    make: Callable[[str], Tensor] | None = None,
) -> Checksums:
    """Write each rank's part of the tensors, replicas once, and make the files durable. Collective over the world.

    Args:
        what: the step in words, for the message.
        folder: an empty folder that every rank sees.
        tensors: by global name; ranks may hold different names.
        group: of all ranks, for a thread that must not meet the collectives of training; default the world.
        make: name -> tensor, asked when that tensor is written; those in `tensors` then are on the meta device, and
            each has a file of its own, so that one at a time is in memory.

    Returns:
        The checksums of all files that were written, on every rank.

    Raises:
        CheckpointError: on every rank, with the ranks that failed and why.
    """
    # Flat names need no mapping back to nested dictionaries, which DCP would add to the metadata.
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False) if make is None else _Maker(make)
    writer = _Writer(folder, single_file_per_rank=make is None)
    if not any(tensor.device.type == "cuda" for tensor in tensors.values()):
        # Nothing to copy from a GPU: for that DCP waits for the stream, or makes a context where the run uses no GPU.
        writer.per_thread_copy_ahead = 0
    rank, size = world()
    with _plain_dcp(what):
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=size == 1)
    own = sorted(path.name for path in folder.glob(f"__{rank}_*")) + [METADATA] * (rank == 0)
    parts = gathered(agreed(what, lambda: checksums_of(folder, own), group), group)
    return {name: checksum for part in parts for name, checksum in part.items()}


def read_tensors(reader: SafeFileSystemReader, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place, each rank its own part. Collective over the world.

    Raises:
        CheckpointError: on every rank, with the ranks that failed and why; a DamagedCheckpointError if the bytes that
            are there do not make tensors.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with _plain_dcp(f"Reading {reader.folder}", reading=True):
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=world()[1] == 1)


class _Maker(dcp.DefaultSavePlanner):
    """DCP's planner, of tensors that are made when they are written."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor to write."""
        return self._make(index.fqn)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer of a folder; its metadata names no path of this machine, since the folder is renamed."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


@contextmanager
def _plain_dcp(what: str, reading: bool = False) -> Iterator[None]:
    """DCP without its remarks on a single process, and with failures of any rank told as a CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = {rank: Failure.of(cause) for rank, (cause, _) in error.failures.items()}
        if reading:
            failures = {
                rank: one._replace(is_damage=one.is_damage or _means_damage(error.failures[rank][0]))
                for rank, one in failures.items()
            }
        raise failure(what, failures) from error


def _means_damage(error: BaseException) -> bool:
    """Whether what went wrong while tensors were read comes from the bytes, rather than from this machine."""
    own_words = isinstance(error, RuntimeError) and type(error) is not RuntimeError
    return not own_words and not isinstance(error, PermissionError | MemoryError)
