"""Attention of some queries to some keys, with what is needed to add other keys later: the log of the denominator.

Two results over disjoint keys combine to the result over both (Milakov and Gimelshein 2018, arXiv:1805.02867), and
the backward of one block needs the combined output and denominator only (Dao 2022, arXiv:2205.14135). So attention
can be computed in any number of blocks, without a score matrix larger than the kernel's tile.

All tensors are [s, b, n, d] as in the rest of the model; keys and values may have fewer heads g, g dividing n.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten

BACKENDS = ("flash", "cudnn", "flash_cpu", "eager")


class Lengths(NamedTuple):
    """Where sequences packed one behind the other begin and end: the rows from cu[i] to cu[i + 1] are the i-th.

    Attributes:
        cu_queries, cu_keys: int32 [sequences + 1] on the device of the queries.
        max_queries, max_keys: the longest sequence.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


def choose_backend(query: Tensor, requested: str = "auto") -> str:
    """The kernel for these queries.

    Args:
        query: its device, dtype and head size decide.
        requested: config.attention_backend. "unfused" and "local" mean plain operations, "fused" means cuDNN on CUDA.

    Returns:
        One of BACKENDS. Flash and cuDNN kernels exist for 16-bit numbers and from compute capability 8.0 only; all
        else is computed eagerly on CUDA. cuDNN has no deterministic backward; where one is asked for, flash does it.
    """
    if requested in ("unfused", "local") or query.device.type not in ("cpu", "cuda"):
        return "eager"
    if query.device.type == "cpu":
        return "flash_cpu"
    if query.dtype not in (torch.float16, torch.bfloat16) or query.size(-1) % 8 or query.size(-1) > 256:
        return "eager"
    if torch.cuda.get_device_properties(query.device).major < 8:  # of such questions, the one torch.compile can answer
        return "eager"
    cudnn = requested == "fused" and query.size(-1) <= 128 and not torch.are_deterministic_algorithms_enabled()
    return "cudnn" if cudnn else "flash"


