"""A rank's part of a model: one module, or under pipelining its stages, in order."""

from collections.abc import Sequence

from torch import nn

ModelChunks = nn.Module | Sequence[nn.Module]


def as_chunks(model: ModelChunks) -> list[nn.Module]:
    """A model given alone, or as chunks, as a list of chunks."""
    return [model] if isinstance(model, nn.Module) else list(model)
