"""torchrun, which started this process: whether it did, and whether it is still there."""

import os

# Noted when the package is imported first: torchrun may die while this process still starts.
_PARENT = os.getppid()


def started_by_torchrun() -> bool:
    """Return True in a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_is_gone() -> bool:
    """Return True in a rank whose torchrun has died, which nothing else would end."""
    return started_by_torchrun() and os.getppid() != _PARENT
