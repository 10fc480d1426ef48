"""The loss of a model on a text: per token, as perplexity, and in bits per byte, which other tokenizers compare with.

python tools/evaluate.py held_out.txt --load checkpoints
python tools/evaluate.py held_out.jsonl --load-hf FOLDER --seq-length 2048 --stride 512

A document (the file, or each line of JSON lines) is read in windows of --seq-length tokens. A window begins where
the one before it ended; with a smaller --stride windows overlap, and only tokens that none has counted yet count. A
model too large for one device runs split over several: torchrun --nproc-per-node 4 tools/evaluate.py ...
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint import CheckpointError
from megatron_lite.datasets.text_files import ENDINGS, members_of, read_batches, texts_of
from megatron_lite.errors import ConfigError
from megatron_lite.inference.command_line import add_model_flags, is_first_rank, loaded_model
from megatron_lite.inference.perplexity import Window, document_tokens, total_loss, windows
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer

USUAL_LENGTH = 1024


@dataclass
class Result:
    """The counts of what was read, and the sum of the losses in nats."""

    loss: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def lines(self) -> Iterator[str]:
        """For people and for scripts: a name and a number each."""
        per_token = self.loss / self.tokens
        yield f"loss per token   {per_token:.6f}"
        yield f"perplexity       {math.exp(per_token) if per_token < 700 else math.inf:.4f}"
        yield f"bits per byte    {self.loss / math.log(2) / self.bytes:.6f}"
        yield f"tokens           {self.tokens}"
        yield f"bytes            {self.bytes}"
        yield f"documents        {self.documents}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="Plain text; JSON lines or Parquet if its name says so.")
    add_model_flags(parser)
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="Member or column that holds the text; default text."
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="Tokens of a window; default 1024, or the model's longest sequence."
    )
    parser.add_argument("--stride", type=int, metavar="N", help="Tokens between windows' beginnings; default all.")
    parser.add_argument("--micro-batch-size", type=int, default=4, metavar="N", help="Windows at a time; default 4.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; user mistakes end in a message and exit status 2."""
    arguments = build_parser().parse_args(argv)
    try:
        result = evaluate(arguments)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if is_first_rank():
        print("\n".join(result.lines()))
    return 0


def evaluate(arguments: argparse.Namespace) -> Result:
    """Load the model and read the file with it.

    Raises:
        ConfigError, CheckpointError: a model or file that cannot be read, or settings that do not fit.
    """
    texts = list(read_documents(arguments.file, arguments.json_key))
    result = Result(bytes=sum(len(text.encode("utf-8")) for text in texts), documents=len(texts))
    if not result.bytes:
        raise ConfigError(f"{arguments.file} holds no text: name a file that does.")
    with loaded_model(arguments) as (loaded, device):
        sizes = check_sizes(arguments, loaded.model.max_sequence_length)
        found = all_windows(texts, loaded.tokenizer, *sizes)
        result.loss, result.tokens = total_loss(loaded.model, found, arguments.micro_batch_size, device)
    if not result.tokens:
        raise ConfigError(f"{arguments.file} holds no token for this tokenizer: name a file that does.")
    return result


def read_documents(path: str, key: str) -> Iterator[str]:
    """The documents of a file as tools/preprocess_data.py reads it; a file of another name is one, of plain text.

    Raises:
        ConfigError: it is not text in UTF-8, or a record has no such text.
    """
    if not path.endswith(ENDINGS):
        try:
            yield Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text in UTF-8: {error}") from error
        return
    for batch in read_batches(path, (key,)):
        for record in batch.records:
            try:
                yield from texts_of(members_of(record), key)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{record.number}: {error}.") from error


def check_sizes(arguments: argparse.Namespace, longest: int) -> tuple[int, int]:
    """Sequence length and stride.

    Raises:
        ConfigError: what is wrong with them, or with the batch size.
    """
    length = min(USUAL_LENGTH, longest) if arguments.seq_length is None else arguments.seq_length
    stride = length if arguments.stride is None else arguments.stride
    problems = []
    if not 1 <= length <= longest:
        problems.append(f"seq_length is {length}, but must be at least 1 and at most the model's {longest}.")
    elif not 1 <= stride <= length:
        problems.append(f"stride is {stride}, but must be at least 1 and at most seq_length ({length}).")
    if arguments.micro_batch_size < 1:
        problems.append(f"micro_batch_size is {arguments.micro_batch_size}, but must be at least 1: write 1 or more.")
    if problems:
        raise ConfigError.from_violations(problems)
    return length, stride


def all_windows(texts: list[str], tokenizer: MegatronTokenizer, length: int, stride: int) -> Iterator[Window]:
    """The windows of all documents, one after the other."""
    for text in texts:
        yield from windows(document_tokens(tokenizer, text), length, stride)


if __name__ == "__main__":
    sys.exit(main())
