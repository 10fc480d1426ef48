"""Let a trained model continue a text, on the screen as it is written.

python tools/generate.py --load checkpoints --prompt "def " --max-new-tokens 100 --temperature 0.8 --top-k 50
python tools/generate.py --load-hf FOLDER --prompt "The capital of France is"

The settings of the model and its tokenizer are stored in the checkpoint, whatever layout it was saved at. Without
--prompt or --prompt-file the prompt is read from the standard input. A model too large for one device runs split over
several: torchrun --nproc-per-node 4 tools/generate.py ...
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import torch

from megatron_lite.checkpoint import CheckpointError
from megatron_lite.config_field import FLAG
from megatron_lite.errors import ConfigError
from megatron_lite.inference.command_line import add_model_flags, is_first_rank, loaded_model
from megatron_lite.inference.generate import TextStream, generate_tokens
from megatron_lite.inference.load_model import LoadedModel
from megatron_lite.inference.sampling import SamplingConfig


def build_parser() -> argparse.ArgumentParser:
    """The command line; the sampling part is read off SamplingConfig."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="Text to continue.")
    source.add_argument("--prompt-file", metavar="FILE", help="File with the text to continue.")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="Tokens to add at most.")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="Different continuations to write.")
    hints = get_type_hints(SamplingConfig)
    for field in dataclasses.fields(SamplingConfig):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=hints[field.name], default=field.default, help=field.metadata[FLAG].help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; user mistakes end in a message and exit status 2."""
    arguments = build_parser().parse_args(argv)
    try:
        sampling = sampling_of(arguments)
        prompt = read_prompt(arguments)
        with loaded_model(arguments) as (loaded, device):
            write_samples(loaded, prompt, sampling, arguments, device)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_prompt(arguments: argparse.Namespace) -> str:
    """The text to continue; may be empty, for the beginning of a document."""
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if arguments.prompt_file is not None:
        try:
            return Path(arguments.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt-file {arguments.prompt_file} is not text in UTF-8: {error}") from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("under torchrun there is one standard input for many ranks; give --prompt or --prompt-file.")
    return sys.stdin.read()


def sampling_of(arguments: argparse.Namespace) -> SamplingConfig:
    """How tokens are drawn, validated before anything is loaded."""
    sampling = SamplingConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(SamplingConfig)})
    problems = sampling.violations()
    for name in ("max_new_tokens", "num_samples"):
        if getattr(arguments, name) < 1:
            problems.append(f"{name} is {getattr(arguments, name)}, but must be at least 1: write 1 or more.")
    if problems:
        raise ConfigError.from_violations(problems)
    return sampling


def write_samples(
    loaded: LoadedModel, prompt: str, sampling: SamplingConfig, arguments: argparse.Namespace, device: torch.device
) -> None:
    """Write each continuation as it grows, and a line on the speed to the standard error."""
    writing = is_first_rank()

    def show(text: str) -> None:
        if writing:
            print(text, end="", flush=True)

    tokenizer = loaded.tokenizer
    # A text begins where the one before it ended.
    ids = tokenizer.tokenize(prompt) or [tokenizer.eod]
    if not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise ConfigError(f"the prompt holds ids from {min(ids)} to {max(ids)}, but there are {tokenizer.vocab_size}.")
    tokens = torch.tensor([ids], device=device)
    count, started = 0, time.perf_counter()
    for number in range(arguments.num_samples):
        draw = dataclasses.replace(sampling, seed=sampling.seed + number)
        stream = TextStream(tokenizer.detokenize, ids)
        show(f"--- sample {number + 1} of {arguments.num_samples} ---\n" if arguments.num_samples > 1 else "")
        show(prompt)
        for drawn in generate_tokens(loaded.model, tokens, arguments.max_new_tokens, draw, tokenizer.eod):
            count += 1
            token = int(drawn[0])
            if token != tokenizer.eod:
                show(stream.add(token))
        show(stream.finish() + "\n")
    if writing:
        seconds = time.perf_counter() - started
        print(
            f"[iteration {loaded.iteration}: {count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
