"""--load-hf: what the command line does not say of model and tokenizer is taken from the Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lite.arguments.options import all_options
from megatron_lite.arguments.run_config import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.value_parsing import convert

Values = dict[str, tuple[Any, str]]
OF_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")


def add_huggingface_settings(values: Values) -> None:
    """Settings of the model from config.json, and the tokenizer of the folder, where none are given.

    Args:
        values: field -> (value, origin), as far as given, with `load_hf` among them; added to.

    Raises:
        ConfigError: config.json is missing, cannot be read, or describes a model that cannot be expressed; the weights
            are damaged.
    """
    # Not before it is asked for: --help answers at once.
    from megatron_lite.checkpoint import CheckpointError
    from megatron_lite.checkpoint.huggingface import read_architecture, settings_of
    from megatron_lite.checkpoint.huggingface.tokenizer_files import tokenizer_in

    folder = values["load_hf"][0]
    try:
        read_architecture(folder)
        _, described = settings_of(folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    path = str(Path(folder) / "config.json")
    for option in all_options():
        group = described.get(option.group, {})
        if option.field not in group or option.field in values:
            continue
        try:
            values[option.field] = (convert(group[option.field], option.hint), path)
        except ValueError as error:
            raise ConfigError(f"{path}: {option.field} is {group[option.field]!r}, but must be {error}.") from error
    found = tokenizer_in(folder)
    if found is not None and not any(name in values for name in OF_TOKENIZER):
        kind, tokenizer = found
        origin = f"the tokenizer's files in {Path(folder)}"
        values |= {"tokenizer_type": (kind, origin), "tokenizer_model": (tokenizer, origin)}


def huggingface_violations(run: RunConfig) -> Iterator[str]:
    """Yield a sentence for each setting that the weights of --load-hf cannot fit."""
    folder = run.checkpoint.load_hf
    if folder is None:
        return
    if run.transformer.moe_use_upcycling:
        yield (
            f"load_hf is {folder!r} with moe_use_upcycling, which reads a checkpoint of this program: convert it with "
            "tools/convert_checkpoint.py and write --pretrained-checkpoint."
        )
        return
    from megatron_lite.checkpoint import CheckpointError
    from megatron_lite.checkpoint.huggingface import Architecture, disagreements

    try:
        yield from disagreements(folder, Architecture(run.transformer, run.gpt, run.gpt.vocab_size))
    except (ConfigError, CheckpointError) as error:
        yield str(error)


def huggingface_notices(run: RunConfig) -> Iterator[str]:
    """Yield a sentence for each setting in which the run may, and does, differ from the model of --load-hf."""
    folder = run.checkpoint.load_hf
    if folder is None:
        return
    from megatron_lite.checkpoint.huggingface import Architecture, departures

    yield from departures(folder, Architecture(run.transformer, run.gpt, run.gpt.vocab_size))
