"""JSON lines to tokenized .bin/.idx files, in order and in bounded memory, by any number of processes."""

import gzip
import io
import json
import multiprocessing
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path, optimal_dtype
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import MegatronTokenizer, TokenizerConfig, build_tokenizer
from megatron_lite.tokenizers.megatron_tokenizer import require_package

BATCH_BYTES = 1 << 18
"""Text handed to a process at a time."""

BATCHES_IN_FLIGHT = 4
"""Batches a process may be ahead of the writer; bounds the memory."""

BAD_LINES_SHOWN = 10


@dataclass
class PreprocessConfig:
    """What to tokenize and how.

    Attributes:
        inputs: files of JSON lines; names that end in .gz or .zst are decompressed.
        output_prefix: the files become `{output_prefix}_{key}_document.bin` and `.idx`.
        tokenizer: settings of the tokenizer.
        json_keys: members of each line's object to tokenize, each into files of its own. A list of texts becomes a
            document of several sequences.
        append_eod: end each document with the tokenizer's end-of-document token.
        workers: processes that tokenize. The files do not depend on their number.
        skip_bad_lines: leave out lines that cannot be used, instead of stopping at the first.
    """

    inputs: Sequence[str]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    workers: int = 1
    skip_bad_lines: bool = False


@dataclass
class PreprocessSummary:
    """What has been done so far.

    Attributes:
        documents: lines written.
        text_bytes: bytes of JSON read, decompressed.
        file_bytes: bytes read from disk.
        bad_lines: number of lines left out.
        bad_lines_shown: the first of them, each with its place and reason.
        tokens: key -> tokens written.
        outputs: files written.
        seconds: time taken.
    """

    documents: int = 0
    text_bytes: int = 0
    file_bytes: int = 0
    bad_lines: int = 0
    bad_lines_shown: list[str] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Batch(NamedTuple):
    """Consecutive lines of one file, and how far into the file (in bytes on disk) reading them went."""

    path: str
    first_line: int
    lines: list[bytes]
    file_bytes: int


class EncodedDocument(NamedTuple):
    """The tokens of a document and the lengths of its sequences."""

    tokens: NDArray[Any]
    lengths: list[int]


class EncodedBatch(NamedTuple):
    """The documents of a batch (key -> document), and the place and reason of each line that is none."""

    documents: list[dict[str, EncodedDocument]]
    bad_lines: list[str]
    text_bytes: int
    file_bytes: int


class Encoder:
    """Tokenizes lines; each process makes one."""

    def __init__(self, config: PreprocessConfig, tokenizer: MegatronTokenizer) -> None:
        self.json_keys = config.json_keys
        self.tokenizer = tokenizer
        self.end = [tokenizer.eod] if config.append_eod else []

    def encode_batch(self, batch: Batch) -> EncodedBatch:
        """Tokenize each line of a batch. Blank lines are passed over."""
        documents, bad_lines = [], []
        for number, line in enumerate(batch.lines, batch.first_line):
            if not line.strip():
                continue
            try:
                documents.append(self._encode_line(line))
            except (ValueError, RecursionError) as error:
                bad_lines.append(f"{batch.path}:{number}: {error}")
        return EncodedBatch(documents, bad_lines, sum(map(len, batch.lines)), batch.file_bytes)

    def _encode_line(self, line: bytes) -> dict[str, EncodedDocument]:
        members = json.loads(line)
        if not isinstance(members, dict):
            raise ValueError(f"expected a JSON object, found a {type(members).__name__}")
        return {key: self._encode_text(members, key) for key in self.json_keys}

    def _encode_text(self, members: dict[str, Any], key: str) -> EncodedDocument:
        if key not in members:
            raise ValueError(f"the object has no member {key!r}, only {', '.join(map(repr, members)) or 'none'}")
        value = members[key]
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the member {key!r} is not a text but a {type(value).__name__}")
        sequences = [ids for ids in map(self.tokenizer.tokenize, texts) if len(ids)]
        if sequences:
            sequences[-1] = [*sequences[-1], *self.end]
        tokens = [token for ids in sequences for token in ids]
        return EncodedDocument(np.array(tokens, np.int32), [len(ids) for ids in sequences])


