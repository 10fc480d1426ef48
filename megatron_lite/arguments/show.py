"""--print-config: every setting as YAML that can be read back, with its origin as a comment."""

from typing import Any

import yaml

from megatron_lite.arguments.command_line import TITLES, Settings
from megatron_lite.arguments.options import all_options
from megatron_lite.arguments.run_config import RunConfig


def config_as_yaml(run: RunConfig, settings: Settings) -> str:
    """One `key: value  # origin` line for each setting, group by group.

    A value that was computed from others stands in the comment, so that the file stays true when those change.
    """
    lines = [f"# {notice}" for notice in run.notices]
    group = ""
    for option in all_options():
        if option.group != group:
            group = option.group
            lines += ["", f"# {TITLES[group]}"]
        value, origin = settings.values.get(option.field, (option.default, "default"))
        line = f"{option.field}: {_scalar(value)}"
        resolved = getattr(getattr(run, option.group), option.field)
        if resolved != value:
            origin += f", derived: {_scalar(resolved)}"
        lines.append(f"{line}  # {origin}")
    return "\n".join(lines).strip() + "\n"


def _scalar(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()
