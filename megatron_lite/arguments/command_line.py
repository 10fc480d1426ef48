"""The argparse parser, generated from the options, and what a person wrote on the command line and in the file."""

import argparse
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron_lite.arguments.checkpoint_settings import add_checkpoint_settings
from megatron_lite.arguments.help import HelpAction
from megatron_lite.arguments.huggingface_settings import add_huggingface_settings
from megatron_lite.arguments.megatron_compat import (
    ALIASES,
    ALL_ALIASES,
    WITHDRAWN_ALIASES,
    compat_flags,
    compat_keys,
    judge,
)
from megatron_lite.arguments.options import Option, all_options, keys
from megatron_lite.arguments.origins import null_tokenizer_of_file
from megatron_lite.arguments.run_config import GROUPS
from megatron_lite.arguments.yaml_file import Entry, read_yaml
from megatron_lite.errors import ConfigError
from megatron_lite.value_parsing import NO, YES, convert, takes_many

TITLES = {
    "transformer": "network size, precision and model parallelism",
    "gpt": "embeddings and positions",
    "ddp": "data parallelism",
    "optimizer": "optimizer and regularization",
    "scheduler": "learning rate and weight decay",
    "data": "data and dataloader",
    "tokenizer": "tokenizer",
    "training": "training",
    "validation": "validation",
    "logger": "logging",
    "rng": "random numbers",
    "profiling": "profiling",
    "distributed": "distributed init",
    "checkpoint": "checkpointing",
}
COMMAND_LINE = "command line"  # the origin of a value that a flag set

EPILOG = (
    "Further flags of Megatron-LM are accepted without effect (fused kernels, communication overlap) or refused with a "
    "reason. A key of a --config file is a flag without its dashes, `-` written as `_`; a flag wins over the file."
)


