"""Padding of the vocabulary, and the rules of GPTModelConfig."""

from typing import Any

import pytest
import torch

from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.models.gpt.gpt_model import build_gpt_model
from megatron_lite.models.gpt.vocab import padded_vocab_size
from megatron_lite.transformer.rope import YarnScaling
from megatron_lite.transformer.transformer_config import TransformerConfig


@pytest.mark.parametrize(
    ("vocab", "divisor", "tp", "padded"),
    [
        (50257, 128, 1, 50304),
        (50257, 128, 8, 50304),
        (127, 128, 2, 128),
        (128, 128, 4, 128),
        (10, 1, 3, 12),
        (9, 4, 6, 12),
    ],
)
def test_padding(vocab: int, divisor: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab, divisor, tp) == padded


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"position_embedding_type": "alibi"}, "must be one of: learned_absolute, rope, yarn, none"),
        ({"make_vocab_size_divisible_by": 0}, "make_vocab_size_divisible_by is 0"),
        ({"vocab_size": 100, "padded_vocab_size": 64}, r"must hold vocab_size \(100\)"),
        ({"rotary_percent": 1.5}, "rotary_percent is 1.5"),
        ({"use_rope_scaling": True}, "use_rope_scaling is set with position_embedding_type learned_absolute"),
        ({"rotary_seq_len_interpolation_factor": 2.0, "position_embedding_type": "yarn"}, "belongs to rope"),
        ({"rotary_scaling_factor": 0.5}, "at least 1"),
    ],
)
def test_rules(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        GPTModelConfig(**settings).validate()


def test_settings_reach_the_model() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=2)
    yarn = GPTModelConfig(position_embedding_type="yarn", rotary_scaling_factor=8.0, mscale=0.5, vocab_size=90)
    yarn.validate()
    assert yarn.yarn() == YarnScaling(scaling_factor=8.0, mscale=0.5)
    model = build_gpt_model(config, yarn, vocab_size=70, max_sequence_length=16)
    assert model.vocab_size == 90
    assert model.rotary_pos_emb is not None
    assert model.rotary_pos_emb.attention_factor > 1
    llama = GPTModelConfig(use_rotary_position_embeddings=True, use_rope_scaling=True, rope_scaling_factor=4.0)
    scaled = build_gpt_model(config, llama, vocab_size=70, max_sequence_length=16).rotary_pos_emb
    assert scaled is not None
    plain = 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    torch.testing.assert_close(scaled.inverse_frequencies[-1], plain[-1] / 4)
    unpadded = GPTModelConfig(pad_vocab_size=False, share_embeddings_and_output_weights=False)
    model = build_gpt_model(config, unpadded, vocab_size=70, max_sequence_length=16)
    assert model.output_layer.weight.shape == (70, 64)
    assert model.embedding.position_embeddings.weight.shape == (16, 64)
