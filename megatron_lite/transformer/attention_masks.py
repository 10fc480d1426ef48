"""Explicit masks for attention, where no kernel knows by itself who may look where."""

import math

import torch
from torch import Tensor


def visible_positions(
    query_length: int,
    key_length: int,
    causal: bool,
    window_size: tuple[int, int] | None,
    device: torch.device,
) -> Tensor:
    """The mask [sq, sk] of the key positions each query may look at.

    The last query stands at the last key: a decoding step brings fewer queries than there are keys in the cache.
    """
    left, right = window_size or (-1, -1)
    queries = torch.arange(key_length - query_length, key_length, device=device).unsqueeze(1)
    keys = torch.arange(key_length, device=device).unsqueeze(0)
    visible = keys <= queries if causal else torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible & (keys >= queries - left)
    if right >= 0:
        visible = visible & (keys <= queries + right)
    return visible


def with_sinks(visible: Tensor, sinks: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of the keys, and of one more key behind them: [1 or b, n, sq, sk + 1] in `dtype`."""
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -math.inf)
    shape = (*torch.broadcast_shapes(visible.shape[:-2], (1, sinks.size(0))), *visible.shape[-2:])
    column = sinks.to(dtype).view(1, -1, 1, 1).expand(*shape[:-1], 1)
    return torch.cat((hidden.expand(shape), column), dim=-1)
