"""config.json to our settings and back, and what of a run's settings differs from a config.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import OF_GPT, Architecture, Settings, architecture_of, grouped
from megatron_lite.checkpoint.huggingface.config_json import CONFIG, ConfigJson, read_config_json
from megatron_lite.checkpoint.huggingface.facts import differences, remedy
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.model_settings import CHOICES
from megatron_lite.errors import ConfigError

# More differences than any model has that can be read at all.
_FAR = 1000


def read_config(folder: str | Path) -> tuple[Family, ConfigJson]:
    """The config.json of a folder and the family of its model.

    Raises:
        ConfigError: there is none, or its model is of no family known here.
    """
    config = read_config_json(folder, FAMILIES)
    return FAMILIES[config.values["model_type"]], config


def flags_of(family: Family, config: ConfigJson) -> Settings:
    """Our settings of the model that a config.json describes, in the groups "transformer" and "gpt".

    Raises:
        ConfigError: lists everything in it that cannot be expressed.
    """
    flat: dict[str, Any] = dict(family.fixed)
    for key, field in family.fields.items():
        flat[field.ours] = config.get(key, field.default)
    for key, value in family.only.items():
        config.only(key, value)
    flat |= family.read(config)
    config.raise_problems()
    return grouped(flat)


def read_architecture(folder: str | Path) -> tuple[Family, Architecture]:
    """The family and the architecture that a folder's config.json describes.

    Raises:
        ConfigError: it cannot be read or expressed.
    """
    family, config = read_config(folder)
    try:
        return family, architecture_of(flags_of(family, config))
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{config.path} holds a value of the wrong kind: {error}") from error


def disagreements(folder: str | Path, mine: Architecture) -> Iterator[str]:
    """One sentence for each setting of a model that weights of a folder's config.json cannot fit.

    Raises:
        ConfigError: the config.json cannot be read or expressed.
    """
    for name, actual, wanted in _differences(folder, mine):
        if not _is_choice(name, actual, wanted):
            how = remedy(name, wanted)
            how = how if how.startswith("leave out") else f"leave it out, or {how}"
            yield f"{name} is {actual}, but {Path(folder) / CONFIG} says {wanted}: {how}."


def departures(folder: str | Path, mine: Architecture) -> Iterator[str]:
    """One sentence for each setting that differs from a folder's config.json and that its weights fit all the same.

    Raises:
        ConfigError: the config.json cannot be read or expressed.
    """
    for name, actual, wanted in _differences(folder, mine):
        if _is_choice(name, actual, wanted):
            yield f"{name} is {actual}, but the weights were trained with {wanted}, says {Path(folder) / CONFIG}."


def _differences(folder: str | Path, mine: Architecture) -> Iterator[tuple[str, Any, Any]]:
    return differences(mine, read_architecture(folder)[1])


def _is_choice(name: str, actual: Any, wanted: Any) -> bool:
    return name in CHOICES or (name == "position_embedding_type" and {actual, wanted} == {"rope", "yarn"})


def config_of(model: Architecture, model_type: str | None = None) -> tuple[Family, dict[str, Any]]:
    """A config.json for a model of ours, and its family: `model_type`, or the first that can express it.

    Raises:
        ConfigError: no family can, with what differs in the nearest one.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise ConfigError(f"model_type is {model_type!r}, but must be one of: {', '.join(FAMILIES)}.")
    families = list(FAMILIES.values()) if model_type is None else [FAMILIES[model_type]]
    failures: list[tuple[int, Family, list[str]]] = []
    for family in families:
        values = _written(family, model)
        try:
            problems = list(_losses(family, model, values))
        except (ConfigError, TypeError, ZeroDivisionError) as error:
            failures.append((_FAR, family, [str(error)]))
            continue
        if not problems:
            return family, values
        failures.append((len(problems), family, problems))
    _, nearest, problems = min(failures, key=lambda one: one[0])
    raise ConfigError(
        f"no model type of transformers that is known here computes what this model does. Nearest is "
        f"{nearest.model_type!r}, which differs: {'; '.join(problems)}."
    )


def _written(family: Family, model: Architecture) -> dict[str, Any]:
    values: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    for key, field in family.fields.items():
        values[key] = getattr(model.gpt if field.ours in OF_GPT else model.transformer, field.ours)
    return {**values, "vocab_size": model.vocab_size, **family.only, **family.write(model)}


def _losses(family: Family, model: Architecture, values: dict[str, Any]) -> Iterator[str]:
    """What reading the config.json again would make different.

    Raises:
        ConfigError, TypeError, ZeroDivisionError: it could not even be read.
    """
    again = architecture_of(flags_of(family, ConfigJson("it", values)))
    for name, theirs, ours in differences(again, model):
        yield f"{name} is {ours}, theirs {theirs}"
