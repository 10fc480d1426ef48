"""What becomes of a Megatron-LM flag that no field stands for: no effect (said so), an alias, or a refusal."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.arguments.megatron_flags import NO_EFFECT, REFUSED

# Megatron's second ways of saying something: flag -> field -> value; None is the value of the flag itself.
ALIASES: dict[str, dict[str, str | None]] = {
    "--recompute-activations": {"recompute_granularity": "selective"},
    "--encoder-num-layers": {"num_layers": None},
}

# The same for flags that Megatron-LM no longer has, which start-up remarks on. The first wins where two set a field.
WITHDRAWN_ALIASES: dict[str, dict[str, str | None]] = {
    "--activations-checkpoint-num-layers": {"recompute_num_layers": None},
    "--checkpoint-num-layers": {"recompute_num_layers": None},
    "--activations-checkpoint-granularity": {"recompute_granularity": None},
    "--activations-checkpoint-method": {
        "recompute_granularity": "full",
        "recompute_method": None,
        "recompute_num_layers": "1",
    },
    "--checkpoint-activations": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": "1",
    },
    "--distribute-checkpointed-activations": {"distribute_saved_activations": "true"},
    "--fp8-e4m3": {"fp8": "e4m3"},
    "--fp8-hybrid": {"fp8": "hybrid"},
}
ALL_ALIASES = ALIASES | WITHDRAWN_ALIASES

# What `str` makes of a setting that nobody gave, or that is off.
NOT_SET = ("None", "False")

# Refused flags that ask for nothing special alongside one of these settings: flag -> field -> values, as text; None is
# the value of the flag itself.
HARMLESS_WITH: dict[str, dict[str, tuple[str | None, ...]]] = {
    "--no-position-embedding": {
        "position_embedding_type": ("rope", "yarn", "none"),
        "use_rotary_position_embeddings": ("True",),
    },
    "--eval-global-batch-size": {"global_batch_size": (None,)},
    "--fp8-amax-history-len": {"fp8": NOT_SET, "fp8_recipe": ("tensorwise",)},
    "--fp8-amax-compute-algo": {"fp8": NOT_SET, "fp8_recipe": ("tensorwise",)},
    "--ddp-reduce-scatter-with-fp32-accumulation": {"grad_reduce_in_bf16": NOT_SET},
    "--ddp-param-name-patterns-for-fp32-local-accumulation": {"grad_reduce_in_bf16": NOT_SET},
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
        harmless = HARMLESS_WITH.get(name, {})
        if any(str(settings.get(field)) in [one or str(value) for one in values] for field, values in harmless.items()):
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
