"""The .bin/.idx pair: byte-exact, safe to read, right beyond 2 GiB."""

import hashlib
import json
import os
import pickle
import struct
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.datasets.indexed_dataset import (
    CorruptedDatasetError,
    IndexedDataset,
    IndexedDatasetBuilder,
    optimal_dtype,
)
from megatron_lite.errors import ConfigError
from tests.unit.datasets.corpora import write_corpora

GOLDEN = json.loads((Path(__file__).parent / "megatron_golden.json").read_text())


def build(prefix: Path, documents, dtype=np.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def prefix(tmp_path):
    """Three documents: [1, 2, 3], [4], [5, 6]."""
    return build(tmp_path / "data", [[1, 2, 3], [4], [5, 6]])


def test_files_are_those_of_megatron(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpora()
    for name, expected in GOLDEN["files"].items():
        assert hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16] == expected, name


def test_every_byte_of_a_small_pair(prefix):
    assert Path(prefix + ".bin").read_bytes() == np.arange(1, 7, dtype="<u2").tobytes()
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert Path(prefix + ".idx").read_bytes() == expected


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        ("uint8", 1),
        ("int8", 2),
        ("int16", 3),
        ("int32", 4),
        ("int64", 5),
        ("float64", 6),
        ("float32", 7),
        ("uint16", 8),
    ],
)
def test_codes_of_token_types(tmp_path, dtype, code):
    assert Path(build(tmp_path / "data", [[1]], dtype) + ".idx").read_bytes()[17] == code


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.float32, np.float64, np.uint16])
def test_round_trip(tmp_path, dtype, mmap):
    documents = [[1, 2, 3], [], [4], list(range(100))]
    dataset = IndexedDataset(build(tmp_path / "data", documents, dtype), mmap=mmap)
    assert len(dataset) == 4
    assert dataset.index.dtype == np.dtype(dtype)
    for position, document in enumerate(documents):
        assert dataset[position].dtype == np.dtype(dtype)
        assert dataset[position].tolist() == document
    assert [part.tolist() for part in dataset[1:3]] == [[], [4]]
    assert dataset.get(3, 90, 3).tolist() == [90, 91, 92]
    assert dataset.get(3, 98).tolist() == [98, 99]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_no_documents_at_all(tmp_path):
    dataset = IndexedDataset(build(tmp_path / "data", []))
    assert len(dataset) == 0
    assert dataset.document_indices.tolist() == [0]


def test_documents_of_several_sequences_and_modes(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), np.int32, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), mode=1)
    builder.add_item(torch.tensor([3]), mode=0)
    builder.end_document()
    builder.add_document([4, 5, 6], [1, 2], modes=[0, 1])
    builder.finalize(str(tmp_path / "data.idx"))
    dataset = IndexedDataset(str(tmp_path / "data"), multimodal=True)
    assert dataset.document_indices.tolist() == [0, 2, 4]
    tokens, mode = dataset[3]
    assert (tokens.tolist(), int(mode)) == ([5, 6], 1)
    assert IndexedDataset(str(tmp_path / "data"))[0].tolist() == [1, 2], "modes can be left unread"


def test_appending_a_pair_equals_writing_at_once(tmp_path):
    first, second = [[1, 2], [3]], [[4], [5, 6, 7]]
    whole = build(tmp_path / "whole", first + second)
    part = build(tmp_path / "part", second)
    builder = IndexedDatasetBuilder(str(tmp_path / "joined.bin"), np.uint16)
    for document in first:
        builder.add_document(document, [len(document)])
    builder.add_index(part)
    builder.finalize(str(tmp_path / "joined.idx"))
    for extension in (".bin", ".idx"):
        assert Path(f"{tmp_path}/joined{extension}").read_bytes() == Path(whole + extension).read_bytes()


def test_other_processes_open_the_files_again(prefix):
    data = pickle.dumps(IndexedDataset(prefix))
    assert len(data) < 500
    assert pickle.loads(data)[2].tolist() == [5, 6]


