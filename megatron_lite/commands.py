"""The command `megatron-lite`, which an installation brings: pretrain_gpt.py and the tools under one name.

megatron_lite/pretrain_gpt.py, megatron_lite/tools and megatron_lite/presets are links to what stands at the top of the
repository; in an installed package they are its own files.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from megatron_lite import __version__

COMMANDS = {
    "pretrain": ("megatron_lite.pretrain_gpt", "train a GPT; the flags are Megatron-LM's"),
    "preprocess": ("megatron_lite.tools.preprocess_data", "text in JSON lines to the .bin/.idx files of training"),
    "generate": ("megatron_lite.tools.generate", "let a trained model continue a text"),
    "evaluate": ("megatron_lite.tools.evaluate", "the loss of a model on a text"),
    "convert": ("megatron_lite.tools.convert_checkpoint", "weights from and to Hugging Face and Megatron-LM"),
    "plan": ("megatron_lite.tools.plan", "the pipeline of a run: stages, bubble, activations"),
}
"""Name -> the module whose `main` it calls, and what it is for."""


def usage() -> str:
    """The text of `megatron-lite --help`."""
    lines = [f"  {name:<12}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-lite COMMAND [flags]",
            "",
            *lines,
            "",
            "megatron-lite COMMAND --help lists the flags of a command. On several processes:",
            "torchrun --nproc-per-node 8 -m megatron_lite pretrain --config llama3_8b ...",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the words after its name; returns the exit status."""
    name, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(__version__ if name == "--version" else usage())
        return 0
    if name not in COMMANDS:
        closest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; the closest is {closest[0]}" if closest else ""
        print(f"megatron-lite: {name} is not a command{hint}. There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    sys.argv = [f"megatron-lite {name}", *words]  # the tools read their words, and their name for --help, from here
    return importlib.import_module(COMMANDS[name][0]).main() or 0
