"""Generation with the cache equals generation without it, and text comes out whole."""

import pytest
import torch

from megatron_lite.errors import ConfigError
from megatron_lite.inference.generate import TextStream, generate, generate_tokens
from megatron_lite.inference.sampling import SamplingConfig
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.transformer.transformer_config import TransformerConfig

VOCABULARY = 37


def build(positions: str = "rope", **changes: object) -> GPTModel:
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        init_method_std=0.3,
        fp64=True,
        **changes,  # type: ignore[arg-type]
    )
    return GPTModel(config, VOCABULARY, 24, position_embedding_type=positions, parallel_output=False).eval()


@torch.no_grad()
def without_cache(model: GPTModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest tokens, everything computed anew at each step."""
    tokens = prompt
    for _ in range(count):
        positions = torch.arange(tokens.size(1)).expand(tokens.size(0), -1)
        tokens = torch.cat([tokens, model(tokens, positions)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("positions", ["rope", "learned_absolute", "none"])
@pytest.mark.parametrize("changes", [{}, {"window_size": (4, 0)}, {"qk_layernorm": True, "normalization": "RMSNorm"}])
def test_the_cache_changes_nothing(positions: str, changes: dict[str, object]) -> None:
    model = build(positions, **changes)
    prompt = torch.randint(0, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(2))
    greedy = SamplingConfig(temperature=0.0)
    assert torch.equal(generate(model, prompt, 12, greedy), without_cache(model, prompt, 12))


def test_split_sequences_are_refused() -> None:
    model = build()
    model.config.context_parallel_size = 2
    with pytest.raises(ConfigError, match=r"context_parallel_size is 2, but .* load_model"):
        generate(model, torch.tensor([[1, 2]]), 3)


def test_the_seed_decides() -> None:
    model, prompt = build(), torch.tensor([[1, 2, 3]])
    first = generate(model, prompt, 15, SamplingConfig(seed=1))
    assert torch.equal(first, generate(model, prompt, 15, SamplingConfig(seed=1)))
    assert not torch.equal(first, generate(model, prompt, 15, SamplingConfig(seed=2)))
    assert first.max() < VOCABULARY


def test_a_finished_sequence_goes_on_with_eod_and_all_finished_is_the_end() -> None:
    model = build()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = SamplingConfig(temperature=0.0)
    free = generate(model, prompt, 15, greedy)
    eod = int(free[0, 5])
    tokens = generate(model, prompt, 15, greedy, eod)[:, 3:]
    for row, unstopped in zip(tokens.tolist(), free[:, 3:].tolist(), strict=True):
        end = unstopped.index(eod) if eod in unstopped else len(row)
        assert row[:end] == unstopped[:end][: len(row)]
        assert all(token == eod for token in row[end:])
    assert generate(model, prompt[:1], 15, greedy, eod).size(1) == 3 + free[0, 3:].tolist().index(eod) + 1


def test_it_stops_at_the_longest_sequence_and_refuses_what_does_not_fit() -> None:
    model = build()
    assert generate(model, torch.ones(1, 20, dtype=torch.long), 100).shape == (1, 24)
    assert generate(model, torch.ones(1, 20, dtype=torch.long), 0).shape == (1, 20)
    for length in (0, 24, 30):
        with pytest.raises(ConfigError, match=rf"the prompt has {length} tokens"):
            next(generate_tokens(model, torch.ones(1, length, dtype=torch.long), 5))
    with pytest.raises(ConfigError, match=r"top_p is 3"):
        next(generate_tokens(model, torch.ones(1, 2, dtype=torch.long), 5, SamplingConfig(top_p=3.0)))


def test_generation_leaves_the_training_streams_alone() -> None:
    model = build()
    state = torch.get_rng_state()
    generate(model, torch.tensor([[1, 2]]), 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_text_is_shown_only_once_its_characters_are_complete() -> None:
    def detokenize(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    text = "né€😀!"
    stream = TextStream(detokenize, list(b"> "))
    parts = [stream.add(byte) for byte in text.encode()]
    assert "".join(parts) + stream.finish() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)
    cut = TextStream(detokenize, [])
    assert [cut.add(byte) for byte in "é".encode()[:1]] == [""]
    assert cut.finish() == "\N{REPLACEMENT CHARACTER}"
