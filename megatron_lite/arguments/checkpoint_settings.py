"""--use-checkpoint-args: what the command line does not say of model and tokenizer is taken from the checkpoint."""

from typing import Any

from megatron_lite.arguments.options import all_options
from megatron_lite.value_parsing import convert

Values = dict[str, tuple[Any, str]]


def add_checkpoint_settings(values: Values) -> None:
    """Settings of the checkpoint that the run begins with, where none are given; nothing where there is none.

    Args:
        values: field -> (value, origin), as far as given; added to.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    # Not before it is asked for: --help answers at once.
    from megatron_lite.checkpoint import CheckpointError, find_checkpoint, read_common, read_tracker
    from megatron_lite.checkpoint.model_settings import MEANING, SHAPES

    for root in (_given(values, "load"), _given(values, "pretrained_checkpoint")):
        latest = None if root is None else read_tracker(root)
        if latest is not None:
            break
    else:
        return
    step = _given(values, "ckpt_step")
    folder = find_checkpoint(root, latest if step is None else step)
    stored = read_common(folder)["config"]
    for option in all_options():
        group = stored.get(option.group, {})
        of_model = option.field in (*SHAPES.get(option.group, ()), *MEANING.get(option.group, ()))
        if (not of_model and option.group != "tokenizer") or option.field in values or group.get(option.field) is None:
            continue
        value = group[option.field]
        try:
            values[option.field] = (convert(value, option.hint), f"the checkpoint {folder}")
        except ValueError as error:
            raise CheckpointError(f"{folder}: {option.field} is {value!r}, but must be {error}.") from error


def _given(values: Values, name: str) -> Any:
    return values[name][0] if name in values else None
