"""--help: a short list of topics; --help TOPIC: the flags of one of them."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lite.errors import ConfigError

GENERAL = ("help", "config", "print_config", "dry_run", "world_size")
"""The general flags that the overview shows; the rest are other spellings."""


class HelpAction(argparse.Action):
    """Prints what is asked for and exits. `titles` maps a topic to the title of its group of flags."""

    def __init__(self, *arguments: Any, titles: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.titles = titles

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(help_text(parser, self.titles, values), end="")
        parser.exit()


def help_text(parser: argparse.ArgumentParser, titles: Mapping[str, str], topic: str | None) -> str:
    """The list of topics, the flags of one, those of all, or one flag.

    Raises:
        ConfigError: there is no such topic or flag.
    """
    if topic is None:
        return _overview(parser, titles)
    if topic == "all":
        return parser.format_help()
    if topic in titles:
        return _section(parser, titles[topic], _group(parser, titles[topic])._group_actions)
    flag = "--" + topic.lstrip("-").replace("_", "-")
    if flag in parser._option_string_actions:
        return _section(parser, flag, [parser._option_string_actions[flag]])
    names = [*titles, "all", *parser._option_string_actions]
    closest = difflib.get_close_matches(topic, names, n=1) or difflib.get_close_matches(flag, names, n=1)
    hint = f"; the closest is {closest[0]}" if closest else ""
    raise ConfigError(f"--help {topic}: that is no topic and no flag{hint}. Topics: {', '.join([*titles, 'all'])}.")


def _overview(parser: argparse.ArgumentParser, titles: Mapping[str, str]) -> str:
    """Usage, the general flags, and a line for each topic."""
    general = _group(parser, titles["general"])
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, [])
    formatter.add_text(parser.description)
    formatter.start_section("general flags")
    formatter.add_arguments(action for action in general._group_actions if action.dest in GENERAL)
    formatter.end_section()
    lines = [f"  {topic:<13}{title} ({_flags_of(_group(parser, title))})" for topic, title in titles.items()]
    lines = ["topics, also the sections of a --config file:", *lines, "  all          every flag"]
    return formatter.format_help() + "\n" + "\n".join(lines) + "\n\n--help TOPIC lists the flags of a topic.\n"


def _flags_of(group: argparse._ArgumentGroup) -> str:
    count = sum(action.help is not argparse.SUPPRESS for action in group._group_actions)
    return f"{count} flag{'s' if count > 1 else ''}"


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    return next(group for group in parser._action_groups if group.title == title)


def _section(parser: argparse.ArgumentParser, title: str, actions: Sequence[argparse.Action]) -> str:
    formatter = parser._get_formatter()
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help()
