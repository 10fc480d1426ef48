"""Texts out of files: JSON lines, plain text and Parquet, named one by one, by pattern or by folder."""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers.megatron_tokenizer import require_package

BATCH_BYTES = 1 << 18
"""Text handed to a process at a time."""

READ_BYTES = 1 << 16
"""Of a zstd file at a time."""

ROWS_READ = 256
"""Rows of a Parquet file read, and handed to a process, at a time."""

TXT_DOCUMENTS = ("file", "line", "paragraph")
"""The documents of a .txt file: all of it, each line, or the lines between blank ones."""

COMPRESSED = ("", ".gz", ".zst")
ENDINGS = (*(kind + end for kind in (".jsonl", ".json", ".ndjson", ".txt") for end in COMPRESSED), ".parquet")
"""Names taken from a folder; a file named by itself may have any name and holds JSON lines then."""

UTF8_MARK = b"\xef\xbb\xbf"
KEYS_SHOWN = 20


class Record(NamedTuple):
    """One document as it was read.

    Attributes:
        number: of its first line, or of its row, counted from 1.
        content: a line of JSON, or texts by name; a piece of plain text is named `text`.
    """

    number: int
    content: bytes | dict[str, Any]


class Batch(NamedTuple):
    """Consecutive records of one file, their size as text, and the bytes on disk that reading them took."""

    path: str
    records: list[Record]
    text_bytes: int
    file_bytes: int


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """The files that names, patterns and folders stand for, in the order given; of a pattern or folder, sorted.

    Raises:
        ConfigError: one of them stands for no file.
    """
    found: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ConfigError(f"--input {pattern!r} matches no file; write a file, a folder, or a pattern in quotes.")
        several = (_files_of(match) if os.path.isdir(match) else [match] for match in matches)
        files = [os.path.normpath(file) for one in several for file in one]
        if not files:
            raise ConfigError(
                f"--input {pattern!r} is a folder without a file whose name ends in {', '.join(ENDINGS)}; rename the "
                "files, or name them themselves."
            )
        found += dict.fromkeys(files)  # a/** stands for folders and for the files in them
    return found


