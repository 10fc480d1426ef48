"""The loss of a model on a text: windows of tokens, in which each token is counted once."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer


class Window(NamedTuple):
    """Tokens that a model reads at once, except the last, which it only predicts; the last `counted` losses count."""

    tokens: list[int]
    counted: int


def document_tokens(tokenizer: MegatronTokenizer, text: str) -> list[int]:
    """The ids of a document after a token that begins it, which is read and not counted.

    That is the one the tokenizer puts there itself; otherwise the end of the document before it, as in training.
    """
    ids = tokenizer.tokenize(text)
    return ids if tokenizer.tokenize("")[:1] == [tokenizer.bos] else [tokenizer.eod, *ids]


def windows(ids: list[int], seq_length: int, stride: int) -> Iterator[Window]:
    """Windows of `seq_length` predictions, each beginning `stride` tokens after the one before it.

    A token is counted in the first window that predicts it. So with a stride below `seq_length` each has at least
    `seq_length - stride` tokens before it, except at the beginning of the document.
    """
    end = 1
    for start in range(0, len(ids) - 1, stride):
        before, end = end, min(start + seq_length + 1, len(ids))
        yield Window(ids[start:end], end - before)
        if end == len(ids):
            return


@torch.inference_mode()
def total_loss(
    model: GPTModel, of_documents: Iterable[Window], micro_batch_size: int, device: torch.device | str
) -> tuple[float, int]:
    """The sum of the losses that count, in nats, and their number. Every tensor parallel rank calls it alike.

    Raises:
        ConfigError: a token that the model has no embedding for.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    count, remaining = 0, iter(of_documents)
    while batch := list(itertools.islice(remaining, micro_batch_size)):
        tokens, mask = _padded(batch, model.vocab_size)
        tokens, mask = tokens.to(device), mask.to(device)
        positions = torch.arange(mask.size(1), device=device).expand_as(mask)
        losses = model(tokens[:, :-1], positions, labels=tokens[:, 1:])
        total += losses.double()[mask].sum()
        count += sum(window.counted for window in batch)
    return total.item(), count


def _padded(batch: list[Window], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens [b, s + 1], filled up at the end, where no token that counts sees it; and which losses count, [b, s]."""
    longest = max(len(window.tokens) for window in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for row, window in enumerate(batch):
        low, high = min(window.tokens), max(window.tokens)
        if low < 0 or high >= vocab_size:
            raise ConfigError(f"the text holds ids from {low} to {high}, but the model knows 0 to {vocab_size - 1}.")
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
        last = len(window.tokens) - 1
        mask[row, last - window.counted : last] = True
    return tokens, mask