def preprocess(
    config: PreprocessConfig, progress: Callable[[PreprocessSummary], None] = lambda summary: None
) -> PreprocessSummary:
    """Tokenize all inputs into one pair of files per key.

    Nothing has its final name before everything is written.

    Args:
        config: what to do.
        progress: called with the summary so far after each batch.

    Raises:
        ConfigError: an input is missing or broken, or a line cannot be used and `skip_bad_lines` is off; names the file
            and the line.
    """
    started = time.monotonic()
    for path in config.inputs:
        if not os.path.isfile(path):
            raise ConfigError(f"There is no input file {path}.")
    tokenizer = build_tokenizer(config.tokenizer)
    os.makedirs(os.path.dirname(os.path.abspath(config.output_prefix)), exist_ok=True)
    prefixes = {key: f"{config.output_prefix}_{key}_document" for key in config.json_keys}
    dtype = optimal_dtype(tokenizer.vocab_size)
    builders = {key: IndexedDatasetBuilder(get_bin_path(prefix), dtype) for key, prefix in prefixes.items()}
    summary = PreprocessSummary()
    try:
        for batch in _encode_all(config, tokenizer):
            _count_bad_lines(batch, summary, config.skip_bad_lines)
            for document in batch.documents:
                for key, encoded in document.items():
                    builders[key].add_document(encoded.tokens, encoded.lengths)
            summary.documents += len(batch.documents)
            summary.text_bytes += batch.text_bytes
            summary.file_bytes += batch.file_bytes
            summary.tokens = {key: builder.num_tokens for key, builder in builders.items()}
            summary.seconds = time.monotonic() - started
            progress(summary)
    except BaseException:
        for builder in builders.values():
            builder.abort()
        raise
    for key, prefix in prefixes.items():
        builders[key].finalize(get_idx_path(prefix))
        summary.outputs += [get_bin_path(prefix), get_idx_path(prefix)]
    summary.seconds = time.monotonic() - started
    return summary


def _count_bad_lines(batch: EncodedBatch, summary: PreprocessSummary, skip: bool) -> None:
    if batch.bad_lines and not skip:
        raise ConfigError(f"{batch.bad_lines[0]}. Mend the line, or leave out such lines with --skip-bad-lines.")
    summary.bad_lines += len(batch.bad_lines)
    summary.bad_lines_shown += batch.bad_lines[: BAD_LINES_SHOWN - len(summary.bad_lines_shown)]


def _encode_all(config: PreprocessConfig, tokenizer: MegatronTokenizer) -> Iterator[EncodedBatch]:
    """All batches in order, encoded here or by processes."""
    batches = (batch for path in config.inputs for batch in read_batches(path))
    if config.workers <= 1:
        yield from map(Encoder(config, tokenizer).encode_batch, batches)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(config.workers, context, _start_process, (config,)) as pool:
        in_flight: deque[Future[EncodedBatch]] = deque()
        try:
            for batch in batches:
                in_flight.append(pool.submit(_encode_in_process, batch))
                if len(in_flight) >= BATCHES_IN_FLIGHT * config.workers:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            for future in in_flight:
                future.cancel()


_encoder_of_process: Encoder | None = None


def _start_process(config: PreprocessConfig) -> None:
    global _encoder_of_process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder_of_process = Encoder(config, build_tokenizer(config.tokenizer))


def _encode_in_process(batch: Batch) -> EncodedBatch:
    assert _encoder_of_process is not None
    return _encoder_of_process.encode_batch(batch)


def read_batches(path: str, batch_bytes: int = BATCH_BYTES) -> Iterator[Batch]:
    """The lines of a file in batches of about `batch_bytes` bytes.

    Raises:
        ConfigError: the file is compressed and broken, or the package that decompresses it is missing.
    """
    with open(path, "rb") as raw:
        lines: list[bytes] = []
        first_line, size, position = 1, 0, 0
        try:
            for line in _decompressed(raw, path):
                lines.append(line)
                size += len(line)
                if size >= batch_bytes:
                    here = raw.tell()
                    yield Batch(path, first_line, lines, here - position)
                    first_line, lines, size, position = first_line + len(lines), [], 0, here
        except (EOFError, OSError, zlib.error) as error:
            raise ConfigError(
                f"{path}:{first_line + len(lines)}: the file is broken after this line: {error}"
            ) from error
        if lines:
            yield Batch(path, first_line, lines, raw.tell() - position)


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    if path.endswith(".zst"):
        zstandard = require_package("zstandard", f"reading {path}")
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return _ZstdLines(reader, zstandard.ZstdError)  # type: ignore[return-value]
    return raw


class _ZstdLines(io.BufferedReader):
    """Lines of a zstd stream; its errors become OSError, as those of gzip are."""

    def __init__(self, reader: Any, error: type[Exception]) -> None:
        super().__init__(reader)
        self._error = error

    def __next__(self) -> bytes:
        try:
            return super().__next__()
        except self._error as error:
            raise OSError(str(error)) from error
