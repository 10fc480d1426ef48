"""Continuing a text with a trained model, one token at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_lite.errors import ConfigError
from megatron_lite.inference.sampling import SamplingConfig, sample
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.transformer.inference_context import InferenceContext


@torch.inference_mode()
def generate_tokens(
    model: GPTModel,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    eod: int | None = None,
) -> Iterator[Tensor]:
    """Continue token sequences; keys and values of seen tokens are cached, so each is computed once.

    With tensor parallelism every rank calls it alike and draws the same tokens from the same seed; the model must have
    been built with `parallel_output=False`.

    Args:
        model: in evaluation mode.
        prompt: [b, s] token ids, s at least 1.
        max_new_tokens: how many tokens to add at most; fewer if the model's longest sequence is reached.
        sampling: how to choose tokens.
        eod: token that ends a text: a sequence that has drawn it goes on with it, and all having drawn it is the end.

    Yields:
        [b] the next token of each sequence.

    Raises:
        ConfigError: an empty prompt, one that fills the longest sequence, an illegal sampling setting, or a model whose
            sequences are split over context parallel ranks.
    """
    ranks = model.config.context_parallel_size
    if ranks > 1:
        raise ConfigError(
            f"context_parallel_size is {ranks}, but tokens are generated with whole sequences on each rank: build the "
            "model with context_parallel_size 1 (its weights are the same), or read its checkpoint with load_model."
        )
    sampling = sampling or SamplingConfig()
    sampling.validate()
    batch, length = prompt.shape
    if not 1 <= length < model.max_sequence_length:
        raise ConfigError(
            f"the prompt has {length} tokens, but it must have at least 1 and leave room below the model's longest "
            f"sequence ({model.max_sequence_length}): give {'a shorter' if length else 'some'} text."
        )
    steps = min(max_new_tokens, model.max_sequence_length - length)
    context = InferenceContext(batch, length + steps)
    generator = torch.Generator(device=prompt.device).manual_seed(sampling.seed)
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    tokens = prompt
    for _ in range(steps):
        positions = context.next_positions(tokens.size(1), tokens.device)
        logits = model(tokens, positions, inference_context=context)[:, -1]
        drawn = sample(logits, sampling, generator)
        if eod is not None:
            drawn = torch.where(finished, eod, drawn)
            finished |= drawn == eod
        yield drawn
        if eod is not None and bool(finished.all()):
            return
        tokens = drawn[:, None]


def generate(
    model: GPTModel,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    eod: int | None = None,
) -> Tensor:
    """Like `generate_tokens`, all at once: [b, s] -> [b, s + n], prompt included."""
    added = [drawn[:, None] for drawn in generate_tokens(model, prompt, max_new_tokens, sampling, eod)]
    return torch.cat([prompt, *added], dim=1)


class TextStream:
    """Turns a growing token sequence into the text it adds, holding back characters that are not complete yet.

    Args:
        detokenize: token ids -> text.
        prompt: ids whose text is known already.
    """

    def __init__(self, detokenize: Callable[[list[int]], str], prompt: list[int]) -> None:
        self.detokenize = detokenize
        self.tokens = list(prompt)
        self.shown = len(detokenize(self.tokens))

    def add(self, token: int) -> str:
        """The text that is complete with this token; empty in the middle of a character."""
        self.tokens.append(token)
        text = self.detokenize(self.tokens)
        # A replacement character at the end is the first part of a longer UTF-8 sequence.
        complete = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        return self._advance(text, complete)

    def finish(self) -> str:
        """What has been held back."""
        text = self.detokenize(self.tokens)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        added = text[self.shown : end]
        self.shown = max(self.shown, end)
        return added
