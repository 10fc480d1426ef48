"""config.json to our settings and back, and what of a run's settings differs from a config.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import OF_GPT, Architecture, Settings, architecture_of, grouped
from megatron_lite.checkpoint.huggingface.config_json import CONFIG, REQUIRED, ConfigJson, read_config_json
from megatron_lite.checkpoint.huggingface.facts import differences, remedy
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.family import Family, Field
from megatron_lite.checkpoint.huggingface.folder import TensorFolder, has_safetensors
from megatron_lite.checkpoint.huggingface.tying import has_own_head
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
    config.rename(family.aliases)
    for key, field in family.fields.items():
        if field.default is not REQUIRED:
            config.values.setdefault(key, field.default)
        flat[field.ours] = _value_of(config, key, field)
    # By the first transformers changes any setting of a single layer, by the second it reads weights of another name.
    for key, value in {**family.only, "per_layer_config": None, "transformers_weights": None}.items():
        config.only(key, value)
    if config.values.get("is_causal") is not None:
        config.only("is_causal", True)
    try:
        flat |= family.read(config)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        config.problems.append(f"{config.path} holds a value of the wrong kind: {error}.")
    config.raise_problems()
    return grouped(flat)


def _value_of(config: ConfigJson, key: str, field: Field) -> Any:
    if field.default is REQUIRED:
        return config.integer(key)
    if field.nullable and config.values[key] is None:
        return None
    return config.like(key, field.default)


def settings_of(folder: str | Path) -> tuple[Family, Settings]:
    """The family of a folder's model, and our settings of it: those of config.json, untied where its weights are.

    Raises:
        ConfigError: config.json cannot be read or expressed.
        CheckpointError: the weights are damaged.
    """
    family, config = read_config(folder)
    settings = flags_of(family, config)
    # Without weights config.json alone counts, as for a dry run.
    if settings["gpt"]["share_embeddings_and_output_weights"] and has_safetensors(folder):
        settings["gpt"]["share_embeddings_and_output_weights"] = not has_own_head(
            TensorFolder(folder, family.prefix), family
        )
    return family, settings


def read_architecture(folder: str | Path) -> tuple[Family, Architecture]:
    """The family and the architecture of a folder's model.

    Raises:
        ConfigError: config.json cannot be read or expressed.
        CheckpointError: the weights are damaged.
    """
    family, settings = settings_of(folder)
    try:
        return family, architecture_of(settings)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{Path(folder) / CONFIG} holds a value of the wrong kind: {error}") from error


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
        f"{nearest.model_type!r}, which differs: {'; '.join(problems)}. Train with the settings of that type, or use "
        "the checkpoint with the tools of this program."
    )


def _written(family: Family, model: Architecture) -> dict[str, Any]:
    values: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    for key, field in family.fields.items():
        value = getattr(model.gpt if field.ours in OF_GPT else model.transformer, field.ours)
        # Transformers takes null for no value, and a whole number for no float.
        if value is not None or field.nullable:
            values[key] = float(value) if type(field.default) is float else value
    return {**values, "vocab_size": model.vocab_size, **family.only, **family.write(model)}


def _losses(family: Family, model: Architecture, values: dict[str, Any]) -> Iterator[str]:
    """What reading the config.json again would make different.

    Raises:
        ConfigError, TypeError, ZeroDivisionError: it could not even be read.
    """
    again = architecture_of(flags_of(family, ConfigJson("it", values)))
    for name, theirs, ours in differences(again, model):
        yield f"{name} is {ours}, theirs {theirs}"
