"""Train a SentencePiece tokenizer (byte pair encoding, with single bytes for unseen characters) on JSON lines.

python tools/train_sentencepiece.py --input corpus.jsonl --model-prefix tokenizer --vocab-size 4096

Text comes back exactly as it went in: nothing is normalized, and spaces and line ends are kept. The symbol
<|endoftext|> ends documents and no text is ever encoded as it.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

import sentencepiece

from megatron_lite.datasets.preprocessing import read_batches
from megatron_lite.datasets.utils import available_cores, write_whole
from megatron_lite.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
LONGEST_LINE = 16384
"""Bytes; longer lines teach a tokenizer nothing and cost much."""


def sampled_lines(paths: Sequence[str], key: str, max_bytes: int) -> Iterator[str]:
    """Lines of the texts, from evenly spread documents that make up about `max_bytes` bytes."""
    total = sum(os.path.getsize(path) for path in paths)
    keep_every = max(1, round(total / max_bytes))
    number = 0
    for path in paths:
        for batch in read_batches(path):
            for line_number, line in enumerate(batch.lines, batch.first_line):
                number += 1
                if number % keep_every or not line.strip():
                    continue
                try:
                    text = json.loads(line)[key]
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(
                        f"{path}:{line_number}: no text under {key!r} in this line ({error!r})."
                    ) from error
                yield from text.splitlines(keepends=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, .gz and .zst too.")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="Member that holds the text.")
    parser.add_argument("--model-prefix", required=True, metavar="PATH", help="Writes PATH.model.")
    parser.add_argument("--vocab-size", type=int, default=4096, help="Tokens, the 256 bytes and symbols included.")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="Text to learn from; more is sampled.")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sampled_lines(arguments.input, arguments.json_key, arguments.max_bytes),
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
