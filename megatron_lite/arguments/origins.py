"""Rules about where values came from."""

from collections.abc import Iterator, Mapping
from typing import Any

NAMES_OF_DATA = ("data_path", "data_args_path", "per_split_data_args_path", "train_data_path")


def null_tokenizer_of_file(values: Mapping[str, tuple[Any, str]], file: str | None, command_line: str) -> Iterator[str]:
    """A preset for made-up data names NullTokenizer; real data on the command line want that which made them.

    Args:
        values: field -> (value, origin).
        file: of `--config`.
        command_line: the origin of values of the command line.
    """
    kind, origin = values.get("tokenizer_type", (None, ""))
    named = [name for name in NAMES_OF_DATA if values.get(name, (None, ""))[1] == command_line]
    if kind == "NullTokenizer" and named and file is not None and origin.startswith(f"{file}:"):
        flag = "--" + named[0].replace("_", "-")
        yield (
            f"tokenizer_type is NullTokenizer ({origin}), which is for made-up data, but {flag} "
            "names real ones: write --tokenizer-type and --tokenizer-model of the tokenizer that made them, or "
            "--tokenizer-type NullTokenizer if they hold ids that no tokenizer made."
        )
