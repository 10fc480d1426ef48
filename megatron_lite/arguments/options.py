"""Options: the command-line flags and YAML keys that the fields of the configuration dataclasses stand for."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, get_type_hints

from megatron_lite.arguments.run_config import GROUPS, RunConfig
from megatron_lite.config_field import FLAG, Flag

_SWITCHES = (bool, bool | None)


@dataclass(frozen=True)
class Option:
    """One setting: the field that holds it and the spellings that reach it.

    Attributes:
        group: attribute of RunConfig.
        field: field of that group. Fields of the same name in other groups follow it.
        hint: the field's type annotation; the text of a flag or YAML value is converted to it.
        flags: spelling -> value it sets; for settings that take a value from the line, the value is None.
        shown: the spellings `--help` shows; the opposite of a switch exists without being shown.
    """

    group: str
    field: str
    hint: Any
    default: Any
    help: str
    flags: dict[str, bool | None]
    shown: tuple[str, ...]
    choices: tuple[Any, ...] | None
    metavar: str | None

    @property
    def is_switch(self) -> bool:
        """A flag without a value; where None is possible too, nobody says so means that it depends."""
        return self.hint in _SWITCHES


def dashed(name: str) -> str:
    """The flag spelling of a field name."""
    return "--" + name.replace("_", "-")


def field_default(described: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field, a fresh one if it is mutable."""
    if described.default_factory is not dataclasses.MISSING:
        return described.default_factory()
    return described.default


@functools.cache
def all_options() -> tuple[Option, ...]:
    """Every setting of a run that has a flag, group by group."""
    found: list[Option] = []
    taken: set[str] = set()
    seen: set[str] = set()
    group_types = get_type_hints(RunConfig)
    opposites: list[tuple[Option, str, bool]] = []
    for group in GROUPS:
        for described in dataclasses.fields(group_types[group]):
            flag: Flag | None = described.metadata.get(FLAG)
            if flag is None or flag.hidden or described.name in seen:
                continue
            seen.add(described.name)
            default, hint = field_default(described), described.type
            flags = _switches(described.name, flag, default) if hint in _SWITCHES else {}
            if not flags:
                flags = dict.fromkeys(flag.names or (dashed(described.name),))
            clash = taken.intersection(flags)
            if clash:
                raise AssertionError(f"{group}.{described.name}: {sorted(clash)} already belong to another field")
            taken.update(flags)
            option = Option(
                group, described.name, hint, default, flag.help, flags, tuple(flags), flag.choices,
                flag.metavar,
            )  # fmt: skip
            found.append(option)
            if option.is_switch:
                opposites += _opposites(option)
    for option, spelling, value in opposites:
        if spelling not in taken:
            taken.add(spelling)
            option.flags[spelling] = value
    return tuple(found)


def _switches(name: str, flag: Flag, default: bool | None) -> dict[str, bool | None]:
    """The spellings of a switch and the value each sets."""
    if not flag.names:
        stem = name.replace("_", "-")
        return {f"--no-{stem}": False, f"--disable-{stem}": False} if default else {f"--{stem}": True}
    flags: dict[str, bool | None] = {}
    for spelling in flag.names:
        if spelling == dashed(name):
            flags[spelling] = True
        elif spelling.startswith(("--no-", "--disable-")):
            flags[spelling] = False
        else:
            flags[spelling] = not default
    return flags


def _opposites(option: Option) -> list[tuple[Option, str, bool]]:
    """Spellings that turn a switch the other way, so that the command line can win over a file."""
    stem = option.field.replace("_", "-")
    found: list[tuple[Option, str, bool]] = [(option, f"--{stem}", True), (option, f"--no-{stem}", False)]
    for spelling, value in list(option.flags.items()):
        if not spelling.startswith(("--no-", "--disable-")):
            found.append((option, f"--no-{spelling[2:]}", not value))
    return found


@functools.cache
def keys() -> dict[str, tuple[Option, bool | None]]:
    """YAML key -> (option, what `true` means for a switch).

    Keys are the field names, and the flags with underscores: `swiglu: true`, `disable_bias_linear: true`.
    """
    found: dict[str, tuple[Option, bool | None]] = {}
    for option in all_options():
        for spelling, value in option.flags.items():
            found[spelling[2:].replace("-", "_")] = (option, value)
    for option in all_options():
        found[option.field] = (option, True if option.is_switch else None)
    return found
