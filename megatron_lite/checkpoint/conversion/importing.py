"""Tensors of theirs become a checkpoint of ours, one at a time, in one process."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint import folders
from megatron_lite.checkpoint.checkpointing import _MODEL, _OPTIMIZER, _common, _complete
from megatron_lite.checkpoint.conversion.architecture import Architecture, empty_model
from megatron_lite.checkpoint.conversion.filling import (
    Naming,
    Tensors,
    compare,
    fill_tensor,
    pieces_of_tensors,
    pieces_to_read,
)
from megatron_lite.checkpoint.conversion.pieces import Piece
from megatron_lite.checkpoint.model_state import model_tensors
from megatron_lite.checkpoint.tensor_files import write_tensors


@dataclass(frozen=True)
class Further:
    """What beside weights is imported, so that a run can go on.

    Attributes:
        iteration: that the run is at.
        extra: see save_checkpoint.
        moments: key of the optimizer's state -> its tensors, one for each parameter, arranged like the weights.
        updates: that the optimizer has made.
    """

    iteration: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[str, Tensors] = field(default_factory=dict)
    updates: float = 0.0


@torch.no_grad()
def write_checkpoint(
    root: str | Path,
    theirs: Tensors,
    naming: Naming,
    model: Architecture,
    config_dict: Mapping[str, Any],
    announce: Callable[[str], None],
    remedy: str,
    further: Further | None = None,
) -> Path:
    """Write a checkpoint with these tensors and settings.

    Args:
        root: folder of checkpoints.
        theirs: the weights.
        naming: their names in terms of ours.
        model: what they are the weights of.
        config_dict: what the checkpoint says of its settings.
        announce: called with the name of each tensor before it is read.
        remedy: what to do where tensors and model do not fit.
        further: default weights alone, of iteration 0.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the tensors are damaged, or not those of the model.
    """
    further = Further() if further is None else further
    root, empty = Path(root), empty_model(model)
    own = model_tensors(empty)
    pieces = pieces_of_tensors(own, naming, empty)
    makers = {_MODEL + name: functools.partial(_whole, one, pieces[name], theirs) for name, one in own.items()}
    wanted = pieces_to_read(pieces)
    compare(wanted, set(wanted), theirs, naming, empty, remedy)
    parameters = {name: pieces[name] for name, _ in empty.named_parameters()}
    for key, moments in further.moments.items():
        wanted = pieces_to_read(parameters)
        compare(wanted, set(wanted), moments, naming, empty, remedy)
        for name, found in parameters.items():
            makers[f"{_OPTIMIZER}state.{name}.{key}"] = functools.partial(_whole, own[name], found, moments)
            makers[f"{_OPTIMIZER}state.{name}.step"] = functools.partial(torch.tensor, further.updates)

    def make(name: str) -> Tensor:
        announce(name)
        return makers[name]()

    iteration = further.iteration
    tensors = {name: _like(maker) for name, maker in makers.items()}
    temporary = folders.open_temporary_folder(root, iteration)
    try:
        checksums = write_tensors(f"Importing {theirs.folder}", temporary, tensors, make=make)
        return Path(_complete(root, iteration, _common(iteration, {}, further.extra, config_dict), checksums))
    except BaseException:
        folders.discard_temporary_folder(root, iteration)
        raise


def _whole(parameter: Tensor, pieces: list[Piece], theirs: Tensors) -> Tensor:
    """A tensor with the shape and dtype of a parameter, filled."""
    whole = torch.empty_like(parameter, device="cpu")
    fill_tensor(whole, [range(length) for length in whole.shape], pieces, theirs)
    return whole


def _like(maker: "functools.partial[Tensor]") -> Tensor:
    """A tensor without storage of the shape and dtype that will be made."""
    first = maker.args[0]
    return torch.empty_like(first, device="meta") if isinstance(first, Tensor) else torch.empty((), device="meta")
