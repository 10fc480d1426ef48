"""Tokenized documents on disk: Megatron's pair of a .bin file (the tokens) and an .idx file (where each piece lies).

Layout of the .idx file, little endian: 9 bytes of magic, uint64 version (1), uint8 code of the token type, uint64
number of sequences, uint64 number of document bounds; then int32 length of each sequence, int64 byte offset of each
sequence in the .bin file, int64 document bounds (the sequence at which each document begins, and one past the last),
and for multimodal data int8 mode of each sequence. The .bin file holds the tokens back to back, nothing in between.
"""

import os
import shutil
import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from megatron_lite.datasets.utils import write_whole
from megatron_lite.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

TOKEN_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
"""Code in the header -> type of a token. Codes 6 and 7 are in this order in Megatron's files."""

DTYPE_CODES = {dtype: code for code, dtype in TOKEN_DTYPES.items()}

LARGEST_UINT16_VOCABULARY = 65500
"""Vocabularies below this size are stored as uint16, others as int32 (Megatron's rule)."""


class CorruptedDatasetError(ConfigError):
    """A .bin/.idx pair that is not what it should be: names the file, the offset and what was expected."""


def optimal_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The type tokens of this vocabulary are stored in."""
    small = vocab_size is not None and vocab_size < LARGEST_UINT16_VOCABULARY
    return np.dtype(np.uint16) if small else np.dtype(np.int32)


def get_idx_path(path_prefix: str) -> str:
    """The index file of a prefix."""
    return path_prefix + ".idx"


def get_bin_path(path_prefix: str) -> str:
    """The token file of a prefix."""
    return path_prefix + ".bin"


class Index(NamedTuple):
    """The contents of an .idx file, memory-mapped."""

    dtype: np.dtype[Any]
    sequence_lengths: NDArray[np.int32]
    sequence_pointers: NDArray[np.int64]
    document_indices: NDArray[np.int64]
    sequence_modes: NDArray[np.int8] | None


def read_index(idx_path: str) -> Index:
    """Map an .idx file, having checked that its header agrees with its size.

    Raises:
        CorruptedDatasetError: not such a file, cut short, or with counts that contradict its size.
    """
    size = os.path.getsize(idx_path)
    with open(idx_path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise CorruptedDatasetError(
            f"{idx_path}: expected a header of {HEADER.size} bytes that begins with {MAGIC!r} at offset 0, found "
            f"{head[: len(MAGIC)]!r} in a file of {size} bytes. It is no .idx file or was cut short; write it again."
        )
    _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
    if version != VERSION:
        raise CorruptedDatasetError(f"{idx_path}: expected version {VERSION} at offset 9, found {version}.")
    if code not in TOKEN_DTYPES:
        raise CorruptedDatasetError(
            f"{idx_path}: expected the code of a token type ({min(TOKEN_DTYPES)} to {max(TOKEN_DTYPES)}) at offset 17, "
            f"found {code}."
        )
    lengths_at = HEADER.size
    pointers_at = lengths_at + 4 * num_sequences
    documents_at = pointers_at + 8 * num_sequences
    modes_at = documents_at + 8 * num_bounds
    if size not in (modes_at, modes_at + num_sequences):
        raise CorruptedDatasetError(
            f"{idx_path}: the header (offsets 18 and 26) tells of {num_sequences} sequences and {num_bounds} document "
            f"bounds, which make {modes_at} bytes ({modes_at + num_sequences} with modes), but the file has {size}. "
            "It was cut short or overwritten; write it again."
        )
    mapped = np.memmap(idx_path, mode="r")
    lengths = np.frombuffer(mapped, np.dtype("<i4"), num_sequences, lengths_at)
    pointers = np.frombuffer(mapped, np.dtype("<i8"), num_sequences, pointers_at)
    documents = np.frombuffer(mapped, np.dtype("<i8"), num_bounds, documents_at)
    modes = np.frombuffer(mapped, np.int8, num_sequences, modes_at) if size > modes_at else None
    if num_bounds == 0 or documents[0] != 0 or documents[-1] != num_sequences:
        found = "none" if num_bounds == 0 else f"{documents[0]} and {documents[-1]}"
        raise CorruptedDatasetError(
            f"{idx_path}: the document bounds at offset {documents_at} must begin with 0 and end with the number of "
            f"sequences, {num_sequences}; found {found}."
        )
    return Index(TOKEN_DTYPES[code], lengths, pointers, documents, modes)


class IndexedDataset(torch.utils.data.Dataset[Any]):
    """Sequences of tokens read from `<path_prefix>.bin` and `<path_prefix>.idx`.

    Opening costs the same for any size: each piece is checked when it is read. Copies in other processes open the files
    again instead of carrying the tokens over.

    Args:
        path_prefix: path of the two files without their extension.
        multimodal: the items are pairs of the tokens and the mode of the sequence.
        mmap: map the .bin file into memory; otherwise read each piece with a system call.

    Raises:
        ConfigError: a file is missing.
        CorruptedDatasetError: see `read_index`.
    """

    def __init__(self, path_prefix: str, multimodal: bool = False, mmap: bool = True) -> None:
        for path in (get_idx_path(path_prefix), get_bin_path(path_prefix)):
            if not os.path.isfile(path):
                raise ConfigError(
                    f"There is no file {path}. A dataset is named by the prefix its .bin and .idx files share; "
                    "tools/preprocess_data.py writes them."
                )
        self.path_prefix = path_prefix
        self.multimodal = multimodal
        self.mmap = mmap
        self.index = read_index(get_idx_path(path_prefix))
        if multimodal and self.index.sequence_modes is None:
            raise CorruptedDatasetError(f"{get_idx_path(path_prefix)}: expected modes at its end, it has none.")
        self._bin_path = get_bin_path(path_prefix)
        self._bin_size = os.path.getsize(self._bin_path)
        self._bin_mapped = np.memmap(self._bin_path, mode="r") if mmap and self._bin_size else None
        self._bin_descriptor = -1 if mmap else os.open(self._bin_path, os.O_RDONLY)

    def __getstate__(self) -> tuple[str, bool, bool]:
        return self.path_prefix, self.multimodal, self.mmap

    def __setstate__(self, state: tuple[str, bool, bool]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __del__(self) -> None:
        if getattr(self, "_bin_descriptor", -1) >= 0:
            os.close(self._bin_descriptor)

    @staticmethod
    def exists(path_prefix: str) -> bool:
        """Whether both files of the prefix are there."""
        return os.path.isfile(get_idx_path(path_prefix)) and os.path.isfile(get_bin_path(path_prefix))

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Tokens of each sequence, [sequences]."""
        return self.index.sequence_lengths

    @property
    def document_indices(self) -> NDArray[np.int64]:
        """First sequence of each document and one past the last, [documents + 1]."""
        return self.index.document_indices

    @property
    def sequence_modes(self) -> NDArray[np.int8] | None:
        """Mode of each sequence, [sequences], in multimodal data."""
        return self.index.sequence_modes

    def __len__(self) -> int:
        return len(self.index.sequence_lengths)

    def __getitem__(self, idx: int | np.integer[Any] | slice) -> Any:
        """The tokens of one sequence, or a list of those of a contiguous slice of sequences."""
        if isinstance(idx, slice):
            start, stop, step = idx.indices(len(self))
            if step != 1:
                raise ValueError(f"Slices of an IndexedDataset must be contiguous, got a step of {step}.")
            return [self.get(position) for position in range(start, stop)]
        return self.get(int(idx))

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Any:
        """Some tokens of one sequence.

        Args:
            idx: the sequence.
            offset: tokens to skip at its beginning.
            length: tokens to read, all that are left by default.

        Returns:
            Array of `length` tokens (a read-only view of the file when it is mapped), paired with the mode of the
            sequence in multimodal data.

        Raises:
            IndexError: no such sequence, or the piece reaches past its end.
            CorruptedDatasetError: the index points outside the .bin file.
        """
        if not -len(self) <= idx < len(self):
            raise IndexError(f"sequence {idx} of {self.path_prefix}, which has {len(self)}")
        available = int(self.index.sequence_lengths[idx])
        if available < 0:
            raise CorruptedDatasetError(
                f"{get_idx_path(self.path_prefix)}: sequence {idx} has {available} tokens; write the files again."
            )
        length = available - offset if length is None else int(length)
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(
                f"tokens {offset} to {offset + length} of sequence {idx} of {self.path_prefix}, which has {available}"
            )
        dtype = self.index.dtype
        begin = int(self.index.sequence_pointers[idx]) + offset * dtype.itemsize
        size = length * dtype.itemsize
        if begin < 0 or begin + size > self._bin_size:
            raise CorruptedDatasetError(
                f"{self._bin_path}: {get_idx_path(self.path_prefix)} places sequence {idx} at bytes {begin} to "
                f"{begin + size}, but the file has {self._bin_size}. The two files do not belong together or the .bin "
                "file was cut short; write them again."
            )
        if self._bin_descriptor >= 0:
            tokens = np.frombuffer(os.pread(self._bin_descriptor, size, begin), dtype)
        elif self._bin_mapped is None:
            tokens = np.empty(0, dtype)
        else:
            tokens = np.frombuffer(self._bin_mapped, dtype, length, begin)
        return (tokens, self.index.sequence_modes[idx]) if self.multimodal else tokens  # type: ignore[index]


