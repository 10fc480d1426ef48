"""config.json, read with its faults collected."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.errors import ConfigError

CONFIG = "config.json"
REQUIRED = object()


class ConfigJson:
    """The values of a config.json.

    Attributes:
        path: of the file, for messages.
        values: as they stand.
        problems: what cannot be expressed, one sentence each; the reader goes on, so that all are told at once.
    """

    def __init__(self, path: str | Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = str(path), dict(values)
        self.problems: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """A value; one that is null counts as missing."""
        value = self.values.get(key)
        if value is None and default is REQUIRED:
            self.problems.append(f"{self.path} has no {key}, which a model of this type has: add it.")
            return None
        return default if value is None else value

    def get_or_null(self, key: str, default: Any) -> Any:
        """A value where null is one of its own (no window, no groups), and not what a missing one means."""
        return self.values.get(key, default)

    def rename(self, aliases: Mapping[str, str]) -> None:
        """Store each value under the name its alias stands for; as in transformers, the alias wins over the name."""
        for alias, name in aliases.items():
            if alias in self.values:
                self.values[name] = self.values.pop(alias)

    def like(self, key: str, default: Any) -> Any:
        """A value of the kind of its default: a number (float or whole) or a truth value."""
        value = self.get(key, default)
        sound = type(value) is type(default) or (type(default) is float and type(value) is int)
        if not sound and default is not None:
            kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "another kind")
            self.refuse(key, f"must be {kind}", f"write it so, as in {default!r}")
            return default
        return value

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        """A value that must be a positive number; 1 where it is not, which is a problem noted."""
        value = self.get(key, default)
        if type(value) is int and value > 0:
            return value
        if value is not None:
            self.problems.append(f"{key} is {value!r} in {self.path}, but must be a positive number.")
        return 1

    def refuse(self, key: str, rule: str, remedy: str = "another model must be used") -> None:
        """Note a value that cannot be expressed."""
        self.problems.append(f"{key} is {self.values.get(key)!r} in {self.path}, but {rule}: {remedy}.")

    def only(self, key: str, expressible: Any) -> None:
        """Note a value other than the one that can be expressed, which it is where it is missing; null means no."""
        value = self.values.get(key, expressible)
        if value != expressible and not (value is None and not expressible):
            self.refuse(key, f"only {expressible!r} can be expressed here")

    def raise_problems(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self.problems:
            raise ConfigError.from_violations(list(dict.fromkeys(self.problems)))


def read_config_json(folder: str | Path, known: Iterable[str]) -> ConfigJson:
    """The config.json of a folder, with a model_type among `known`.

    Raises:
        ConfigError: it is missing, no JSON object, of a type that is not known, or of quantized weights.
    """
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing, so the weights beside it have no meaning: name a folder that a Hugging Face model "
            "was saved to."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, but must hold an object of settings.")
    kind = values.get("model_type")
    if kind not in set(known):
        raise ConfigError(
            f"model_type is {kind!r} in {path}, but must be one of: {', '.join(sorted(known))}. Models of other types, "
            "and those that bring code of their own, cannot be read."
        )
    if values.get("quantization_config") is not None:
        raise ConfigError(
            f"{path} has a quantization_config, but weights must be plain numbers of 16 or 32 bits: take the model's "
            "bfloat16 weights, or make them with transformers' dequantize() and save_pretrained()."
        )
    return ConfigJson(path, values)
