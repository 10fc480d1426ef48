"""Tokenize text (JSON lines, .txt, Parquet) into the .bin/.idx files that training reads.

python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --workers 8

writes data/corpus_text_document.bin and .idx; train on them with --data-path data/corpus_text_document.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any, get_type_hints

from tqdm import tqdm

from megatron_lite.config_field import FLAG
from megatron_lite.datasets.preprocessing import PreprocessConfig, PreprocessSummary, preprocess
from megatron_lite.datasets.text_files import TXT_DOCUMENTS, find_inputs
from megatron_lite.datasets.utils import available_cores
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import TokenizerConfig


def build_parser() -> argparse.ArgumentParser:
    """The command line; the tokenizer's part is read off TokenizerConfig."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines or .txt, .gz and .zst too; .parquet; folders of them; patterns like 'a/*.gz'.",
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="Members or columns to tokenize."
    )
    group.add_argument(
        "--txt-documents",
        choices=TXT_DOCUMENTS,
        default="file",
        help="What a document of a .txt file is: the file, a line, or the lines between blank lines.",
    )
    group.add_argument("--skip-bad-lines", action="store_true", help="Leave out lines that cannot be used.")
    group = parser.add_argument_group("tokenizer")
    hints = get_type_hints(TokenizerConfig)
    for field in dataclasses.fields(TokenizerConfig):
        flag = field.metadata[FLAG]
        options: dict[str, Any] = {"action": "store_true"}
        if hints[field.name] is not bool:
            options = {"type": int if "int" in str(hints[field.name]) else str, "choices": flag.choices}
            options["metavar"] = flag.metavar
            options["nargs"] = "+" if "list" in str(hints[field.name]) else None
        name = "--" + field.name.replace("_", "-")
        group.add_argument(name, dest=field.name, default=field.default, help=flag.help, **options)
    group.add_argument("--append-eod", action="store_true", help="End each document with the end-of-document token.")
    group = parser.add_argument_group("output data")
    group.add_argument(
        "--output-prefix", required=True, metavar="PATH", help="Files become PATH_KEY_document.bin, .idx."
    )
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=available_cores(), help="Processes that tokenize.")
    group.add_argument("--log-interval", type=int, default=1000, help="Documents between updates of the progress.")
    group.add_argument(
        "--partitions", type=int, default=1, help="No effect: all workers share one input, so nothing needs partitions."
    )
    group.add_argument(
        "--keep-sequential-samples", action="store_true", help="No effect: documents always keep their order."
    )
    return parser


class Progress:
    """A bar over the bytes of the input files, with an estimate of the time left."""

    def __init__(self, inputs: Sequence[str], log_interval: int) -> None:
        total = sum(os.path.getsize(path) for path in inputs)
        every = 0.5 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=every)
        self.log_interval = log_interval
        self.documents = 0

    def __call__(self, summary: PreprocessSummary) -> None:
        if summary.documents - self.documents < self.log_interval and summary.file_bytes < self.bar.total:
            return
        self.documents = summary.documents
        self.bar.set_postfix_str(f"{summary.documents:,} documents", refresh=False)
        self.bar.update(summary.file_bytes - self.bar.n)


def print_summary(summary: PreprocessSummary) -> None:
    """The figures people want to know of a new data set."""
    tokens = sum(summary.tokens.values())
    speed = summary.text_bytes / 1e6 / max(summary.seconds, 1e-9)
    print(f"documents            {summary.documents:,}")
    print(f"tokens               {tokens:,}")
    print(f"bytes of text        {summary.text_bytes:,}  ({summary.text_bytes / max(tokens, 1):.2f} per token)")
    print(f"tokens per document  {tokens / max(summary.documents, 1):,.1f}")
    print(f"time                 {summary.seconds:.1f} s  ({speed:.1f} MB/s)")
    if summary.bad_lines:
        print(f"left out             {summary.bad_lines:,} bad lines, the first of them:")
        for line in summary.bad_lines_shown:
            print(f"  {line}")
    for key, number in summary.tokens.items():
        if not number:
            print(f"warning              no document has a token under {key!r}; nothing can be trained on its files")
    for path in summary.outputs:
        print(f"wrote                {path}  ({os.path.getsize(path):,} bytes)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        tokenizer = TokenizerConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(TokenizerConfig)})
        tokenizer.validate()
        inputs = find_inputs(arguments.input)
        config = PreprocessConfig(
            inputs=inputs,
            output_prefix=arguments.output_prefix,
            tokenizer=tokenizer,
            json_keys=arguments.json_keys,
            txt_documents=arguments.txt_documents,
            append_eod=arguments.append_eod,
            workers=arguments.workers,
            skip_bad_lines=arguments.skip_bad_lines,
        )
        progress = Progress(inputs, arguments.log_interval)
        with progress.bar:
            summary = preprocess(config, progress)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
