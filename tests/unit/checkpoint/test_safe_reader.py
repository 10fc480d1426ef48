"""Hostile and damaged `.metadata` files: a clear error, and nothing runs."""

import collections
import contextlib
import copyreg
import os
import pickle
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_lite.checkpoint import CheckpointError
from megatron_lite.checkpoint.safe_reader import METADATA, SafeFileSystemReader, read_metadata, tensor_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as stock DCP writes it."""
    save(tmp_path / "ckpt", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16)})
    return tmp_path / "ckpt"


def save(folder: Path, tensors: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)


def rewrite(folder: Path, change: Any) -> None:
    """Change the metadata as a forger would."""
    path = folder / METADATA
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


class Exploit:
    """Unpickling it creates a file; the classic way to run code."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_a_stock_checkpoint_reads_with_names_shapes_and_values(folder: Path) -> None:
    reader = SafeFileSystemReader(folder)
    assert tensor_shapes(reader.metadata) == {"a": torch.Size([2, 3]), "b": torch.Size([])}
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
    assert tensors["b"] == 1


@pytest.mark.parametrize("place", ["whole file", "tensor entry", "storage entry", "planner data", "state of a shape"])
def test_an_exploit_is_refused_and_does_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    proof = tmp_path / "proof"
    exploit = Exploit(os.system, f"touch {proof}")
    path = folder / METADATA
    metadata = pickle.loads(path.read_bytes())
    if place == "whole file":
        metadata = exploit
    elif place == "tensor entry":
        metadata.state_dict_metadata["a"] = exploit
    elif place == "storage entry":
        metadata.storage_data[exploit] = 1
    elif place == "planner data":
        metadata.planner_data = {"a": [exploit]}
    else:
        metadata.state_dict_metadata["a"].size = exploit
    path.write_bytes(pickle.dumps(metadata))

    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it names posix\.system.*nothing of it was run"):
        SafeFileSystemReader(folder)
    assert not proof.exists()
    pickle.loads(path.read_bytes())  # the exploit is real: plain unpickling runs it
    assert proof.exists()


@pytest.mark.parametrize(
    "call",
    [
        (eval, "1"),
        (exec, "1"),
        (getattr, "text", "join"),
        (torch.load, "x"),
        (torch.Size.numel, torch.Size((1,))),
        (collections.OrderedDict,),
        (copyreg.pickle, int, int),
        (__import__, "os"),
    ],
)
def test_no_callable_outside_the_list_is_reached(folder: Path, call: tuple[Any, ...]) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Exploit(*call)))
    with pytest.raises(CheckpointError, match="is refused"):
        read_metadata(folder)


def test_allowed_names_are_inert_records(folder: Path) -> None:
    # protocol 0, by hand: call torch.Size with a text, then set attributes on the class itself
    (folder / METADATA).write_bytes(b"ctorch\nSize\n(S'x'\ntR(dS'__class__'\nI1\nsb.")
    with pytest.raises(CheckpointError, match=r"is refused|is damaged"):
        read_metadata(folder)
    assert torch.Size([1]) == (1,)


def test_a_file_outside_the_folder_is_refused(folder: Path) -> None:
    for name in ("../secret", "/etc/passwd", "sub/file", "..", ""):

        def point_elsewhere(metadata: Any, name: str = name) -> None:
            for info in metadata.storage_data.values():
                info.relative_path = name

        rewrite(folder, point_elsewhere)
        with pytest.raises(CheckpointError, match="not a file of this folder"):
            read_metadata(folder)


def test_entries_that_would_be_unpickled_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "ckpt", {"a": torch.ones(2), "object": {"any": object}})
    with pytest.raises(CheckpointError, match=r"is refused: it names .*BytesStorageMetadata"):
        read_metadata(tmp_path / "ckpt")


def test_missing_parts_and_wrong_bounds_are_refused(folder: Path) -> None:
    original = (folder / METADATA).read_bytes()

    def drop_chunk(metadata: Any) -> None:
        metadata.state_dict_metadata["a"].chunks.clear()

    def shrink_chunk(metadata: Any) -> None:
        metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([1, 3])

    def move_chunk(metadata: Any) -> None:
        metadata.state_dict_metadata["a"].chunks[0].offsets = torch.Size([1, 0])

    def drop_storage(metadata: Any) -> None:
        metadata.storage_data = {i: s for i, s in metadata.storage_data.items() if i.fqn != "a"}

    for change, complaint in (
        (drop_chunk, "do not add up"),
        (shrink_chunk, "do not add up"),
        (move_chunk, "outside its shape"),
        (drop_storage, "in no file"),
    ):
        (folder / METADATA).write_bytes(original)
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=complaint):
            read_metadata(folder)


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    content = (folder / METADATA).read_bytes()
    for damaged in (b"", b"\x80", content[: len(content) // 2], b"hello", content[:-1] + b"\xff", pickle.dumps({})):
        (folder / METADATA).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"\.metadata is (damaged|refused)"):
            read_metadata(folder)
    with pytest.raises(CheckpointError, match=r"\.metadata is missing.*not a complete one"):
        read_metadata(tmp_path)


def test_random_damage_never_ends_in_anything_but_a_clean_error(folder: Path) -> None:
    content = (folder / METADATA).read_bytes()
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(3):
            position = int(torch.randint(len(damaged), (), generator=generator))
            damaged[position] = int(torch.randint(256, (), generator=generator))
        (folder / METADATA).write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read_metadata(folder)


def test_a_truncated_or_missing_data_file_is_named(folder: Path) -> None:
    data = next(folder.glob("*.distcp"))
    content = data.read_bytes()
    data.write_bytes(content[:-10])
    target = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(dcp.api.CheckpointException, match=r"\.distcp ends at byte .* reach to byte"):
            dcp.load(target, storage_reader=SafeFileSystemReader(folder), no_dist=True)
        data.unlink()
        with pytest.raises(dcp.api.CheckpointException, match=r"\.distcp is missing"):
            dcp.load(target, storage_reader=SafeFileSystemReader(folder), no_dist=True)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04]r\xff\xff\xff\x00.",
        b"\x80\x04]p20000000\n.",
        b"\x80\x05\x96" + (1 << 28).to_bytes(8, "little") + b".",
    ],
    ids=["LONG_BINPUT", "PUT", "BYTEARRAY8"],
)
def test_a_short_file_cannot_ask_for_much_memory(folder: Path, content: bytes) -> None:
    (folder / METADATA).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="damaged"):
            read_metadata(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
