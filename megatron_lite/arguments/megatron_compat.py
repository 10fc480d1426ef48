"""What becomes of a Megatron-LM flag that no field stands for: no effect (said so), an alias, or a refusal."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.arguments.megatron_flags import NO_EFFECT, REFUSED

# Megatron's second ways of saying something: flag -> (field, value; None takes the value of the flag itself).
ALIASES: dict[str, tuple[str, str | None]] = {
    "--recompute-activations": ("recompute_granularity", "selective"),
    "--encoder-num-layers": ("num_layers", None),
}

# Refused flags that ask for nothing special beside a setting: flag -> (field, value).
HARMLESS_WITH: dict[str, tuple[str, str]] = {
    "--no-position-embedding": ("position_embedding_type", "rope"),
    "--fp8-amax-history-len": ("fp8_recipe", "tensorwise"),
    "--fp8-amax-compute-algo": ("fp8_recipe", "tensorwise"),
}


@dataclass(frozen=True)
class CompatFlag:
    """A Megatron flag without a field.

    Attributes:
        nargs: values it takes: 0, 1 or "*".
        reason: why it changes nothing here, or why it is refused.
        refused: whether values other than `accepted` are refused.
        accepted: values that ask for nothing special; with a refused flag only these pass.
    """

    name: str
    nargs: int | str
    reason: str
    refused: bool
    accepted: tuple[str, ...]

    def is_refused_with(self, value: Any) -> bool:
        """Whether the run cannot do what this flag with this value asks for."""
        values = [str(item) for item in (value if isinstance(value, list) else [value])]
        if self.accepted:
            return not set(values) <= set(self.accepted)
        return self.refused


@functools.cache
def compat_flags() -> dict[str, CompatFlag]:
    """Flag -> what becomes of it."""
    found = {}
    for table, refused in ((NO_EFFECT, False), (REFUSED, True)):
        for reason, text in table.items():
            for word in text.split():
                name, equals, accepted = word.partition("=")
                several = accepted.startswith("*")
                values = tuple(value for value in accepted.removeprefix("*").split("|") if value)
                nargs = ("*" if several else 1) if equals else 0
                found[name] = CompatFlag(name, nargs, reason, refused, values)
    return found


@functools.cache
def compat_keys() -> dict[str, CompatFlag]:
    """YAML key -> the same: the flag with underscores, and Megatron's own name of a `--no-` or `--disable-` switch."""
    found = {}
    for flag in compat_flags().values():
        name = flag.name[2:].replace("-", "_")
        found[name] = flag
        for prefix in ("no_", "disable_"):
            if flag.nargs == 0 and name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), flag)
    return found


def judge(given: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(notices, violations) for Megatron flags that were given, one sentence for each reason.

    Args:
        given: flag -> its value, True for a switch.
        settings: field -> value, as far as given.
    """
    silent: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name, value in given.items():
        flag = compat_flags()[name]
        field, harmless = HARMLESS_WITH.get(name, ("", None))
        if harmless is not None and settings.get(field) == harmless:
            continue
        shown = name if flag.nargs == 0 else f"{name} {_text(value)}"
        into = refused if flag.is_refused_with(value) else silent
        if into is silent and flag.refused:
            continue  # the value that asks for nothing special
        into.setdefault(flag.reason, []).append(shown)
    notices = [f"{', '.join(names)}: accepted without effect ({reason})." for reason, names in silent.items()]
    violations = []
    for reason, names in refused.items():
        verb, them = ("are", "them") if len(names) > 1 else ("is", "it")
        violations.append(f"{', '.join(names)} {verb} given, but not supported: {reason}; leave {them} out.")
    return notices, violations


def _text(value: Any) -> str:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return str(value)
    return " ".join(str(item) for item in value)