def attention_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    backend: str,
    lengths: Lengths | None = None,
    window: int = -1,
) -> tuple[Tensor, Tensor]:
    """softmax(query key^T * scale) value over these keys alone.

    Args:
        query: [sq, b, n, d].
        key, value: [sk, b, g, d].
        causal: query i sees keys 0 .. i, with sq = sk; otherwise every query sees every key.
        scale: factor on the scores.
        backend: one of BACKENDS.
        lengths: packed sequences, each attending to itself, b = 1; for the backends of CUDA only.
        window: of a causal block, how many keys before its own a query sees; -1 for all.

    Returns:
        The output [sq, b, n, d] in query's dtype, and the logarithm of the softmax's denominator [sq, b, n] in float32
        (float64 for float64).
    """
    if _takes_flash(backend, key, lengths, window):
        return _flash(query, key, value, causal, scale, lengths, window)
    if backend == "flash_cpu":
        # Its products are up to a third slower with heads cut out of a wider tensor.
        query, key, value = (x.contiguous() for x in (query, key, value))
    q, k, v = (_heads_first(x) for x in (query, key, value))
    if backend == "cudnn":
        arguments = (None, True, 0.0, causal, False)  # no bias, with log_sum, no dropout, no debug mask
        out, log_sum = _aten._scaled_dot_product_cudnn_attention(q, k, v, *arguments, scale=scale)[:2]
        log_sum = log_sum.squeeze(-1)
    elif backend == "flash_cpu":
        # The kernel takes a triangle, or any mask.
        mask = None if window < 0 else _additive(q, k, window)
        triangle = causal and mask is None
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, triangle, attn_mask=mask, scale=scale
        )
    else:
        out, log_sum = _eager(q, _repeat(k, q), _repeat(v, q), causal, scale, window)
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
    lengths: Lengths | None = None,
    window: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this block's queries [sq, b, n, d], keys and values [sk, b, g, d].

    Args:
        grad: gradient of the combined output, [sq, b, n, d].
        out: the output combined over all blocks of these queries, [sq, b, n, d] in query's dtype.
        log_sum: the combined logarithm of the denominator, [sq, b, n].
        query, key, value, causal, scale, backend, lengths, window: as in attention_block.
    """
    if _takes_flash(backend, key, lengths, window):
        return _flash_backward(grad, query, key, value, out, log_sum, causal, scale, lengths, window)
    if backend == "cudnn":
        return _cudnn_backward(grad, query, key, value, out, log_sum, causal, scale)
    if backend == "flash_cpu":
        return _flash_cpu_backward(grad, query, key, value, out, log_sum, causal, scale, window)
    g, q, k, v, o = (_heads_first(x) for x in (grad, query, key, value, out))
    sums = log_sum.permute(1, 2, 0)
    dq, dk, dv = _eager_backward(g, q, _repeat(k, q), _repeat(v, q), o, sums, causal, scale, window)
    dq, dk, dv = (x.permute(2, 0, 1, 3) for x in (dq, _sum_repeated(dk, k), _sum_repeated(dv, v)))
    return dq, dk, dv


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, backend: str) -> Tensor:
    """`attention_block` with its gradient: [sq, b, n, d] from queries [sq, b, n, d] and all their keys."""
    if backend == "flash_cpu":
        query, key, value = (x.contiguous() for x in (query, key, value))  # here, so that backward finds them so
    return _Attention.apply(query, key, value, causal, scale, backend)  # type: ignore[no-any-return]


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, backend: str
    ) -> Tensor:
        out, log_sum = attention_block(query, key, value, causal, scale, backend)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.how = causal, scale, backend
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = attention_block_backward(grad, *ctx.saved_tensors, *ctx.how)
        return *grads, None, None, None


def merge(out: Tensor, log_sum: Tensor, block_out: Tensor, block_log_sum: Tensor) -> None:
    """Add a block over further keys to (out, log_sum), in place.

    out_new = sum_i exp(log_sum_i - log_sum_new) out_i, with log_sum_new = log(sum_i exp(log_sum_i)).

    Args:
        out, log_sum: [s, b, n, d] and [s, b, n]; rows that saw nothing yet have log_sum -inf.
        block_out, block_log_sum: the same shapes; each row saw at least one key.
    """
    weight = (block_log_sum - log_sum).sigmoid_().unsqueeze(-1)  # exp(block_log_sum - log_sum_new)
    out.lerp_(block_out.to(out.dtype), weight.to(out.dtype))
    torch.logaddexp(log_sum, block_log_sum, out=log_sum)


def _takes_flash(backend: str, key: Tensor, lengths: Lengths | None, window: int) -> bool:
    """Flash also does what cuDNN cannot (a single key, a window) or does badly: it plans anew for each length."""
    return backend == "flash" or (backend == "cudnn" and (lengths is not None or key.size(0) == 1 or window >= 0))


def _window_of_flash(window: int) -> dict[str, int]:
    """The kernel's arguments for a window of a causal block."""
    return {} if window < 0 else {"window_size_left": window, "window_size_right": 0}


def _flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, lengths: Lengths | None, window: int
) -> tuple[Tensor, Tensor]:
    """FlashAttention on CUDA. It wants [b, s, n, d], or packed [s, n, d], and takes fewer key heads as they are."""
    q, k, v = (_rows_second(x, lengths) for x in (query, key, value))
    places = lengths or (None, None, query.size(0), key.size(0))
    out, log_sum = _aten._flash_attention_forward(
        q, k, v, *places, 0.0, causal, False, scale=scale, **_window_of_flash(window)
    )[:2]
    if lengths is not None:  # log_sum is [b, n, s], or [n, s] of packed rows
        return out.unsqueeze(1), log_sum.t().unsqueeze(1)
    return out.transpose(0, 1), log_sum.permute(2, 0, 1)


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    causal: bool,
    scale: float,
    lengths: Lengths | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (_rows_second(x, lengths) for x in (grad, query, key, value, out))
    sums = log_sum.permute(1, 2, 0) if lengths is None else log_sum.squeeze(1).t()
    places = lengths or (None, None, query.size(0), key.size(0))
    # The kernel reads log_sum as plain memory.
    grads = _aten._flash_attention_backward(
        *tensors,
        sums.contiguous(),
        *places,
        0.0,
        causal,
        *_no_random_state(query),
        scale=scale,
        **_window_of_flash(window),
    )
    dq, dk, dv = (x.transpose(0, 1) if lengths is None else x.unsqueeze(1) for x in grads)
    return dq, dk, dv


