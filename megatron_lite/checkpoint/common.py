"""`common.json`: the part of a checkpoint that is not tensors."""

import json
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpointError

COMMON = "common.json"
FORMAT = "megatron_lite"
FORMAT_VERSION = 1


def read_common(folder: str | Path) -> dict[str, Any]:
    """The part of a checkpoint that is not tensors: iteration, layout, extra state, settings.

    Raises:
        CheckpointError: the file is missing, damaged, or of a format this version does not know.
    """
    path = Path(folder) / COMMON
    try:
        common = json.loads(path.read_text())
        says = common["format"], common["format_version"]
        types = {"iteration": int, "layout": dict, "extra": dict, "config": dict}
        damaged = [name for name, kind in types.items() if type(common[name]) is not kind]
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing: {folder} is not a checkpoint of {FORMAT}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if says != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} says format {says[0]!r}, version {says[1]!r}; this program reads "
            f"{FORMAT!r}, version {FORMAT_VERSION}: use the version of {FORMAT} that wrote it, or a newer one."
        )
    if damaged:
        raise DamagedCheckpointError(f"{path} is damaged: {', '.join(damaged)} is not of the right kind.")
    return common
