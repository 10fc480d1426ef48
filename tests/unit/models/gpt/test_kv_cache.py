"""Decoding with a cache gives what a forward pass over the whole sequence gives."""

import pytest
import torch

from megatron_lite.errors import ConfigError
from megatron_lite.transformer.inference_context import InferenceContext
from tests.unit.models.gpt.test_gpt_model import BATCH, LENGTH, VARIANTS, batch, build


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [[12], [5, 1, 1, 1, 1, 3], [1] * 12])
def test_any_split_into_steps_gives_the_same_logits(variant: str, steps: list[int]) -> None:
    """Fails if positions do not go on from the cache, or a chunk of several tokens looks ahead."""
    model = build(variant)[0].eval()
    ids, positions, _, _ = batch()
    whole = model(ids, positions)
    context = InferenceContext(BATCH, LENGTH)
    with torch.no_grad():
        start = 0
        for count in steps:
            here = context.next_positions(count, ids.device)
            got = model(ids[:, start : start + count], here, inference_context=context)
            torch.testing.assert_close(got, whole[:, start : start + count], rtol=1e-10, atol=1e-11)
            start += count
        assert context.sequence_len_offset == LENGTH
        context.reset()
        assert torch.equal(context.next_positions(3, ids.device)[1], torch.arange(3))
        again = model(ids, positions, inference_context=context)
    torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-11)


def test_the_cache_says_what_it_holds() -> None:
    model = build("llama")[0]
    ids, positions, _, _ = batch()
    with pytest.raises(ConfigError, match=rf"{BATCH} sequences of {LENGTH} tokens are needed"):
        model(ids, positions, inference_context=InferenceContext(BATCH, LENGTH - 1))
    with pytest.raises(ConfigError, match="the cache holds 2 sequences"):
        model(ids, positions, inference_context=InferenceContext(2, LENGTH))
    model.config.sequence_parallel = True
    with pytest.raises(ConfigError, match="sequence_parallel=False"):
        model(ids, positions, inference_context=InferenceContext(BATCH, LENGTH))
