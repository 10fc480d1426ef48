"""Rows of tokens in any structure, drawn by hypothesis."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from megatron_lite.context_parallel import SequenceLayout


@st.composite
def stretches_of(draw: Callable[..., Any], cp: int) -> tuple[int, ...]:
    """Boundaries of one to three stretches, each of a length that `cp` ranks can split."""
    chunks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    boundaries = [0]
    for chunk in chunks:
        boundaries.append(boundaries[-1] + chunk * (2 * cp if cp > 1 else 1))
    return tuple(boundaries)


@st.composite
def splits(draw: Callable[..., Any]) -> tuple[int, tuple[int, ...]]:
    """A context parallel size from 1 to 4, and stretches that it splits."""
    cp = draw(st.integers(1, 4))
    return cp, draw(stretches_of(cp))


@st.composite
def layouts(draw: Callable[..., Any]) -> tuple[int, SequenceLayout]:
    """A context parallel size, and documents of any length in stretches: one token, none, padding between them."""
    cp, stretches = draw(splits())
    documents: list[tuple[int, int]] = []
    for low, high in pairwise(stretches):
        cuts = sorted(draw(st.lists(st.integers(low, high), max_size=5)))
        documents += [place for place in pairwise(cuts) if draw(st.booleans())]
    return cp, SequenceLayout(stretches, tuple(documents))
