"""Text to tokenized .bin/.idx files, in order and in bounded memory, by any number of processes."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path, optimal_dtype
from megatron_lite.datasets.text_files import Batch, Record, members_of, read_batches, texts_of
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import MegatronTokenizer, TokenizerConfig, build_tokenizer

BATCHES_IN_FLIGHT = 4
"""Batches a process may be ahead of the writer; bounds the memory."""

BAD_LINES_SHOWN = 10


@dataclass
class PreprocessConfig:
    """What to tokenize and how.

    Attributes:
        inputs: files of JSON lines, .txt or .parquet; names that end in .gz or .zst are decompressed.
        output_prefix: the files become `{output_prefix}_{key}_document.bin` and `.idx`.
        tokenizer: settings of the tokenizer.
        json_keys: members of each line's object, or columns, to tokenize, each into files of its own. A list of texts
            becomes a document of several sequences. Plain text has the one member `text`.
        txt_documents: what a document of a .txt file is, see read_batches.
        append_eod: end each document with the tokenizer's end-of-document token.
        workers: processes that tokenize. The files do not depend on their number.
        skip_bad_lines: leave out lines that cannot be used, instead of stopping at the first.
    """

    inputs: Sequence[str]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: Sequence[str] = ("text",)
    txt_documents: str = "file"
    append_eod: bool = False
    workers: int = 1
    skip_bad_lines: bool = False


@dataclass
class PreprocessSummary:
    """What has been done so far.

    Attributes:
        documents: documents written.
        text_bytes: bytes read, decompressed; of Parquet those of the columns.
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
        """Tokenize each record of a batch."""
        documents, bad_lines = [], []
        for record in batch.records:
            try:
                documents.append(self._encode_record(record))
            except (ValueError, RecursionError) as error:
                bad_lines.append(f"{batch.path}:{record.number}: {error}")
        return EncodedBatch(documents, bad_lines, batch.text_bytes, batch.file_bytes)

    def _encode_record(self, record: Record) -> dict[str, EncodedDocument]:
        members = members_of(record)
        return {key: self._encode_texts(texts_of(members, key)) for key in self.json_keys}

    def _encode_texts(self, texts: list[str]) -> EncodedDocument:
        sequences = [ids for ids in map(self._tokenize, texts) if len(ids)]
        if sequences:
            sequences[-1] = [*sequences[-1], *self.end]
        tokens = [token for ids in sequences for token in ids]
        limit = self.tokenizer.vocab_size
        try:
            ids = np.array(tokens, np.int64)
            fits = ids.size == 0 or bool(ids.min() >= 0 and ids.max() < limit)
        except OverflowError:
            fits = False
        if not fits:
            strange = next(token for token in tokens if not 0 <= token < limit)
            raise ValueError(
                f"the tokenizer makes the id {strange} of {texts[0][:40]!r}, but its vocabulary ends at "
                f"{limit - 1}; change the text or the --vocab-size"
            )
        return EncodedDocument(ids.astype(np.int32), [len(sequence) for sequence in sequences])

    def _tokenize(self, text: str) -> list[int]:
        try:
            return self.tokenizer.tokenize(text)
        except ConfigError:
            raise
        except Exception as error:  # the libraries raise whatever they like
            raise ValueError(
                f"the tokenizer cannot take the text {text[:40]!r} of {len(text):,} characters "
                f"({type(error).__name__}: {str(error)[:200]}); change, shorten or split it"
            ) from error


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
            and the line. Or there is no token to write.
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
        if not any(summary.tokens.values()):
            raise ConfigError(_why_nothing(config, summary))
    except BaseException:
        for builder in builders.values():
            builder.abort()
        raise
    for key, prefix in prefixes.items():
        builders[key].finalize(get_idx_path(prefix))
        summary.outputs += [get_bin_path(prefix), get_idx_path(prefix)]
    summary.seconds = time.monotonic() - started
    return summary


def _why_nothing(config: PreprocessConfig, summary: PreprocessSummary) -> str:
    """A description of the input without texts."""
    found = []
    if summary.documents:
        found.append(
            f"{summary.documents:,} documents without a token under {' or '.join(map(repr, config.json_keys))}"
        )
    if summary.bad_lines:
        found.append(f"{summary.bad_lines:,} bad lines, the first of them {summary.bad_lines_shown[0]}")
    files = ", ".join(config.inputs[:3]) + (f" and {len(config.inputs) - 3} more" if len(config.inputs) > 3 else "")
    return (
        f"There is nothing to write: {files} held {' and '.join(found) or 'no document, at most blank lines'}. Name "
        "files with text in --input, and the members that hold it in --json-keys."
    )


def _count_bad_lines(batch: EncodedBatch, summary: PreprocessSummary, skip: bool) -> None:
    if batch.bad_lines and not skip:
        raise ConfigError(
            f"{batch.bad_lines[0].rstrip('.')}. Mend the line, or leave out such lines with --skip-bad-lines."
        )
    summary.bad_lines += len(batch.bad_lines)
    summary.bad_lines_shown += batch.bad_lines[: BAD_LINES_SHOWN - len(summary.bad_lines_shown)]


def _encode_all(config: PreprocessConfig, tokenizer: MegatronTokenizer) -> Iterator[EncodedBatch]:
    """All batches in order, encoded here or by processes."""
    batches = (batch for path in config.inputs for batch in read_batches(path, config.json_keys, config.txt_documents))
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