def test_offsets_beyond_two_gibibytes(tmp_path):
    """Megatron's preprocessing once overflowed at 2**31 (int32 offsets)."""
    long = 2**31 - 1
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), np.int32)
    builder.sequence_lengths = array("i", [long, long, 3])
    builder.document_indices = array("q", [0, 1, 2, 3])
    builder.finalize(str(tmp_path / "data.idx"))
    with open(tmp_path / "data.bin", "wb") as file:  # a sparse file: 16 GiB that take no room
        file.seek(8 * long)
        file.write(np.array([7, 8, 9], "<i4").tobytes())
    for mmap in (True, False):
        dataset = IndexedDataset(str(tmp_path / "data"), mmap=mmap)
        assert dataset.index.sequence_pointers.tolist() == [0, 4 * long, 8 * long]
        assert dataset[2].tolist() == [7, 8, 9]
        assert dataset.get(1, long - 2, 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("position", "offset", "length"), [(0, 0, 4), (0, 2, 2), (0, -1, 1), (0, 0, -1), (3, 0, 1), (-4, 0, 1)]
)
def test_reading_outside_is_an_error(prefix, position, offset, length):
    with pytest.raises(IndexError, match="which has"):
        IndexedDataset(prefix).get(position, offset, length)


def test_an_index_cut_anywhere_is_refused(prefix):
    whole = Path(prefix + ".idx").read_bytes()
    for size in range(len(whole)):
        Path(prefix + ".idx").write_bytes(whole[:size])
        with pytest.raises(CorruptedDatasetError, match=r"data\.idx"):
            IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"NOTANIDX!", "offset 0"),
        (9, struct.pack("<Q", 2), "version 1 at offset 9, found 2"),
        (17, b"\x09", "offset 17, found 9"),
        (17, b"\x00", "offset 17, found 0"),
        (18, struct.pack("<Q", 2**62), "but the file has"),
        (18, struct.pack("<Q", 2**64 - 1), "but the file has"),
        (26, struct.pack("<Q", 3), "but the file has"),
        (34 + 36, struct.pack("<q", 1), "must begin with 0"),
        (34 + 36 + 24, struct.pack("<q", 2), "end with the number of sequences, 3"),
    ],
)
def test_hostile_headers(prefix, offset, value, message):
    content = bytearray(Path(prefix + ".idx").read_bytes())
    content[offset : offset + len(value)] = value
    Path(prefix + ".idx").write_bytes(content)
    with pytest.raises(CorruptedDatasetError, match=message):
        IndexedDataset(prefix)


def test_bytes_after_the_index_are_refused(prefix):
    with open(prefix + ".idx", "ab") as file:
        file.write(b"junk")
    with pytest.raises(CorruptedDatasetError, match="but the file has"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("pointer", [-2, 10, 2**62])
def test_pointers_outside_the_tokens(prefix, pointer, mmap):
    content = bytearray(Path(prefix + ".idx").read_bytes())
    struct.pack_into("<q", content, 34 + 12 + 16, pointer)
    Path(prefix + ".idx").write_bytes(content)
    dataset = IndexedDataset(prefix, mmap=mmap)
    assert dataset[1].tolist() == [4]
    with pytest.raises(CorruptedDatasetError, match=r"data\.bin.*sequence 2 at bytes"):
        dataset[2]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("size", [0, 9])
def test_tokens_cut_short(prefix, size, mmap):
    os.truncate(prefix + ".bin", size)
    with pytest.raises(CorruptedDatasetError, match="cut short"):
        IndexedDataset(prefix, mmap=mmap)[2]


def test_missing_files_are_named(prefix):
    os.unlink(prefix + ".bin")
    assert not IndexedDataset.exists(prefix)
    with pytest.raises(ConfigError, match=r"data\.bin"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("token", [65536, -1])
def test_tokens_that_do_not_fit_are_refused(tmp_path, token):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), np.uint16)
    with pytest.raises(ConfigError, match="do not fit uint16"):
        builder.add_document(np.array([1, token]), [2])


def test_an_unfinished_pair_has_no_name_yet(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), np.uint16)
    builder.add_document([1], [1])
    assert os.listdir(tmp_path) == ["data.bin.tmp"]
    builder.abort()
    assert os.listdir(tmp_path) == []


def test_the_smallest_type_that_megatron_would_take():
    assert optimal_dtype(65499) == np.uint16
    assert optimal_dtype(65500) == np.int32
    assert optimal_dtype(None) == np.int32
