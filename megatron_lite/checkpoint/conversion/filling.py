"""Filling parameters of ours with tensors of theirs, whatever the framework."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_lite.checkpoint.conversion.pieces import Box, Piece, put
from megatron_lite.checkpoint.conversion.sources import Sizes
from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.model_state import listed, with_closest
from megatron_lite.transformer.transformer_config import TransformerConfig


class Naming(Protocol):
    """How a framework names and arranges the weights of a model."""

    @property
    def model_type(self) -> str:
        """For messages."""

    def pieces(self, name: str, shape: Sequence[int], sizes: Sizes, layers: int, depths: int = 0) -> list[Piece]:
        """What a parameter of ours is made of, copies last.

        Args:
            name: ours.
            shape: of the whole parameter.
            sizes: of the model.
            layers: of the decoder.
            depths: of multi-token prediction.

        Raises:
            CheckpointError: there is no place for it.
        """

    def is_ignorable(self, name: str, layers: int, depths: int, tied: bool) -> bool:
        """Whether a tensor of theirs that nobody wants may be left.

        Args:
            name: theirs.
            layers: of our decoder.
            depths: of multi-token prediction in our model.
            tied: our output layer has no weights of its own.
        """


class Tensors(Protocol):
    """The tensors of a folder of theirs."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, on the CPU, in the dtype it is stored in."""


def fill_tensor(target: Tensor, stored: list[range], pieces: list[Piece], theirs: Tensors) -> None:
    """Read one parameter of ours, or the part of it with these indices; what no piece has becomes zero."""
    rows = [len(one.places[0]) for one in pieces if not isinstance(one.places[0], int)]
    if stored and rows and stored[0].stop > max(rows):
        target.zero_()
    for piece in pieces:
        if not piece.is_copy:
            put(piece, target, stored, theirs.read)


def pieces_of_tensors(own: Mapping[str, Tensor], naming: Naming, model: Any) -> dict[str, list[Piece]]:
    """What each of these parameters is made of."""
    config: TransformerConfig = model.config
    sizes = sizes_of(config, model.vocab_size)
    depths = config.mtp_num_layers or 0
    return {name: naming.pieces(name, one.shape, sizes, config.num_layers, depths) for name, one in own.items()}


def sizes_of(config: TransformerConfig, vocab_size: int) -> Sizes:
    """What the places of rows depend on."""
    return Sizes(config.num_attention_heads, config.num_query_groups or config.num_attention_heads, vocab_size)


def pieces_to_read(pieces: Mapping[str, list[Piece]]) -> dict[str, Piece]:
    """Those of all parameters by their names, without copies."""
    return {piece.name: piece for found in pieces.values() for piece in found if not piece.is_copy}


def compare(
    wanted: Mapping[str, Piece], wanted_anywhere: set[str], theirs: Tensors, naming: Naming, model: Any, remedy: str
) -> None:
    """Check that the folder holds exactly the tensors that the model is made of, in their shapes.

    Raises:
        CheckpointError: lists what is missing, what nobody wants, and what has another shape; ends with `remedy`.
    """
    config, tied = model.config, model.share_embeddings_and_output_weights
    missing = sorted(set(wanted) - set(theirs.shapes))
    unwanted = [
        name
        for name in sorted(set(theirs.shapes) - wanted_anywhere)
        if not naming.is_ignorable(name, config.num_layers, config.mtp_num_layers or 0, tied)
    ]
    reshaped = [
        f"{name}: {list(theirs.shapes[name])} in the folder, {list(piece.shape)} in this model"
        for name, piece in sorted(wanted.items())
        if name in theirs.shapes and theirs.shapes[name] != piece.shape
    ]
    if not (missing or unwanted or reshaped):
        return
    lines = [f"{theirs.folder} does not fit this model of type {naming.model_type}."]
    lines += listed("not in the folder", [with_closest(name, unwanted) for name in missing])
    lines += listed("in the folder, but of no use", [with_closest(name, missing) for name in unwanted])
    lines += listed("another shape", reshaped)
    raise CheckpointError("\n".join([*lines, remedy]))
