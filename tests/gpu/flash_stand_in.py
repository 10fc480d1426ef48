"""A stand-in for CUDA's flash kernel: torch's signature and layouts, and what the real kernel requires asserted.

What it asserts stands in mha_fwd, mha_varlen_fwd, mha_bwd and mha_varlen_bwd of torch's flash_api.cpp.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def scores_of(query: Tensor, key: Tensor, causal: bool, scale: float, window: int | None = None) -> Tensor:
    """[n, sq, sk] of [sq, n, d] and [sk, n, d]; the last query stands at the last key, as in the kernel."""
    scores = torch.einsum("qnd,knd->nqk", query, key) * scale
    behind = key.size(0) - query.size(0)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + behind)
    if window is not None:
        hidden |= torch.ones(scores.shape[1:], dtype=torch.bool).tril(behind - window - 1)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def for_heads_of(query: Tensor, x: Tensor) -> Tensor:
    """[s, g, d] -> [s, n, d]."""
    return x.repeat_interleave(query.size(1) // x.size(1), dim=1)


class FlashStandIn:
    """aten._flash_attention_forward and _backward on the CPU in float64, and how often each was called."""

    def __init__(self) -> None:
        self.packed, self.dense = 0, 0

    def documents(
        self, query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
    ) -> Iterator[tuple[slice, slice]]:
        """Query and key rows of each sequence, having checked the arguments; a dense batch is looked at as packed."""
        for x in (query, key):
            assert x.stride(-1) == 1
            assert x.stride(-2) % 8 == 0
        if cu_q is None or cu_k is None:
            assert query.dim() == key.dim() == 4
            assert cu_q is cu_k is None
            assert (max_q, max_k) == (query.size(1), key.size(1))
            assert query.size(0) == key.size(0) == 1, "the tests here have one row"
            self.dense += 1
            yield slice(0, max_q), slice(0, max_k)
            return
        self.packed += 1
        assert query.dim() == key.dim() == 3
        for cu, longest, rows in ((cu_q, max_q, query.size(0)), (cu_k, max_k, key.size(0))):
            assert cu.dtype == torch.int32
            assert cu.is_contiguous()
            assert cu[0] == 0
            assert cu[-1] == rows, "the kernel would leave the other rows as it found them"
            assert cu.diff().min() > 0
            assert cu.diff().max() == longest
        assert cu_q.shape == cu_k.shape
        for q, k in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
            yield slice(*q), slice(*k)

    def _flash_attention_forward(
        self, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert (dropout_p, return_debug_mask) == (0.0, False)
        assert window_size_right == (None if window_size_left is None else 0)
        assert key.shape == value.shape
        places = list(self.documents(query, key, cum_seq_q, cum_seq_k, max_q, max_k))
        dense = query.dim() == 4
        query, key, value = (x.squeeze(0) if dense else x for x in (query, key, value))
        out = torch.full_like(query, torch.nan)
        log_sum = query.new_full((query.size(1), query.size(0)), torch.nan)
        for q, k in places:
            scores = scores_of(query[q], for_heads_of(query, key[k]), is_causal, scale, window_size_left)
            log_sum[:, q] = scores.logsumexp(-1)
            out[q] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), for_heads_of(query, value[k]))
        nothing = torch.empty(0)
        return (*((out[None], log_sum[None]) if dense else (out, log_sum)), nothing, nothing, nothing)

    def _flash_attention_backward(
        self, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout_p == 0.0
        assert window_size_right == (None if window_size_left is None else 0)
        assert grad_out.shape == out.shape == query.shape
        assert logsumexp.is_contiguous(), "the kernel reads it as plain memory"
        places = list(self.documents(query, key, cum_seq_q, cum_seq_k, max_q, max_k))
        dense = query.dim() == 4
        tensors = (grad_out, query, key, value, out, logsumexp)
        grad, query, key, value, out, log_sum = (x.squeeze(0) if dense else x for x in tensors)
        assert log_sum.shape == (query.size(1), query.size(0))
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (query, key, value))
        for q, k in places:
            scores = scores_of(query[q], for_heads_of(query, key[k]), is_causal, scale, window_size_left)
            probabilities = (scores - log_sum[:, q, None]).exp()
            dot = (grad[q] * out[q]).sum(-1).t()
            by_scores = probabilities * (
                torch.einsum("qnd,knd->nqk", grad[q], for_heads_of(query, value[k])) - dot[..., None]
            )
            dq[q] = torch.einsum("nqk,knd->qnd", by_scores, for_heads_of(query, key[k])) * scale
            for result, left, right in ((dk, by_scores * scale, query), (dv, probabilities, grad)):
                every_head = torch.einsum("nqk,qnd->knd", left, right[q])
                result[k] = every_head.unflatten(1, (key.size(1), -1)).sum(2)
        return tuple(x[None] if dense else x for x in (dq, dk, dv))
