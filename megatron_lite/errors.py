"""The one exception for user mistakes, and how a command line ends with it."""

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

SECONDS_TO_SPEAK = 3.0


class ConfigError(ValueError):
    """A configuration that cannot run: says what is wrong, with which value, and what to write instead."""

    @classmethod
    def from_violations(cls, violations: Sequence[str]) -> "ConfigError":
        """One error that lists every violated rule, so that nobody fixes them one run at a time."""
        if len(violations) == 1:
            return cls(violations[0])
        lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(violations, 1))
        return cls(f"{len(violations)} settings do not fit together:\n{lines}")


def exit_with(program: str, error: Exception, status: int = 1) -> NoReturn:
    """End this process with the message of an error and no traceback; what every rank has to say is said once.

    Most mistakes stop every rank. Rank 0 speaks and leaves at once, and the launcher ends the others; whoever is
    still there a few seconds later (the mistake is its own, or it runs on another node) speaks too.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    time.sleep(SECONDS_TO_SPEAK * ((rank > 0) + (local_rank > 0)))
    speaker = program if rank == 0 else f"{program}, rank {rank}"
    print(f"{speaker}: {error}", file=sys.stderr, flush=True)
    sys.exit(status)
