"""The fields of a configuration dataclass: value, help text and command-line flag in one place.

Flags, `--help`, YAML keys and the documentation are all read off these fields; there is no second list.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megatron_lite.errors import ConfigError

FLAG = "megatron_lite.flag"


@dataclasses.dataclass(frozen=True)
class Flag:
    """How a field appears on the command line.

    Attributes:
        names: spellings of the flag, the first is the usual one; empty means "derive from the field name".
        help: one sentence for `--help` and the documentation.
        choices: the legal values, or None.
        metavar: placeholder shown in `--help`.
        hidden: the field has no flag (it can be set from Python only).
    """

    names: tuple[str, ...]
    help: str
    choices: tuple[Any, ...] | None = None
    metavar: str | None = None
    hidden: bool = False


def knob(
    default: Any,
    help: str,
    *,
    flag: str | Sequence[str] | bool | None = None,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with its help text and flag.

    Args:
        default: the default value; a list or dict is copied for each instance.
        help: one sentence, shown by `--help`.
        flag: None derives `--field-name` (a bool that defaults to True becomes `--no-field-name`); a string or
            a sequence of strings names the flag; False keeps the field off the command line.
        choices: the legal values, if they are few.
        metavar: placeholder shown in `--help`.
    """
    names: tuple[str, ...] = ()
    if isinstance(flag, str):
        names = (flag,)
    elif flag is not None and not isinstance(flag, bool):
        names = tuple(flag)
    described = Flag(names, help, None if choices is None else tuple(choices), metavar, hidden=flag is False)
    metadata = {FLAG: described}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Validated:
    """Mixin of every configuration: collects all violated rules before it complains."""

    def violations(self) -> list[str]:
        """Every rule this configuration breaks, one full sentence each: the value, the rule, the remedy."""
        found = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            described = field.metadata.get(FLAG)
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"{field.name} is {value}, but must be a finite number.")
            if described is None or described.choices is None or value is None:
                continue
            values = value if isinstance(value, (list, tuple)) else [value]
            for item in values:
                if item not in described.choices:
                    legal = ", ".join(str(choice) for choice in described.choices)
                    found.append(f"{field.name} is {item!r}, but must be one of: {legal}.")
        return found

    def validate(self) -> None:
        """Raise ConfigError listing every violated rule, or return quietly."""
        found = self.violations()
        if found:
            raise ConfigError.from_violations(found)

    def freeze(self) -> None:
        """Refuse every later assignment to a field; `dataclasses.replace` still makes a changed copy."""
        object.__setattr__(self, "_frozen", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen", False):
            raise ConfigError(
                f"{type(self).__name__}.{name} cannot be set to {value!r}: a configuration is frozen once validated; "
                "use dataclasses.replace to make a changed copy."
            )
        object.__setattr__(self, name, value)
