"""Cross entropy of logits whose vocabulary dimension is split: no rank ever sees a full row."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import group_rank, group_size
from megatron_lite.tensor_parallel import collectives
from megatron_lite.tensor_parallel.mappings import default_group

IGNORED_TARGET = -100


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, smoothing: float, vocab_size: int, group: ProcessGroup | None
    ) -> Tensor:
        columns = logits.size(-1)
        first = group_rank(group) * columns
        real_columns = min(max(vocab_size - first, 0), columns)
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if real_columns < columns:
            padding = torch.arange(columns, device=logits.device) >= real_columns
            scores = scores.masked_fill(padding, -torch.inf)
        largest = scores.amax(dim=-1, keepdim=True)
        if group is not None:
            largest = collectives.all_reduce(largest, group, "max")
        scores = scores - largest
        here = (target >= first) & (target < first + real_columns)
        column = (target - first).masked_fill(~here, 0).unsqueeze(-1)
        of_target = scores.gather(-1, column).squeeze(-1).masked_fill(~here, 0.0)
        sum_of_real = scores[..., :real_columns].sum(dim=-1)
        exponentials = scores.exp_()
        sums = torch.stack((exponentials.sum(dim=-1), of_target, sum_of_real))
        if group is not None:
            sums = collectives.all_reduce(sums, group)
        total, of_target, sum_of_real = sums.unbind()
        log_total = total.log()
        loss = log_total - of_target
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (log_total - sum_of_real / vocab_size)
        ignored = target == IGNORED_TARGET
        probabilities = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probabilities, column, here, ignored)
        ctx.smoothing, ctx.vocab_size, ctx.real_columns, ctx.dtype = smoothing, vocab_size, real_columns, logits.dtype
        return loss.masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, column, here, ignored = ctx.saved_tensors
        # d loss / d logits = softmax - target distribution; a padded column has probability 0 and no target.
        on_target = (1 - ctx.smoothing) * here.unsqueeze(-1).to(probabilities.dtype)
        grad_logits = probabilities.scatter_add(-1, column, -on_target)
        if ctx.smoothing:
            grad_logits[..., : ctx.real_columns] -= ctx.smoothing / ctx.vocab_size
        grad_logits = grad_logits * grad.masked_fill(ignored, 0.0).unsqueeze(-1)
        return grad_logits.to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    padded_vocab_size: int | None = None,
) -> Tensor:
    """Per-token cross entropy of split logits: [..., V/tp], [...] -> [...], in fp32 (fp64 for fp64 logits).

    Forward: all-reduce of the largest logit and of three sums per token. Backward: no communication; the gradient of
    this rank's columns. Targets equal to -100 give loss 0 and no gradient.

    Args:
        vocab_parallel_logits: this rank's columns of the (padded) vocabulary, ordered by rank.
        target: ids in the whole vocabulary, the same on all ranks.
        label_smoothing: alpha in [0, 1): the true id gets 1 - alpha, the other V - 1 real ids share alpha, as in
            Megatron. `torch.nn.functional.cross_entropy` spreads it over all V: its value for the same loss is
            alpha * V / (V - 1).
        tp_group: default the tensor parallel group.
        vocab_size: real vocabulary V; columns from V on are padding and take no part. None: no padding.
        padded_vocab_size: tp * columns, checked if given.

    Raises:
        ConfigError: logits that do not cover the vocabulary or are gathered already; shapes that do not match;
            label_smoothing out of range.
    """
    group = default_group(tp_group)
    group = None if group_size(group) == 1 else group
    _check(vocab_parallel_logits, target, label_smoothing, group_size(group), vocab_size, padded_vocab_size)
    vocab_size = vocab_size or vocab_parallel_logits.size(-1) * group_size(group)
    smoothing = label_smoothing * vocab_size / (vocab_size - 1) if label_smoothing else 0.0
    return _VocabParallelCrossEntropy.apply(vocab_parallel_logits, target, smoothing, vocab_size, group)  # type: ignore[no-any-return]


def _check(
    logits: Tensor, target: Tensor, smoothing: float, ranks: int, vocab_size: int | None, padded_vocab_size: int | None
) -> None:
    columns = logits.size(-1)
    if logits.shape[:-1] != target.shape:
        raise ConfigError(
            f"The logits' shape is {tuple(logits.shape)} and the target's {tuple(target.shape)}; "
            "the target must have the logits' shape without the last dimension."
        )
    if not 0.0 <= smoothing < 1.0:
        raise ConfigError(f"label_smoothing is {smoothing}, but must lie in [0, 1).")
    if padded_vocab_size is not None and columns * ranks != padded_vocab_size:
        raise ConfigError(
            f"The logits have {columns} columns on each of {ranks} ranks, but the padded vocabulary is "
            f"{padded_vocab_size}; pass this rank's {padded_vocab_size // ranks} columns, not gathered logits."
        )
    if vocab_size is None:
        return
    if columns * ranks < vocab_size:
        raise ConfigError(
            f"The logits have {columns} columns on each of {ranks} ranks, too few for a vocabulary of {vocab_size}."
        )
    if padded_vocab_size is None and ranks > 1 and columns >= vocab_size:
        raise ConfigError(
            f"The logits have {columns} columns, the whole vocabulary of {vocab_size}, although it is split over "
            f"{ranks} ranks: they look gathered already. Pass this rank's columns (gather_output=False); if the "
            f"vocabulary is really padded to {columns * ranks}, say so with padded_vocab_size."
        )