def _flash_cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 for half precision: torch's kernel takes twice as long there, and sums shared heads in 16 bits."""
    wide = torch.promote_types(query.dtype, torch.float32)
    g, q, k, v, o = (x.to(wide).contiguous().permute(1, 2, 0, 3) for x in (grad, query, key, value, out))
    mask = None if window < 0 else _additive(q, k, window)
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, o, log_sum.permute(1, 2, 0), 0.0, causal and mask is None, attn_mask=mask, scale=scale
    )
    dq, dk, dv = (x.permute(2, 0, 1, 3).to(query.dtype) for x in grads)
    return dq, dk, dv


def _cudnn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """cuDNN keeps a graph by the strides of query, key and value and takes those of the others for granted.

    So query, output and gradient must lie alike in memory. Fewer key heads are taken as they are.
    """
    g, q, o = (_heads_first(x.contiguous()) for x in (grad, query, out))
    k, v = _heads_first(key), _heads_first(value)
    sums = log_sum.permute(1, 2, 0).flatten().view(*q.shape[:3], 1)  # [b, n, sq, 1] since torch 2.9
    undefined = (None, None, None)  # bias, and lengths of packed sequences
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        g, q, k, v, o, sums, *_no_random_state(q), *undefined, q.size(2), k.size(2), 0.0, causal, scale=scale
    )
    dq, dk, dv = (x.permute(2, 0, 1, 3) for x in grads)
    return dq, dk, dv


def _rows_second(x: Tensor, lengths: Lengths | None) -> Tensor:
    """[s, b, g, d] -> [b, s, g, d], or [s, g, d] of packed rows."""
    x = _with_dense_heads(x)
    return x.transpose(0, 1) if lengths is None else x.squeeze(1)


def _heads_first(x: Tensor) -> Tensor:
    """[s, b, g, d] -> [b, g, s, d]."""
    return _with_dense_heads(x).permute(1, 2, 0, 3)


def _with_dense_heads(x: Tensor) -> Tensor:
    """x, copied if the numbers of a head are not neighbours in memory, as the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _no_random_state(query: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors that CUDA's backward kernels want for dropout's random numbers, and do not read without it."""
    return torch.empty(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)


def _repeat(x: Tensor, query: Tensor) -> Tensor:
    """[b, g, s, d] -> [b, n, s, d]: each key head for every query head that shares it."""
    return x if x.size(1) == query.size(1) else x.repeat_interleave(query.size(1) // x.size(1), dim=1)


def _sum_repeated(grad: Tensor, key: Tensor) -> Tensor:
    """[b, n, sk, d] -> [b, g, sk, d]: gradients of queries that share a key add up."""
    return grad if grad.size(1) == key.size(1) else grad.unflatten(1, (key.size(1), -1)).sum(2)


def _hidden(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[sq, sk]: where the queries of a causal block may not look, at later keys and at those before the window."""
    later = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
    return later if window < 0 else later | ~torch.ones_like(later).triu(-window)


def _additive(q: Tensor, k: Tensor, window: int) -> Tensor:
    """The same as numbers to add to the scores, [1, 1, sq, sk] in the dtype of q."""
    hidden = _hidden(q.size(-2), k.size(-2), window, q.device)
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)[None, None]


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, window: int) -> Tensor:
    """[b, n, sq, sk] in float32 (float64 for float64), -inf where a query may not look."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale
    if causal:
        scores.masked_fill_(_hidden(q.size(-2), k.size(-2), window, q.device), -math.inf)
    return scores


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scale, window)
    log_sum = scores.logsumexp(dim=-1)
    return ((scores - log_sum.unsqueeze(-1)).exp() @ v.to(scores.dtype)).to(q.dtype), log_sum


def _eager_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = (_scores(q, k, causal, scale, window) - log_sum.unsqueeze(-1)).exp()
    grad, wide = grad.to(probabilities.dtype), probabilities.dtype
    grad_value = probabilities.transpose(-2, -1) @ grad
    grad_probabilities = grad @ v.to(wide).transpose(-2, -1)
    dot = (grad * out.to(wide)).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - dot) * scale
    grad_query, grad_key = grad_scores @ k.to(wide), grad_scores.transpose(-2, -1) @ q.to(wide)
    return grad_query.to(q.dtype), grad_key.to(k.dtype), grad_value.to(v.dtype)
