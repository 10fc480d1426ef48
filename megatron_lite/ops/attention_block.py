"""Attention of some queries to some keys, with what is needed to add other keys later: the log of the denominator.

Two results over disjoint keys combine to the result over both (Milakov and Gimelshein 2018, arXiv:1805.02867), and
the backward of one block needs the combined output and denominator only (Dao 2022, arXiv:2205.14135). So attention
can be computed in any number of blocks, without a score matrix larger than the kernel's tile.

All tensors are [s, b, n, d] as in the rest of the model; keys and values may have fewer heads g, g dividing n.
"""

import math

import torch
from torch import Tensor

_aten = torch.ops.aten

BACKENDS = ("flash", "cudnn", "flash_cpu", "eager")


def choose_backend(query: Tensor, requested: str = "auto") -> str:
    """The kernel for these queries.

    Args:
        query: its device, dtype and head size decide.
        requested: config.attention_backend. "unfused" and "local" mean plain operations, "fused" means cuDNN on CUDA.

    Returns:
        One of BACKENDS. Flash and cuDNN kernels exist for 16-bit numbers only; float32 on CUDA is computed eagerly.
    """
    if requested in ("unfused", "local") or query.device.type not in ("cpu", "cuda"):
        return "eager"
    if query.device.type == "cpu":
        return "flash_cpu"
    if query.dtype not in (torch.float16, torch.bfloat16) or query.size(-1) % 8 or query.size(-1) > 256:
        return "eager"
    return "cudnn" if requested == "fused" and query.size(-1) <= 128 else "flash"


def attention_block(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """softmax(query key^T * scale) value over these keys alone.

    Args:
        query: [sq, b, n, d].
        key, value: [sk, b, g, d].
        causal: query i sees keys 0 .. i, with sq = sk; otherwise every query sees every key.
        scale: factor on the scores.
        backend: one of BACKENDS.

    Returns:
        The output [sq, b, n, d] in query's dtype, and the logarithm of the softmax's denominator [sq, b, n] in float32
        (float64 for float64).
    """
    if backend == "flash":
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out, log_sum = _aten._flash_attention_forward(
            q, k, v, None, None, q.size(1), k.size(1), 0.0, causal, False, scale=scale
        )[:2]
        return out.transpose(0, 1), log_sum.permute(2, 0, 1)
    q, k, v = _heads_first(query), _heads_first(key, query), _heads_first(value, query)
    if backend == "cudnn":
        out, log_sum = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[
            :2
        ]
        log_sum = log_sum.view(q.shape[:3])
    elif backend == "flash_cpu":
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        out, log_sum = _eager(q, k, v, causal, scale)
    return out.permute(2, 0, 1, 3), log_sum.permute(2, 0, 1)


def attention_block_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this block's queries [sq, b, n, d], keys and values [sk, b, g, d].

    Args:
        grad: gradient of the combined output, [sq, b, n, d].
        out: the output combined over all blocks of these queries, [sq, b, n, d] in query's dtype.
        log_sum: the combined logarithm of the denominator, [sq, b, n].
        query, key, value, causal, scale, backend: as in attention_block.
    """
    if backend == "flash":
        g, q, k, v, o = (x.transpose(0, 1).contiguous() for x in (grad, query, key, value, out))
        grads = _aten._flash_attention_backward(
            g,
            q,
            k,
            v,
            o,
            log_sum.permute(1, 2, 0).contiguous(),
            None,
            None,
            q.size(1),
            k.size(1),
            0.0,
            causal,
            *_no_dropout(q),
            scale=scale,
        )
        return tuple(x.transpose(0, 1) for x in grads)  # type: ignore[return-value]
    q, k, v = _heads_first(query), _heads_first(key, query), _heads_first(value, query)
    g, o, sums = _heads_first(grad), _heads_first(out), log_sum.permute(1, 2, 0)
    if backend == "cudnn":
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            g,
            q,
            k,
            v,
            o,
            sums.contiguous().unsqueeze(-1),
            *_no_dropout(q),
            None,
            None,
            None,
            q.size(2),
            k.size(2),
            0.0,
            causal,
            scale=scale,
        )
    elif backend == "flash_cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, sums, 0.0, causal, scale=scale
        )
    else:
        grads = _eager_backward(g, q, k, v, o, sums, causal, scale)
    dq, dk, dv = (x.permute(2, 0, 1, 3) for x in grads)
    return dq, _sum_shared_heads(dk, key), _sum_shared_heads(dv, value)


def merge(out: Tensor, log_sum: Tensor, block_out: Tensor, block_log_sum: Tensor) -> None:
    """Add a block over further keys to (out, log_sum), in place; rows that saw nothing yet have log_sum -inf.

    out_new = sum_i exp(log_sum_i - log_sum_new) out_i, with log_sum_new = log(sum_i exp(log_sum_i)).
    """
    total = torch.logaddexp(log_sum, block_log_sum)
    out.mul_((log_sum - total).exp_().unsqueeze(-1))
    out.addcmul_(block_out.to(out.dtype), (block_log_sum - total).exp_().unsqueeze(-1).to(out.dtype))
    log_sum.copy_(total)


def _heads_first(x: Tensor, query: Tensor | None = None) -> Tensor:
    """[s, b, g, d] -> [b, g, s, d]; with `query`, each head repeated to match its heads: [b, n, s, d]."""
    if query is not None and x.size(2) != query.size(2):
        x = x.repeat_interleave(query.size(2) // x.size(2), dim=2)
    return x.permute(1, 2, 0, 3)


def _sum_shared_heads(grad: Tensor, key: Tensor) -> Tensor:
    """[sk, b, n, d] -> [sk, b, g, d]: gradients of queries that share a key add up."""
    if grad.size(2) == key.size(2):
        return grad
    return grad.unflatten(2, (key.size(2), -1)).sum(3)


def _no_dropout(query: Tensor) -> tuple[Tensor, Tensor]:
    """The random state that the CUDA kernels want even when they draw nothing."""
    return torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[b, n, sq, sk] in float32 (float64 for float64), -inf where a query may not look."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scale)
    log_sum = scores.logsumexp(dim=-1)
    return ((scores - log_sum.unsqueeze(-1)).exp() @ v.to(scores.dtype)).to(q.dtype), log_sum


def _eager_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = (_scores(q, k, causal, scale) - log_sum.unsqueeze(-1)).exp()
    grad, wide = grad.to(probabilities.dtype), probabilities.dtype
    grad_value = probabilities.transpose(-2, -1) @ grad
    grad_probabilities = grad @ v.to(wide).transpose(-2, -1)
    dot = (grad * out.to(wide)).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - dot) * scale
    grad_query, grad_key = grad_scores @ k.to(wide), grad_scores.transpose(-2, -1) @ q.to(wide)
    return grad_query.to(q.dtype), grad_key.to(k.dtype), grad_value.to(v.dtype)
