"""The presets that come with the package, by name."""

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "presets"


def preset_names() -> list[str]:
    """The names that `--config NAME` finds, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def config_file(name: str) -> str:
    """The file that `--config` means: an existing file, otherwise the preset of that name."""
    if os.path.isfile(name) or name not in preset_names():
        return name
    return str(FOLDER / f"{name}.yaml")
