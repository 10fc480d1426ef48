"""The output layer and the cross entropy as one operation, in chunks of tokens: whole logits never exist.

The gradients of a chunk are formed while its probabilities are at hand, in the forward pass, so the backward pass
only scales them. Memory: a buffer of [chunk, V/tp], in half precision another in float32, and the gradients of hidden
and weight.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel import collectives

IGNORED_LABEL = -100
# Bytes of a chunk's logits. On a CPU 8 MiB are large enough for the matrix products and small enough to be reused by
# the memory allocator. On a GPU larger products fill the device better, and each chunk costs a pass over the weight's
# gradient.
_CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 2**23, 2**28
# Rows of padding are multiplied too, as far as there are any, up to a multiple of this: a GPU multiplies matrices fast
# whose rows begin at multiples of 16 bytes, which those of 50,257 logits do not.
_COLUMNS = 64
# Bytes of the softmax of a block of a chunk, so that its passes stay in the second cache of a CPU core.
_CPU_BLOCK_BYTES = 2**20


def default_chunk_tokens(vocab_per_partition: int, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens per chunk such that a chunk's logits have a size that suits the device; a multiple of 64."""
    size = _CPU_CHUNK_BYTES if device.type == "cpu" else _GPU_CHUNK_BYTES
    return max(64, size // dtype.itemsize // max(vocab_per_partition, 1) // 64 * 64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss_mask: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Per-token loss -log softmax(hidden weight^T)[label], times loss_mask.

    Forward: one all-gather over `tp_group` of two numbers per token and chunk. Backward: none. The gradient of hidden
    is the contribution of this rank's part of the vocabulary, to be summed over `tp_group` by whatever brought hidden
    there (copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region).

    An incoming gradient that is the same for all tokens (as sum() sends it: expanded, stride 0) scales the gradients
    already formed; any other one makes the backward pass form them again, exactly.

    Args:
        hidden: [n, h].
        weight: [V/tp, h], this rank's contiguous rows of the padded vocabulary; cast to the dtype of hidden, while its
            gradient, accumulated in at least float32, has its own dtype.
        labels: [n] global token ids; -100 is ignored (loss and gradient 0). An id outside the vocabulary has
            infinite loss.
        loss_mask: [n] weight per token, default 1.
        vocab_start: global id of the first row of `weight`.
        vocab_size: real size of the vocabulary, default all rows; rows from there on are padding: finite numbers
            that take no part.
        tp_group: ranks that hold the other rows.
        chunk_tokens: tokens per chunk, default by device and vocabulary.

    Returns:
        [n] in float32, in float64 for float64 input.
    """
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if vocab_size is None:
        vocab_size = weight.size(0) * group_size(tp_group)
    real_rows = min(max(vocab_size - vocab_start, 0), weight.size(0))
    rows = min(-(-real_rows // _COLUMNS) * _COLUMNS, weight.size(0))
    chunk = chunk_tokens or default_chunk_tokens(weight.size(0), hidden.device, hidden.dtype)
    split = _Split(vocab_start, real_rows, rows, tp_group, min(chunk, max(hidden.size(0), 1)))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, split, wanted)
    return loss


class _Split(NamedTuple):
    """This rank's part of the vocabulary, how many of its rows are multiplied, and the size of a chunk."""

    vocab_start: int
    real_rows: int
    rows: int
    tp_group: dist.ProcessGroup | None
    chunk_tokens: int


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        split: _Split,
        gradients: bool,
    ) -> Tensor:
        weights = labels != IGNORED_LABEL
        if loss_mask is not None:
            weights = weights * loss_mask
        weights = weights.to(_accumulation_dtype(hidden))
        sums = _GradientSums(hidden, weight, split.rows) if gradients else None
        loss = _run_chunks(hidden, weight, labels, weights, split, sums)
        if sums is not None:
            ctx.split = split
            ctx.save_for_backward(hidden, weight, labels, weights, sums.hidden, sums.weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, weights, grad_hidden, grad_weight = ctx.saved_tensors
        if grad_loss.numel() == 0:
            scale = grad_loss.new_ones(1)
        elif grad_loss.numel() == 1 or grad_loss.stride(0) == 0:
            scale = grad_loss.flatten()[:1]
        else:
            scale = grad_loss.new_ones(1)
            sums = _GradientSums(hidden, weight, ctx.split.rows)
            _run_chunks(hidden, weight, labels, weights * grad_loss, ctx.split, sums)
            grad_hidden, grad_weight = sums.hidden, sums.weight
        grad_hidden = (grad_hidden * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_weight * scale).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None, None, None, None


class _GradientSums:
    """The gradients of the weighted sum of losses for hidden [n, h] and, in at least float32, for weight [V/tp, h]."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int) -> None:
        dtype = _accumulation_dtype(hidden)
        self.hidden = torch.zeros_like(hidden) if rows == 0 else torch.empty_like(hidden)
        self.weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.weight[0 if hidden.size(0) == 0 else rows :] = 0.0
        self._rows = self.weight[:rows]
        self._product = None if dtype == hidden.dtype else hidden.new_empty(self._rows.shape)

    def add(self, here: slice, x: Tensor, rows: Tensor, grad_logits: Tensor, weight_of_token: Tensor) -> None:
        """Take in one chunk; the weight of a token is applied on the small side, to h instead of V numbers."""
        by_weight = weight_of_token.unsqueeze(1)
        torch.mm(grad_logits, rows, out=self.hidden[here]).mul_(by_weight)
        weighted = (x * by_weight).to(x.dtype)
        if self._product is None and here.start == 0:
            torch.mm(grad_logits.t(), weighted, out=self._rows)
            return
        if self._product is None:
            self._rows.addmm_(grad_logits.t(), weighted)
            return
        torch.mm(grad_logits.t(), weighted, out=self._product)
        if here.start == 0:
            self._rows.copy_(self._product)
        else:
            self._rows.add_(self._product)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _run_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, split: _Split, sums: _GradientSums | None
) -> Tensor:
    """Weighted losses [n]; adds the gradients of their sum to `sums`, if given."""
    count, chunk, block = hidden.size(0), split.chunk_tokens, _block_tokens(split, hidden)
    rows = weight[: split.rows].to(hidden.dtype)
    target = labels - split.vocab_start
    is_here = (target >= 0) & (target < split.real_rows)
    target = torch.where(is_here, target, 0)
    wants_gradients = sums is not None and split.real_rows > 0
    logits_buffer = hidden.new_empty(chunk, split.rows)
    dtype = _accumulation_dtype(hidden)
    wide = None if dtype == hidden.dtype else logits_buffer.new_empty(block, split.rows, dtype=dtype)
    block_losses = []

    for start in range(0, count, chunk):
        here = slice(start, min(start + chunk, count))
        logits = torch.mm(hidden[here], rows.t(), out=logits_buffer[: here.stop - start])
        logits[:, split.real_rows :] = -torch.inf
        for tokens, of_block in zip(range(start, here.stop, block), logits.split(block), strict=True):
            there = slice(tokens, tokens + of_block.size(0))
            block_losses.append(_block_losses(of_block, target[there], is_here[there], split, wide, wants_gradients))
        if sums is not None and wants_gradients:
            sums.add(here, hidden[here], rows, logits, weights[here])
    losses = torch.cat(block_losses) if block_losses else weights
    return torch.where(weights == 0, 0.0, losses * weights)


def _block_tokens(split: _Split, hidden: Tensor) -> int:
    """Tokens whose logits go through the softmax together.

    On a CPU few, so that its passes stay in the cache of a core, while the matrix products work on a whole chunk.
    Elsewhere, and where each block costs communication, the whole chunk.
    """
    if hidden.is_cuda or group_size(split.tp_group) > 1:
        return split.chunk_tokens
    row = max(split.rows, 1) * _accumulation_dtype(hidden).itemsize
    return min(split.chunk_tokens, max(1, _CPU_BLOCK_BYTES // row))


def _block_losses(
    logits: Tensor, target: Tensor, is_here: Tensor, split: _Split, wide: Tensor | None, wants_gradients: bool
) -> Tensor:
    """-log softmax(logits)[target] of a block [block]; its logits [block, V/tp] give way to the gradient, if wanted.

    `wide` is space for the softmax, as wide and as long as the logits or longer, where these have too few bits for it.
    """
    probabilities = logits if wide is None else wide[: logits.size(0)]
    local_normalizer, target_logit = _softmax(logits, target, is_here, probabilities)
    normalizer, target_logit = _combine(local_normalizer, target_logit, split.tp_group)
    if wants_gradients:
        # d loss / d logits = probabilities over the whole vocabulary - onehot(label)
        if group_size(split.tp_group) > 1:
            probabilities.mul_((local_normalizer - normalizer).exp_().unsqueeze(1))
        probabilities.scatter_add_(1, target.unsqueeze(1), -is_here.to(probabilities.dtype).unsqueeze(1))
        if wide is not None:
            logits.copy_(probabilities)
    return normalizer - target_logit


def _softmax(logits: Tensor, target: Tensor, is_here: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write the softmax over this rank's columns to `out`; return its log normalizer and the target's logit, [n] each.

    `out` may be the logits themselves. The normalizer follows from the largest logit m and its probability p, as
    m - log p: no pass over exp(logits) more. A target on another rank has logit -inf here.
    """
    if logits.size(1) == 0:
        nothing = out.new_full((logits.size(0),), -torch.inf)
        return nothing, nothing
    target_logit = logits.gather(1, target.unsqueeze(1)).squeeze(1).to(out.dtype)
    largest = logits.amax(1).to(out.dtype)
    if out.dtype != logits.dtype and not logits.is_cuda:
        logits = out.copy_(logits)  # CUDA's softmax reads half precision and writes float32; others would allocate it
    torch.softmax(logits, dim=1, dtype=out.dtype, out=out)
    normalizer = largest - out.amax(1).log_()
    return normalizer, torch.where(is_here, target_logit, -torch.inf)


def _combine(normalizer: Tensor, target_logit: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """All-gather over `tp_group`, then the log normalizer of the whole vocabulary and the one finite target logit."""
    if tp_group is None or group_size(tp_group) == 1:
        return normalizer, target_logit
    gathered = collectives.all_gather(torch.stack((normalizer, target_logit)).unsqueeze(0), 0, tp_group)
    return gathered[:, 0].logsumexp(0), gathered[:, 1].amax(0)