@dataclass
class Settings:
    """What was asked for, before it becomes a RunConfig.

    Attributes:
        values: field -> (value, origin).
        problems: what is wrong with the words themselves: unknown, of the wrong type, refused.
        notices: accepted Megatron flags that change nothing.
    """

    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    config: str | None = None
    print_config: bool = False
    dry_run: bool = False
    world_size: int | None = None


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and takes `-1,0` and `-1e-3` for values, where argparse would see flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"^-\.?\d[\d.,eE+-]*$")

    def error(self, message: str) -> NoReturn:
        switch = re.fullmatch(r"argument (.+): ignored explicit argument (.+)", message)
        if switch:
            message = f"{switch[1]} is a switch and takes no value, but {switch[2]} is given; write the flag alone"
        raise ConfigError(f"{message}; {self.prog} --help lists the flags.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags. Its namespace holds only what was given, as text; `read_settings` converts it."""
    parser = _Parser(
        prog="pretrain_gpt.py",
        usage="%(prog)s [--config FILE] [flags]",
        description="Pretrain a GPT model with tensor, sequence and data parallelism, on CPUs or GPUs.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument(
        "-h",
        "--help",
        action=HelpAction,
        nargs="?",
        metavar="TOPIC",
        titles={"general": "general"} | TITLES,
        help="List the topics of the flags; with a TOPIC its flags, with all every flag, with a flag that one.",
    )
    general.add_argument(
        "--config", "--yaml-cfg", metavar="FILE", help="YAML file of settings, or the name of a preset."
    )
    general.add_argument(
        "--print-config", action="store_true", help="Print every setting and where it came from as YAML, and exit."
    )
    general.add_argument(
        "--dry-run", action="store_true", help="Validate, print layout, parameters and memory of a rank, and exit."
    )
    general.add_argument("--world-size", metavar="N", help="Ranks that a --dry-run imagines; default 1.")
    groups = {name: parser.add_argument_group(TITLES[name]) for name in GROUPS}
    for option in all_options():
        _add_option(groups[option.group], option)
    for name, targets in ALL_ALIASES.items():
        text = f"Same as {same_as(targets, 'N')}." if name in ALIASES else argparse.SUPPRESS
        if None in targets.values():
            general.add_argument(name, dest=name, help=text, metavar="N")
        else:
            general.add_argument(name, dest=name, action="store_true", help=text)
    fields_have = {spelling for option in all_options() for spelling in option.flags}
    for flag in compat_flags().values():
        if flag.name in fields_have:
            continue
        if flag.nargs == 0:
            parser.add_argument(flag.name, dest=flag.name, action="store_true", help=argparse.SUPPRESS)
        else:
            nargs = None if flag.nargs == 1 else "*"
            parser.add_argument(flag.name, dest=flag.name, nargs=nargs, help=argparse.SUPPRESS)
    return parser


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.choices:
        text += f" Choices: {', '.join(str(choice) for choice in option.choices)}."
    if option.default not in (None, False, True, []):
        text += f" Default: {option.default}."
    if not option.is_switch:
        metavar = option.metavar or ("N" if option.hint is int or option.hint == int | None else "VALUE")
        nargs = "*" if takes_many(option.hint) else None
        group.add_argument(*option.flags, dest=option.field, nargs=nargs, metavar=metavar, help=text)
        return
    for spelling, value in option.flags.items():
        shown = text if spelling in option.shown else argparse.SUPPRESS
        if spelling in option.shown and value is False and not spelling.startswith(("--no-", "--disable-")):
            shown = f"Not: {text}"
        elif spelling in option.shown and value is False:
            shown = f"Switch off: {text}"
        group.add_argument(spelling, dest=option.field, action="store_const", const=value, help=shown)


def read_settings(argv: Sequence[str] | None, defaults: dict[str, Any] | None = None) -> Settings:
    """Command line over `--config` file over `defaults` (field -> value) over what the weights are described by.

    That is the checkpoint with --use-checkpoint-args, and the folder of --load-hf.

    Raises:
        ConfigError: a file cannot be read, or a flag lacks its value. All other problems are collected.
        CheckpointError: the checkpoint whose settings are asked for cannot be read.
    """
    namespace, unknown = build_parser().parse_known_args(argv)
    given = vars(namespace)
    settings = Settings(
        config=given.pop("config", None),
        print_config=given.pop("print_config", False),
        dry_run=given.pop("dry_run", False),
    )
    world_size = given.pop("world_size", None)
    if world_size is not None:
        settings.world_size = _convert(settings, world_size, int, "--world-size", "the command line")
    for name, value in (defaults or {}).items():
        settings.values[name] = (value, "default of this program")
    compat: dict[str, Any] = {}
    if settings.config is not None:
        _read_file(settings, settings.config, compat)
    _read_flags(settings, given, compat)
    given_fields = set(settings.values)
    if settings.values.get("use_checkpoint_args", (False, ""))[0]:
        add_checkpoint_settings(settings.values)
    if settings.values.get("load_hf", (None, ""))[0] is not None:
        add_huggingface_settings(settings.values)
    settings.notices += _taken(settings.values, given_fields)
    _report_unknown(settings, unknown)
    notices, violations = judge(compat, {name: value for name, (value, _) in settings.values.items()})
    settings.notices += notices
    settings.problems += violations
    if not settings.dry_run:
        settings.problems += null_tokenizer_of_file(settings.values, settings.config, COMMAND_LINE)
    return settings


def _taken(values: dict[str, tuple[Any, str]], given: set[str]) -> Iterator[str]:
    """A sentence for each place that settings come from which nobody gave."""
    found: dict[str, list[str]] = {}
    for name, (value, origin) in values.items():
        if name not in given:
            found.setdefault(origin, []).append(f"{name} {value}")
    for origin, settings in found.items():
        yield f"From {origin}: {', '.join(settings)}."


def _read_flags(settings: Settings, given: dict[str, Any], compat: dict[str, Any]) -> None:
    hints = {option.field: option.hint for option in all_options()}
    for alias, targets in ALL_ALIASES.items():
        if alias in given:
            raw = given.pop(alias)
            new = {target: value for target, value in targets.items() if target not in given}
            _remark_on_withdrawn(settings, alias, new, raw)
            given.update({target: raw if value is None else value for target, value in new.items()})
    for name, raw in given.items():
        if name in hints:
            _set(settings, name, raw, hints[name], COMMAND_LINE)
        else:
            compat[name] = raw


def _read_file(settings: Settings, path: str, compat: dict[str, Any]) -> None:
    aliases: list[Entry] = []
    for entry in read_yaml(path, GROUPS):
        key = entry.key.replace("-", "_")
        if key in keys():
            option, meaning = keys()[key]
            if option.is_switch and meaning is False:
                _set_opposite(settings, option, entry.value, entry.where)
            else:
                _set(settings, option.field, entry.value, option.hint, entry.where)
        elif dashed_alias(key) in ALL_ALIASES:
            aliases.append(entry)
        elif key in compat_keys():
            if entry.value is not None and str(entry.value).lower() not in NO[:3]:
                compat[compat_keys()[key].name] = entry.value
        else:
            settings.problems.append(f"{entry.where}: {entry.key} is not a setting{_closest(key, list(keys()))}.")
    for entry in aliases:  # after all else, as they set what nothing else in the file sets
        _set_alias(settings, entry)


def _set_alias(settings: Settings, entry: Entry) -> None:
    alias = dashed_alias(entry.key.replace("-", "_"))
    targets = {target: value for target, value in ALL_ALIASES[alias].items() if target not in settings.values}
    # A switch that is off, and a value that is null, ask for nothing.
    is_asked = entry.value is not None if None in ALL_ALIASES[alias].values() else str(entry.value).lower() in YES
    if is_asked:
        _remark_on_withdrawn(settings, alias, targets, entry.value)
        for target, value in targets.items():
            _set(settings, target, entry.value if value is None else value, keys()[target][0].hint, entry.where)


def _remark_on_withdrawn(settings: Settings, alias: str, targets: dict[str, str | None], value: Any) -> None:
    if alias in WITHDRAWN_ALIASES and targets:
        settings.notices.append(f"{alias}: withdrawn from Megatron-LM; read as {same_as(targets, value)}.")


def same_as(targets: dict[str, str | None], value: Any) -> str:
    """The flags that set fields (field -> value; None is `value`)."""
    words = []
    for target, fixed in targets.items():
        option = keys()[target][0]
        words.append(option.shown[0] if option.is_switch else f"{option.shown[0]} {value if fixed is None else fixed}")
    return " ".join(words)


def dashed_alias(key: str) -> str:
    """The flag that a YAML key stands for."""
    return "--" + key.replace("_", "-")


def _set(settings: Settings, name: str, raw: Any, hint: Any, origin: str) -> None:
    value = _convert(settings, raw, hint, name, origin)
    if value is not None or raw is None:
        settings.values[name] = (value, origin)


def _set_opposite(settings: Settings, option: Option, raw: Any, origin: str) -> None:
    value = _convert(settings, raw, bool, option.field, origin)
    if value is not None:
        settings.values[option.field] = (not value, origin)


def _convert(settings: Settings, raw: Any, hint: Any, name: str, origin: str) -> Any:
    if isinstance(raw, bool):
        return raw
    raw = _unquoted(raw)
    try:
        return convert(raw, hint)
    except ValueError as error:
        shown = " ".join(map(str, raw)) if isinstance(raw, list) else raw
        settings.problems.append(f"{name} is {shown!r} ({origin}), but must be {error}.")
        return None


def _unquoted(raw: Any) -> Any:
    """Scripts that keep flags in a bash array often pass quotes on: '99,1,0' with the quotes inside the word."""
    if isinstance(raw, str) and re.fullmatch(r"'[^']*'|\"[^\"]*\"", raw):
        return raw[1:-1]
    return raw


def _report_unknown(settings: Settings, unknown: list[str]) -> None:
    flags = [word for word in unknown if word.startswith("-")]
    known = [name for option in all_options() for name in option.flags] + list(compat_flags()) + list(ALL_ALIASES)
    for flag in flags:
        name = flag.partition("=")[0]
        settings.problems.append(f"{name} is not a flag{_closest(name, known)}.")
    if unknown and not flags:
        settings.problems.append(f"{' '.join(unknown)!r} on the command line belongs to no flag; put a flag before it.")


def _closest(name: str, known: list[str]) -> str:
    # Dashes are no likeness. Typing mistakes and abbreviations of a word are above this, other words below.
    bare = {one.strip("-"): one for one in known}
    found = difflib.get_close_matches(name.strip("-"), bare, n=1, cutoff=0.7)
    return f"; the closest is {bare[found[0]]}" if found else "; --help lists what there is"