class IndexedDatasetBuilder:
    """Writes a .bin/.idx pair. The files get their names in `finalize`; until then they end in `.tmp`.

    Args:
        bin_path: path of the .bin file.
        dtype: type of the stored tokens.
        multimodal: store a mode for each sequence.
    """

    def __init__(self, bin_path: str, dtype: DTypeLike = np.int32, multimodal: bool = False) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        if self.dtype not in DTYPE_CODES:
            raise ConfigError(f"Tokens cannot be stored as {self.dtype}; use uint16 or int32.")
        self.bin_path = bin_path
        self.multimodal = multimodal
        self.num_tokens = 0
        self.sequence_lengths = array("i")
        self.document_indices = array("q", [0])
        self.sequence_modes = array("b")
        self._temporary_path = f"{bin_path}.tmp"
        self._file = open(self._temporary_path, "wb", buffering=1 << 20)  # noqa: SIM115  closed by finalize or abort

    def add_item(self, tensor: torch.Tensor | NDArray[Any] | Sequence[int], mode: int = 0) -> None:
        """Append one sequence; `end_document` closes the document it belongs to."""
        self.sequence_lengths.append(self._write(tensor))
        if self.multimodal:
            self.sequence_modes.append(mode)

    def add_document(
        self,
        tensor: torch.Tensor | NDArray[Any] | Sequence[int],
        lengths: Sequence[int],
        modes: Sequence[int] | None = None,
    ) -> None:
        """Append one document made of sequences of these lengths, whose sum is the number of tokens."""
        written = self._write(tensor)
        if sum(lengths) != written:
            raise ValueError(f"a document of {written} tokens cannot have sequences of lengths {list(lengths)}")
        self.sequence_lengths.extend(lengths)
        if self.multimodal:
            self.sequence_modes.extend(modes if modes is not None else [0] * len(lengths))
        self.end_document()

    def end_document(self) -> None:
        """Close the document that the sequences since the last call make up."""
        self.document_indices.append(len(self.sequence_lengths))

    def add_index(self, path_prefix: str) -> None:
        """Append everything in another pair of files of the same token type."""
        index = read_index(get_idx_path(path_prefix))
        if index.dtype != self.dtype:
            raise ConfigError(
                f"{path_prefix} holds {index.dtype} tokens and cannot be appended to {self.dtype} tokens; "
                "tokenize it again with the same tokenizer."
            )
        offset = len(self.sequence_lengths)
        self.sequence_lengths.frombytes(index.sequence_lengths.tobytes())
        self.document_indices.frombytes((index.document_indices[1:] + offset).tobytes())
        if self.multimodal:
            if index.sequence_modes is None:
                raise CorruptedDatasetError(f"{get_idx_path(path_prefix)}: expected modes at its end, it has none.")
            self.sequence_modes.frombytes(index.sequence_modes.tobytes())
        self.num_tokens += int(index.sequence_lengths.sum(dtype=np.int64))
        with open(get_bin_path(path_prefix), "rb") as file:
            shutil.copyfileobj(file, self._file, 1 << 24)

    def finalize(self, idx_path: str) -> None:
        """Write the .idx file and give both files their names."""
        lengths = np.frombuffer(self.sequence_lengths, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary_path, self.bin_path)
        with write_whole(idx_path) as file:
            counts = (len(lengths), len(self.document_indices))
            file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype], *counts))
            for part in (lengths, pointers, np.frombuffer(self.document_indices, np.int64)):
                file.write(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
            if self.multimodal:
                file.write(self.sequence_modes.tobytes())

    def abort(self) -> None:
        """Throw away what has been written."""
        self._file.close()
        os.unlink(self._temporary_path)

    def _write(self, tokens: torch.Tensor | NDArray[Any] | Sequence[int]) -> int:
        given = tokens.numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
        if given.size and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            lowest, highest = given.min(), given.max()
            if lowest < limits.min or highest > limits.max:
                raise ConfigError(
                    f"Tokens from {lowest} to {highest} do not fit {self.dtype} ({limits.min} to {limits.max}); "
                    "the tokenizer's vocab_size is too small for the ids it gives."
                )
        self._file.write(given.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())
        self.num_tokens += given.size
        return given.size
