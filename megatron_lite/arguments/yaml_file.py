"""Reading a `--config` file: flat keys, or keys in sections named like the groups of RunConfig."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_lite.arguments.presets import config_file, preset_names
from megatron_lite.errors import ConfigError


class Entry(NamedTuple):
    """One key of the file: its value as text, null or a list of these, and where it stands."""

    key: str
    value: Any
    where: str


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that leaves every scalar as text but null.

    YAML 1.1 reads 3e-4 as text, 1:30 as the number 90 and `no` as false; the type of the field decides instead.
    """


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str, sections: tuple[str, ...]) -> list[Entry]:
    """The entries of a YAML file in their order.

    Args:
        path: the file, or the name of a preset.
        sections: keys that may hold a mapping, whose entries are then read as if they stood outside.

    Raises:
        ConfigError: the file is missing, is not YAML of the expected kind, names a key twice or asks for objects.
    """
    try:
        text = Path(config_file(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {path}: the file cannot be read ({error}); name an existing YAML file or one of the presets: "
            f"{', '.join(preset_names())}."
        ) from error
    try:
        loader = _TextLoader(text)
        root = loader.get_single_node()
        return [] if root is None else _entries(loader, root, path, sections)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not a plain YAML file of settings: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"--config {path} is nested too deeply; write one `key: value` a line.") from error


def _entries(loader: _TextLoader, root: yaml.Node, path: str, sections: tuple[str, ...]) -> list[Entry]:
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--config {path} must hold `key: value` lines, but is not a mapping.")
    found: list[Entry] = []
    for key_node, value_node in root.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = _value(loader, key_node, f"{where}: a key")
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the key {key!r} is not text; a key is the name of a setting.")
        if isinstance(value_node, yaml.MappingNode):
            if key not in sections:
                raise ConfigError(f"{where}: {key} holds a mapping; only these sections may: {', '.join(sections)}.")
            found += _entries(loader, value_node, path, ())
        else:
            found.append(Entry(key, _value(loader, value_node, f"{where}: {key}"), where))
    first: dict[str, str] = {}
    for entry in found:
        if entry.key in first:
            raise ConfigError(f"{entry.where}: {entry.key} was already set at {first[entry.key]}; keep one of the two.")
        first[entry.key] = entry.where
    return found


def _value(loader: _TextLoader, node: yaml.Node, where: str) -> Any:
    """A plain value or a list of such; nothing deeper, which through aliases could grow without bound."""
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ConfigError(f"{where} holds lists or mappings inside of a list; write plain values.")
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError, AttributeError) as error:  # PyYAML, about an explicit tag that does not fit
        raise ConfigError(f"{where} is not of the type that its tag says: {error}") from error
