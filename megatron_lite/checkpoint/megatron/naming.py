"""Megatron-LM's arrangement of weights in terms of ours: names are alike by now, a few have their rows elsewhere."""

from collections.abc import Sequence

import torch

from megatron_lite.checkpoint.conversion.pieces import Indices, Piece
from megatron_lite.checkpoint.conversion.sources import Sizes, vocabulary

_OF_THE_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_FIRST_LAYERS = ("linear_fc1.weight", "linear_fc1.bias", "experts.weight1", "experts.bias1")


class MegatronNaming:
    """See conversion.filling.Naming.

    Args:
        gated: the MLPs are; theirs then have all gates before all ups, ours each gate before its up.
    """

    model_type = "Megatron-LM"

    def __init__(self, gated: bool) -> None:
        self._gated = gated

    def pieces(self, name: str, shape: Sequence[int], sizes: Sizes, layers: int, depths: int = 0) -> list[Piece]:
        """The one tensor of theirs that a parameter of ours is made of."""
        dims: list[Indices] = [range(length) for length in shape]
        if self._gated and name.endswith(_FIRST_LAYERS):
            rows = 1 if ".experts." in name else 0
            dims[rows] = torch.arange(shape[rows], device="cpu").view(-1, 2).T.flatten()
        if name in _OF_THE_VOCABULARY:
            dims[0] = vocabulary(sizes, shape[0])
        return [Piece(name, tuple(dims))]

    def is_ignorable(self, name: str, layers: int, depths: int, tied: bool) -> bool:
        """Nothing is: it would be lost."""
        return False
