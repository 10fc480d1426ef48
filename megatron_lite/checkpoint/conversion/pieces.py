"""Pieces: where the elements of one tensor of theirs stand in one parameter of ours.

A piece holds, for each dimension of our parameter, the index at which each row (or column) of theirs stands. Reading
writes theirs to these places, writing takes theirs from the same places: one description, so the one undoes the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Indices = range | Tensor
"""For each index of theirs along a dimension, in order, the index of ours: a range with a step, or int64 [length]."""

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A tensor of theirs in a parameter of ours.

    Attributes:
        name: theirs.
        places: for each dimension of ours its Indices, or, where theirs lacks the dimension (it is one expert's), the
            index at which theirs stands.
        transposed: the last two dimensions of theirs are exchanged.
        is_copy: theirs repeats what another piece of the parameter says; it is written, and not read.
    """

    name: str
    places: tuple[Indices | int, ...]
    transposed: bool = False
    is_copy: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of theirs."""
        lengths = [len(one) for one in self.places if not isinstance(one, int)]
        return tuple(_exchanged(lengths) if self.transposed else lengths)


def put(piece: Piece, target: Tensor, stored: Sequence[range], read: Callable[[str, Box], Tensor]) -> None:
    """Read what `target` stores of a piece, and no more where theirs has it in one stretch.

    Args:
        piece: where theirs stands in our parameter.
        target: this rank's part of the parameter, filled in place.
        stored: for each dimension the indices of the parameter that `target` holds.
        read: (name, slices) -> that part of the tensor of theirs.
    """
    box: list[slice] = []
    inside: list[Tensor | None] = []
    ours: list[slice | Tensor] = []
    for places, mine in zip(piece.places, stored, strict=True):
        if isinstance(places, int):
            if places not in mine:
                return
            ours.append(slice(places - mine.start, places - mine.start + 1))
            continue
        found = _stored(places, mine)
        if found is None:
            return
        box.append(found[0])
        inside.append(found[1])
        ours.append(found[2])
    block = read(piece.name, tuple(_exchanged(box) if piece.transposed else box))
    if piece.transposed:
        block = block.transpose(-1, -2)
    for dim, chosen in enumerate(inside):
        block = block if chosen is None else block.index_select(dim, chosen)
    block = block.to(device=target.device, dtype=target.dtype)
    for dim, places in enumerate(piece.places):
        block = block.unsqueeze(dim) if isinstance(places, int) else block
    # All but at most one dimension are slices, which make a view.
    view = target[tuple(one if isinstance(one, slice) else slice(None) for one in ours)]
    for dim, one in enumerate(ours):
        if isinstance(one, Tensor):
            view.index_copy_(dim, one.to(view.device), block)
            return
    view.copy_(block)


def take(piece: Piece, parameter: Tensor) -> Tensor:
    """Theirs out of our whole parameter: what `put` undoes."""
    taken = parameter
    for dim, places in reversed(list(enumerate(piece.places))):
        if isinstance(places, int):
            taken = taken.select(dim, places)
        elif isinstance(places, range):
            taken = taken[(slice(None),) * dim + (slice(places.start, places.stop, places.step),)]
        else:
            taken = taken.index_select(dim, places.to(taken.device))
    return taken.transpose(-1, -2) if piece.transposed else taken


def _stored(places: Indices, mine: range) -> tuple[slice, Tensor | None, slice | Tensor] | None:
    """What of theirs this rank stores along one dimension; None for nothing.

    Returns:
        The stretch of theirs to read, which of it to use (None for all), and where that stands in this rank's part.
    """
    if isinstance(places, range):
        first = max(0, -((places.start - mine.start) // places.step))
        stop = min(len(places), -((places.start - mine.stop) // places.step))
        if first >= stop:
            return None
        kept = places[first:stop]
        return slice(first, stop), None, slice(kept[0] - mine.start, kept[-1] - mine.start + 1, places.step)
    chosen = torch.nonzero((places >= mine.start) & (places < mine.stop)).flatten()
    if not len(chosen):
        return None
    first, stop = int(chosen[0]), int(chosen[-1]) + 1
    inside = None if len(chosen) == stop - first else chosen - first
    return slice(first, stop), inside, places[chosen] - mine.start


def _exchanged(values: list[Any]) -> list[Any]:
    """The last two exchanged."""
    return [*values[:-2], values[-1], values[-2]]
