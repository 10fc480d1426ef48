"""Tied embeddings under pipelining: the first stage has the word embeddings, the last a copy as its output layer.

So has the last stage of a model with multi-token prediction, which embeds tokens, whether its output layer is tied or
not. Both have the same initial values (they are drawn by one name), get the same gradient, the sum of both, and so stay
bit-equal. The copy is declared by ParameterSpec.copy_of.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel.parameters import local, named_parameter_specs


class TiedWeights(NamedTuple):
    """A weight and its copy in the last stage, each None where another rank holds it."""

    original: nn.Parameter | None
    copy: nn.Parameter | None


def tied_weights(chunks: Sequence[nn.Module]) -> TiedWeights | None:
    """The tied weights among this rank's chunks; None where it holds neither, or a model that needs no copy."""
    ends = [(getattr(chunk, "pre_process", True), getattr(chunk, "post_process", True)) for chunk in chunks]
    if ends == [(True, True)]:
        return None  # a model in one piece
    parameters = {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
    for chunk in chunks:
        for name, spec in named_parameter_specs(chunk).items():
            if spec.copy_of:
                return TiedWeights(parameters.get(spec.copy_of), parameters[name])
    for chunk, (begins, stops) in zip(chunks, ends, strict=True):
        if begins and not stops and getattr(chunk, "has_copy_of_embeddings", False):
            return TiedWeights(chunk.embedding.word_embeddings.weight, None)  # type: ignore[union-attr, arg-type]
    return None


@torch.no_grad()
def sum_tied_gradients(chunks: Sequence[nn.Module], embedding_group: ProcessGroup | None) -> None:
    """Give the original and the copy the sum of both gradients, after the data parallel reduction.

    Collective: one all-reduce (SUM) over `embedding_group`, the ranks of the first and the last stage, of this rank's
    shard. Where one rank holds both stages (V-shaped schedules), none.
    """
    tied = tied_weights(chunks)
    if tied is None:
        return
    if tied.original is not None and tied.copy is not None:
        total = _gradient(tied.original) + _gradient(tied.copy)
        _gradient(tied.original).copy_(total)
        _gradient(tied.copy).copy_(total)
    elif group_size(embedding_group) > 1:
        held = tied.original if tied.copy is None else tied.copy
        assert held is not None
        dist.all_reduce(_gradient(held), group=embedding_group)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "both ends of the pipeline take part in every backward pass"
    return local(parameter.grad)
