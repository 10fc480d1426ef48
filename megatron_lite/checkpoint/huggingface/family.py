"""Family: everything that is particular to one kind of model of theirs, and its use on names of parameters."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.pieces import Indices, Piece
from megatron_lite.checkpoint.conversion.sources import Sizes, Source, Table
from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson

_IN_DECODER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_IN_FUTURE = re.compile(r"mtp\.layers\.(\d+)\.(?:(transformer_layer)\.)?(.+)")
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias))")


@dataclass(frozen=True)
class Field:
    """A setting of ours that has the same value under a key of config.json.

    Attributes:
        ours: the field of TransformerConfig or GPTModelConfig.
        default: what a config.json without the key means; REQUIRED if it must be there, and be a positive number.
        nullable: null is a value, and does not mean what a missing key does.
    """

    ours: str
    default: Any
    nullable: bool = False


@dataclass(frozen=True)
class Family:
    """One kind of model of the `transformers` package.

    Attributes:
        model_type: in config.json.
        architecture: the class, in config.json.
        prefix: before the names of all tensors but the output layer's; a model saved without its head lacks it.
        outside: what the parameters outside of layers are made of.
        layer: the same inside a layer.
        future: the same for what a layer of multi-token prediction has besides a layer; theirs come behind the decoder.
        future_copies: tensors of such a layer that repeat one of our parameters.
        fields: key of config.json -> setting of ours.
        fixed: our settings that all models of the family have.
        only: key of config.json -> the value that can be expressed, also meant where it is missing.
        aliases: further name of a key -> the key; transformers takes the former where both are there.
        read: config.json -> the settings that take more than a table.
        write: the reverse.
    """

    model_type: str
    architecture: str
    prefix: str
    outside: Table
    layer: Table
    fields: Mapping[str, Field]
    fixed: Mapping[str, Any]
    read: Callable[[ConfigJson], dict[str, Any]]
    write: Callable[[Architecture], dict[str, Any]]
    only: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    future: Table = field(default_factory=dict)
    future_copies: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)

    def pieces(self, name: str, shape: Sequence[int], sizes: Sizes, layers: int, depths: int = 0) -> list[Piece]:
        """What a parameter of ours is made of, copies last; see conversion.filling.Naming.

        Raises:
            CheckpointError: models of the family have no such parameter.
        """
        number, sources = self._sources(name, layers)
        found = [piece for one in sources for piece in _pieces_of(one, shape, sizes, number)]
        for depth in range(depths):
            for one in self.future_copies.get(name, ()):
                (piece,) = _pieces_of(one, shape, sizes, layers + depth)
                found.append(Piece(piece.name, piece.places, piece.transposed, is_copy=True))
        return found

    def _sources(self, name: str, layers: int) -> tuple[int, tuple[Source, ...]]:
        number, sources = 0, self.outside.get(name)
        if match := _IN_DECODER.fullmatch(name):
            number, sources = int(match.group(1)), self.layer.get(match.group(2))
        elif match := _IN_FUTURE.fullmatch(name):
            table = self.layer if match.group(2) else self.future
            number, sources = layers + int(match.group(1)), table.get(match.group(3))
        if sources is None:
            raise CheckpointError(f"{name} has no place in a model of type {self.model_type}.")
        return number, sources

    def is_ignorable(self, name: str, layers: int, depths: int, tied: bool) -> bool:
        """Whether a tensor that nobody wants may be left: tables of positions, layers for training only, copies.

        Args:
            name: theirs, with the prefix.
            layers: of our decoder.
            depths: of multi-token prediction in our model.
            tied: our output layer has no weights of its own.
        """
        if _BUFFERS.fullmatch(name) or (tied and name == "lm_head.weight"):
            return True
        if not self.future:
            return False
        match = re.match(re.escape(self.prefix) + r"layers\.(\d+)\.(.+)", name)
        if match is None or int(match.group(1)) < layers:
            return False
        copies = {one.name.rpartition("{layer}.")[2] for sources in self.future_copies.values() for one in sources}
        return int(match.group(1)) >= layers + depths or match.group(2) in copies


def _pieces_of(source: Source, shape: Sequence[int], sizes: Sizes, layer: int) -> list[Piece]:
    of_experts = "{expert}" in source.name
    dims: list[Indices] = [range(length) for length in (shape[1:] if of_experts else shape)]
    # Where experts are one tensor in theirs too, its first dimension is theirs.
    row_dim = 0 if len(dims) < 3 else 1
    dims[row_dim] = source.rows(sizes, len(dims[row_dim]))
    if not of_experts:
        return [Piece(source.name.format(layer=layer), tuple(dims), source.transposed)]
    return [
        Piece(source.name.format(layer=layer, expert=expert), (expert, *dims), source.transposed)
        for expert in range(shape[0])
    ]
