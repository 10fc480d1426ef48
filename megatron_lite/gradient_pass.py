"""What a backward pass is for, where gradients of activations and of weights are computed apart: zero-bubble schedules.

Torch's own operators are told which of their gradients a pass needs. A Function is told only which were needed when it
ran forward, which is the same in both passes: those with a product for each of two gradients ask here, or each pass
would compute both, and communicate for both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Kind = Literal["activations", "weights"]

_only: Kind | None = None  # not a context variable: on a GPU a thread of autograd's own runs the backward pass


@contextmanager
def computing_only(kind: Kind) -> Iterator[None]:
    """The backward pass inside is for gradients of this kind."""
    global _only
    _only, before = kind, _only
    try:
        yield
    finally:
        _only = before


def computes(kind: Kind) -> bool:
    """Whether the backward pass that runs is for gradients of this kind, among others or alone."""
    return _only in (None, kind)
