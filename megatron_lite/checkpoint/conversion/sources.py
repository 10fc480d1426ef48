"""Sources: the vocabulary in which the tables of the families say what each parameter of ours is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.checkpoint.conversion.pieces import Indices


@dataclass(frozen=True)
class Sizes:
    """Of a model, what the places of rows depend on: heads n, query groups g, tokens without padding."""

    heads: int
    groups: int
    vocabulary: int


Rows = Callable[[Sizes, int], Indices]
"""(sizes, number of our rows) -> for each row of theirs the row of ours."""


@dataclass(frozen=True)
class Source:
    """A tensor of theirs that (a part of) a parameter of ours is made of.

    Attributes:
        name: theirs; {layer} and {expert} stand for indices. With {expert} it is one of the tensors stacked in ours.
        rows: which rows of ours (behind the dimension of experts) it holds.
        transposed: it is [columns, rows].
    """

    name: str
    rows: Rows = lambda sizes, count: range(count)
    transposed: bool = False


Table = Mapping[str, tuple[Source, ...]]
"""Our parameter -> what it is made of."""


def vocabulary(sizes: Sizes, count: int) -> Indices:
    """Ours has rows for padding behind those of tokens."""
    return range(sizes.vocabulary)


def gates(sizes: Sizes, count: int) -> Indices:
    """Rows of a gated MLP are gate 0, up 0, gate 1, up 1, ..."""
    return range(0, count, 2)


def ups(sizes: Sizes, count: int) -> Indices:
    """See gates."""
    return range(1, count, 2)


def gates_then_ups(sizes: Sizes, count: int) -> Indices:
    """All gates, then all ups."""
    return torch.cat([torch.arange(start, count, 2, device="cpu") for start in (0, 1)])


def queries(sizes: Sizes, count: int) -> Indices:
    """Rows of query-key-value are, for each group, those of its n/g queries, its key, its value."""
    return _by_group(sizes, count)[:, :-2].flatten()


def keys(sizes: Sizes, count: int) -> Indices:
    """See queries."""
    return _by_group(sizes, count)[:, -2].flatten()


def values(sizes: Sizes, count: int) -> Indices:
    """See queries."""
    return _by_group(sizes, count)[:, -1].flatten()


def queries_keys_values(sizes: Sizes, count: int) -> Indices:
    """All queries, then all keys, then all values."""
    return torch.cat([_by_group(sizes, count)[:, part].flatten() for part in (slice(-2), -2, -1)])


def _by_group(sizes: Sizes, count: int) -> Tensor:
    """[g, n/g + 2, d] numbers of our rows."""
    return torch.arange(count, device="cpu").view(sizes.groups, sizes.heads // sizes.groups + 2, -1)


def same(name: str) -> tuple[Source, ...]:
    """Made of one tensor as it is."""
    return (Source(name),)


def table(prefix: str, rows: Table) -> dict[str, tuple[Source, ...]]:
    """Rows whose sources get a prefix."""
    return {
        ours: tuple(Source(prefix + one.name, one.rows, one.transposed) for one in sources)
        for ours, sources in rows.items()
    }


def gated(prefix: str, gate: str = "gate_proj", up: str = "up_proj", ending: str = ".weight") -> tuple[Source, ...]:
    """Gates and ups of theirs, apart."""
    return (Source(f"{prefix}{gate}{ending}", gates), Source(f"{prefix}{up}{ending}", ups))


def with_biases(rows: Table) -> dict[str, tuple[Source, ...]]:
    """The rows of weights, and the same for biases, which have the same order."""
    biases = {
        ours.removesuffix("weight") + "bias": tuple(
            Source(one.name.removesuffix("weight") + "bias", one.rows) for one in sources
        )
        for ours, sources in rows.items()
        if ours.endswith(".weight")
    }
    return {**rows, **biases}
