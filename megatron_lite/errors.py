"""The one exception for user mistakes."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot run: says what is wrong, with which value, and what to write instead."""

    @classmethod
    def from_violations(cls, violations: Sequence[str]) -> "ConfigError":
        """One error that lists every violated rule, so that nobody fixes them one run at a time."""
        if len(violations) == 1:
            return cls(violations[0])
        lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(violations, 1))
        return cls(f"{len(violations)} settings do not fit together:\n{lines}")
