"""What multi-token prediction reads besides a batch: for each position the tokens, and targets, further on."""

from typing import NamedTuple

import torch
from torch import Tensor


class FutureTokens(NamedTuple):
    """Tensors [b, s, depths], split over context parallel ranks along s like the batch itself.

    Position t is given token t + k at depth k = 1, 2, ..., and has label and loss of position t + k: what stands
    behind that token. Where the sequence or the document of t ends before, token and label are 0 and have no loss.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor


def future_tokens(
    tokens: Tensor, labels: Tensor, loss_mask: Tensor, depths: int, document_starts: Tensor | None = None
) -> FutureTokens:
    """The future of whole sequences; to be split over context parallel ranks afterwards, never before.

    Args:
        tokens, labels: [b, s].
        loss_mask: [b, s] weight of each token's loss.
        depths: number of tokens further on.
        document_starts: [b, s] index of the first token of each token's document, where these are kept apart.
    """
    starts = torch.zeros_like(tokens) if document_starts is None else document_starts
    shifted = [[_further_on(x, starts, depth + 1) for depth in range(depths)] for x in (tokens, labels, loss_mask)]
    return FutureTokens(*(torch.stack(of_depths, dim=-1) for of_depths in shifted))


def _further_on(x: Tensor, starts: Tensor, distance: int) -> Tensor:
    """x[t + distance] at t, 0 where that is in another document or behind the end."""
    moved, length = torch.zeros_like(x), x.size(1) - distance
    if length > 0:
        moved[:, :length] = x[:, distance:] * (starts[:, distance:] == starts[:, :length])
    return moved