def _files_of(folder: str) -> list[str]:
    """The files of text in a folder and those in it, sorted; hidden ones are passed over, links are followed.

    Raises:
        ConfigError: a folder cannot be read.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(place)
        # A link to a folder above would be followed without end.
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        found += [os.path.join(place, name) for name in names if name.endswith(ENDINGS) and not name.startswith(".")]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise ConfigError(f"the folder {error.filename!r} cannot be read: {error.strerror}.") from error


def read_batches(
    path: str, keys: Sequence[str] = ("text",), txt_documents: str = "file", batch_bytes: int = BATCH_BYTES
) -> Iterator[Batch]:
    """The documents of a file in batches of about `batch_bytes` bytes, blank ones left out.

    Args:
        path: the file; its name says what it is.
        keys: columns of a Parquet file to read.
        txt_documents: one of TXT_DOCUMENTS, for a .txt file.
        batch_bytes: size of a batch, not for Parquet.

    Raises:
        ConfigError: the file is broken or lacks a column, or the package that reads it is missing.
    """
    if path.endswith(".parquet"):
        yield from _read_parquet(path, keys)
        return
    kind = txt_documents if path.removesuffix(".gz").removesuffix(".zst").endswith(".txt") else "json"
    with open(path, "rb") as raw:
        records: list[Record] = []
        line, size, position = 0, 0, 0
        stream = _decompressed(raw, path)  # held, since it closes the file when it goes
        try:
            for record, record_bytes in _records(stream, kind):
                records.append(record)
                line, size = record.number, size + record_bytes
                if size >= batch_bytes:
                    here = raw.tell()
                    yield Batch(path, records, size, here - position)
                    records, size, position = [], 0, here
        except (EOFError, OSError, zlib.error) as error:
            raise ConfigError(f"{path}:{line + 1}: the file is broken after this line: {error}") from error
        if records or raw.tell() > position:
            yield Batch(path, records, size, raw.tell() - position)


def members_of(record: Record) -> dict[str, Any]:
    """The texts of a record, and whatever else is in it, by name.

    Raises:
        ValueError: it is no JSON object.
        RecursionError: it is nested too deeply.
    """
    if isinstance(record.content, dict):
        return record.content
    try:
        members = json.loads(_decoded(record.content))
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        what = error.msg.removesuffix(" at")
        raise ValueError(
            f"this is no JSON: {what} at character {error.pos}, in {near!r}; each line must be one JSON object"
        ) from error
    if not isinstance(members, dict):
        raise ValueError(f'expected a JSON object such as {{"text": "..."}}, found {_shown(members)}')
    return members


def texts_of(members: dict[str, Any], key: str) -> list[str]:
    """The text, or list of texts, under a key.

    Raises:
        ValueError: there is none, or it is something else, or has characters that UTF-8 does not have.
    """
    if key not in members:
        known = ", ".join(map(repr, list(members)[:KEYS_SHOWN])) or "none"
        more = f" and {len(members) - KEYS_SHOWN} more" if len(members) > KEYS_SHOWN else ""
        raise ValueError(f"there is no member {key!r}, only {known}{more}; name another with --json-keys")
    value = members[key]
    return [_text(text, key) for text in (value if isinstance(value, list) else [value])]


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = text[error.start : error.end]
        raise ValueError(f"byte {error.start}, {wrong!r}, is no UTF-8 ({error.reason}); convert to UTF-8") from error


def _text(value: Any, key: str) -> str:
    if isinstance(value, bytes):
        return _decoded(value)
    if not isinstance(value, str):
        raise ValueError(f"the member {key!r} must be a text or a list of texts, but is or holds {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the member {key!r} is {value[error.start]!r}, half a surrogate pair, which is "
            "no character by itself; write both halves"
        ) from error
    return value


def _shown(value: Any) -> str:
    """A value as JSON, cut short."""
    text = json.dumps(value, default=repr)
    return f"{text[:40]}{'...' if len(text) > 40 else ''} ({type(value).__name__})"


def _records(lines: Iterable[bytes], kind: str) -> Iterator[tuple[Record, int]]:
    """The documents that lines make up, with their sizes in bytes."""
    first = 1
    collected: list[bytes] = []
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(UTF8_MARK)
        blank = not line.strip()
        if kind == "json":
            if not blank:
                yield Record(number, line), len(line)
        elif kind == "file" or (kind == "paragraph" and not blank):
            first = first if collected else number
            collected.append(line)
        elif not blank:
            yield _plain(number, line.rstrip(b"\r\n"))
        elif collected:
            yield _plain(first, b"".join(collected).rstrip(b"\r\n"))
            collected = []
    text = b"".join(collected)
    if text.strip():
        yield _plain(first, text if kind == "file" else text.rstrip(b"\r\n"))


def _plain(number: int, text: bytes) -> tuple[Record, int]:
    return Record(number, {"text": text}), len(text)


def _read_parquet(path: str, keys: Sequence[str]) -> Iterator[Batch]:
    """The rows of a Parquet file, of these columns alone."""
    arrow = require_package("pyarrow", f"reading {path}", extra="data")
    parquet = require_package("pyarrow.parquet", f"reading {path}", extra="data")
    size, row, position = os.path.getsize(path), 0, 0
    try:
        # Without threads of its own, so that the processes that tokenize can be forked.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            missing = [key for key in keys if names.count(key) != 1]
            if missing and missing[0] in names:
                raise ConfigError(f"{path}: there are several columns {missing[0]!r}; rename all except one.")
            if missing:
                known = ", ".join(map(repr, names)) or "none"
                raise ConfigError(
                    f"{path}: there is no column {missing[0]!r}, only {known}; name another with --json-keys."
                )
            total = max(file.metadata.num_rows, 1)
            for rows in file.iter_batches(ROWS_READ, columns=list(keys), use_threads=False):
                columns = {key: _column(rows.column(key), arrow) for key in keys}
                records = [
                    Record(row + at + 1, {key: values[at] for key, values in columns.items()})
                    for at in range(rows.num_rows)
                ]
                row += rows.num_rows
                here = size * row // total
                yield Batch(path, records, rows.nbytes, here - position)
                position = here
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: the file is no Parquet or broken after row {row}: {error}") from error


def _column(column: Any, arrow: Any) -> list[Any]:
    """The values of a column; texts that are no UTF-8 stay bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(arrow.binary()).to_pylist()


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    if path.endswith(".zst"):
        zstandard = require_package("zstandard", f"reading {path}", extra="data")
        return io.BufferedReader(_Zstd(raw, zstandard))
    return raw


class _Zstd(io.RawIOBase):
    """The bytes of a zstd stream of any number of frames; a last frame that is cut short is an error, as with gzip.

    Raises:
        EOFError: the last frame is cut short.
        OSError: the stream is damaged.
    """

    def __init__(self, raw: IO[bytes], zstandard: Any) -> None:
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._raw.read(READ_BYTES)
            if not chunk and self._frame is not None:
                raise EOFError("the last frame is cut short")
            if not chunk:
                return 0
            try:
                self._ready = memoryview(b"".join(self._decompressed(chunk)))
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompressed(self, chunk: bytes) -> Iterator[bytes]:
        while chunk:
            frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            self._frame, chunk = (None, frame.unused_data) if frame.eof else (frame, b"")
