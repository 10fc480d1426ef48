"""Reading checkpoints of torch.distributed.checkpoint (DCP) without unpickling objects.

DCP describes the tensors of a checkpoint in a file `.metadata`, which is a pickle, and its own reader hands that file
to `pickle.load`: opening a stranger's checkpoint would run the stranger's code. Here the pickle is read as a mere
notation for data: only the names that DCP writes are known, none of them is looked up in its module, each becomes an
inert record, and the metadata is then built from the records, every field checked.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan

from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_lite.checkpoint.inert_pickle import Record, read_inert

METADATA = ".metadata"
_RECORDS = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class SafeFileSystemReader(FileSystemReader):
    """DCP's reader of a folder, with metadata that was read safely and files that are checked before use.

    Tensors are read by DCP with `torch.load(weights_only=True)`; entries of any other kind are refused.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.folder = Path(folder)
        self.metadata = read_metadata(self.folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata read at construction."""
        return self.metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check that the files this rank needs are there, and as long as the metadata says."""
        ends: dict[str, int] = {}
        for item in plan.items:
            entry = self.storage_data[item.storage_index]
            ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
        for name, end in ends.items():
            path = self.folder / name
            if not path.is_file():
                raise DamagedCheckpointError(
                    f"{path} is missing: the checkpoint is not complete, or not visible from here."
                )
            size = path.stat().st_size
            if size < end:
                raise DamagedCheckpointError(
                    f"{path} ends at byte {size}, but its tensors reach to byte {end}: truncated."
                )
        return plan


def read_metadata(folder: str | os.PathLike[str], *, with_bytes: bool = False) -> Metadata:
    """The names, shapes and places of a checkpoint's tensors.

    Args:
        folder: of the checkpoint.
        with_bytes: whether there may be other things beside tensors, as Megatron-LM stores them. Of entries that are
            mere bytes the places are then told too, in `storage_data`; what else there is, is passed over.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but the description of tensors.
    """
    path = Path(folder) / METADATA
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{path} is missing: {folder} is not a checkpoint, or not a complete one."
        ) from error
    try:
        return _metadata(read_inert(content, None if with_bytes else _RECORDS), with_bytes)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:
        raise DamagedCheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _metadata(record: Any, with_bytes: bool) -> Metadata:
    state = _state(record, "Metadata")
    tensors = {
        _text(name): _tensor(name, entry)
        for name, entry in _mapping(state["state_dict_metadata"])
        if not (with_bytes and type(entry).__name__ == "BytesStorageMetadata")
    }
    storage = {_index(index): _storage(info) for index, info in _mapping(state["storage_data"])}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in storage:
                raise CheckpointError(f"the part of {name} at {list(chunk.offsets)} is in no file")
    return Metadata(state_dict_metadata=tensors, storage_data=storage, storage_meta=StorageMeta())  # type: ignore[arg-type]


def _tensor(name: str, record: Any) -> TensorStorageMetadata:
    state = _state(record, "TensorStorageMetadata")
    size = _size(state["size"])
    chunks = []
    for entry in _typed(state["chunks"], list):
        chunk = _state(entry, "ChunkStorageMetadata")
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        if not len(offsets) == len(sizes) == len(size) or any(
            offset + length > limit for offset, length, limit in zip(offsets, sizes, size, strict=True)
        ):
            raise CheckpointError(f"a part of {name} lies outside its shape {list(size)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise CheckpointError(f"the parts of {name} do not add up to its shape {list(size)}")
    properties = _typed(_record(state["properties"], "TensorProperties").state, tuple)
    return TensorStorageMetadata(TensorProperties(dtype=_typed(properties[0], torch.dtype)), size, chunks)


def _index(record: Any) -> MetadataIndex:
    state = _state(record, "MetadataIndex")
    offset = state.get("offset")
    index = state.get("index")
    return MetadataIndex(
        _text(state["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else _typed(index, int),
    )


def _storage(record: Any) -> _StorageInfo:
    state = _state(record, "_StorageInfo")
    name = _text(state["relative_path"])
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(f"it points at {name!r}, which is not a file of this folder")
    if state.get("transform_descriptors"):
        raise CheckpointError(f"{name} is transformed by {state['transform_descriptors']!r}, which is not supported")
    offset, length = _typed(state["offset"], int), _typed(state["length"], int)
    if offset < 0 or length < 0:
        raise CheckpointError(f"it points at bytes {offset} to {offset + length} of {name}")
    return _StorageInfo(name, offset, length)


def _size(record: Any) -> torch.Size:
    values = _typed(_record(record, "Size").arguments[0], (tuple, list))
    if any(type(value) is not int or value < 0 for value in values):
        raise CheckpointError(f"{values!r} is not a shape")
    return torch.Size(values)


def _record(value: Any, name: str) -> Record:
    if not isinstance(value, Record) or type(value).__name__ != name:
        kind = type(value).__name__
        raise CheckpointError(f"a {kind} stands where a {name} should: not a checkpoint of tensors alone")
    return value


def _state(value: Any, name: str) -> dict[str, Any]:
    return _typed(_record(value, name).state, dict)


def _mapping(value: Any) -> list[tuple[Any, Any]]:
    return list(_typed(value, dict).items())


def _text(value: Any) -> str:
    return _typed(value, str)


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"a {type(value).__name__} stands where another kind of value should")
    return value


def tensor_shapes(metadata: Metadata) -> dict[str, torch.Size]:
    """The global shape of each tensor of a checkpoint by name."""
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
