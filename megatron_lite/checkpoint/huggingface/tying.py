"""Folders whose config.json ties the output layer to the embeddings, but that hold another one."""

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.folder import TensorFolder

_HEAD = "lm_head.weight"
_ROWS = 4096


def has_own_head(theirs: TensorFolder, family: Family) -> bool:
    """Return True if the output layer differs from the embeddings; transformers 5 uses it then, tied or not."""
    embeddings = family.outside["embedding.word_embeddings.weight"][0].name
    if _HEAD not in theirs.shapes or embeddings not in theirs.shapes:
        return False
    shape = theirs.shapes[_HEAD]
    if theirs.shapes[embeddings] != shape:
        return True
    for first in range(0, shape[0], _ROWS):
        rows = (slice(first, min(first + _ROWS, shape[0])), *[slice(None)] * (len(shape) - 1))
        if not torch.equal(theirs.read(_HEAD, rows).float(), theirs.read(embeddings, rows).float()):
            return True
    return False


def refuse_own_head(theirs: TensorFolder, family: Family) -> None:
    """For a model that ties them.

    Raises:
        CheckpointError: the folder holds an output layer that would be lost.
    """
    if has_own_head(theirs, family):
        raise CheckpointError(
            f"{_HEAD} in {theirs.folder} differs from the embeddings, but this model ties its output layer to them: "
            "write --untie-embeddings-and-output-weights."
        )
