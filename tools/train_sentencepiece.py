"""Train a SentencePiece tokenizer (byte pair encoding, with single bytes for unseen characters) on text.

python tools/train_sentencepiece.py --input corpus.jsonl --model-prefix tokenizer --vocab-size 4096

Text comes back exactly as it went in: nothing is normalized, and spaces and line ends are kept. The symbol
<|endoftext|> ends documents and no text is ever encoded as it.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence

import sentencepiece

from megatron_lite.datasets.text_files import Record, find_inputs, members_of, read_batches, texts_of
from megatron_lite.datasets.utils import available_cores, write_whole
from megatron_lite.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
LONGEST_LINE = 16384
"""Bytes; longer lines teach a tokenizer nothing and cost much."""


def sampled_lines(paths: Sequence[str], key: str, max_bytes: int, skip_bad_lines: bool = False) -> Iterator[str]:
    """Lines of the texts, from evenly spread documents that make up about `max_bytes` bytes.

    Raises:
        ConfigError: a document cannot be used and `skip_bad_lines` is off, or no line is of use.
    """
    if max_bytes < 1:
        raise ConfigError(f"--max-bytes is {max_bytes}, but must be at least 1.")
    total = sum(os.path.getsize(path) for path in paths)
    keep_every = max(1, round(total / max_bytes))
    number, learned = 0, 0
    passed_over: list[str] = []  # lines of the first document among these that has some
    for path, record in _records(paths, key):
        number += 1
        if number % keep_every:
            passed_over = passed_over or _lines_of(path, record, key, skip_bad_lines=True)
            continue
        for line in _lines_of(path, record, key, skip_bad_lines):
            learned += len(line.encode()) <= LONGEST_LINE
            yield line
    if learned == 0:  # fewer documents than the share of one
        for line in passed_over:
            learned += len(line.encode()) <= LONGEST_LINE
            yield line
    if learned == 0:
        raise ConfigError(
            f"There is no line to learn from among {number:,} documents of {', '.join(paths[:3])}: name files with "
            f"text in --input; lines of more than {LONGEST_LINE:,} bytes are passed over."
        )


def _records(paths: Sequence[str], key: str) -> Iterator[tuple[str, Record]]:
    """Each document and its file; of a .txt file each line, since lines are learned from."""
    for path in paths:
        for batch in read_batches(path, (key,), "line"):
            for record in batch.records:
                yield path, record


def _lines_of(path: str, record: Record, key: str, skip_bad_lines: bool) -> list[str]:
    try:
        return [line for text in texts_of(members_of(record), key) for line in text.splitlines(keepends=True)]
    except (ValueError, RecursionError) as error:
        if skip_bad_lines:
            return []
        raise ConfigError(
            f"{path}:{record.number}: {error}. Mend the line, or leave out such lines with --skip-bad-lines."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines or .txt, .gz and .zst too; .parquet; folders of them; patterns like 'a/*.gz'.",
    )
    parser.add_argument(
        "--json-key", "--json-keys", default="text", metavar="KEY", help="Member or column that holds the text."
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="Leave out lines that cannot be used.")
    parser.add_argument("--model-prefix", required=True, metavar="PATH", help="Writes PATH.model.")
    parser.add_argument("--vocab-size", type=int, default=4096, help="Tokens, the 256 bytes and symbols included.")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="Text to learn from; more is sampled.")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sampled_lines(
                find_inputs(arguments.input), arguments.json_key, arguments.max_bytes, arguments.skip_bad_lines
            ),
            model_writer=model,
            vocab_size=arguments.vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=LONGEST_LINE,
            num_threads=available_cores(),
            minloglevel=2,
        )
    except (ConfigError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = f"{arguments.model_prefix}.model"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with write_whole(path) as file:
        file.write(model.getvalue())
    print(f"{arguments.vocab_size:,} tokens learned in {time.monotonic() - started:.1f} s; wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
