"""Rotary embeddings against the formulas of their papers, in float64."""

import math

import pytest
import torch
from torch import Tensor

from megatron_lite.transformer.rope import (
    RotaryEmbedding,
    YarnScaling,
    apply_rotary_pos_emb,
    llama3_inverse_frequencies,
    rotary_inverse_frequencies,
    yarn_attention_factor,
    yarn_inverse_frequencies,
)


def rotate(x: Tensor, positions: Tensor, embedding: RotaryEmbedding) -> Tensor:
    return apply_rotary_pos_emb(x, embedding(positions, x.dtype), embedding.rotary_interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_each_pair_is_turned_by_position_times_frequency(interleaved: bool, percent: float) -> None:
    """As complex numbers (Su et al. 2021, equation 13). Fails with the sign of the sine swapped."""
    generator = torch.Generator().manual_seed(0)
    length, batch, heads, width = 7, 2, 3, 16
    x = torch.randn(length, batch, heads, width, dtype=torch.float64, generator=generator)
    positions = torch.randint(0, 5000, (batch, length), generator=generator)
    turned = rotate(x, positions, RotaryEmbedding(width, percent, interleaved, rotary_base=1000.0))
    dim = int(width * percent)
    for pair in range(dim // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dim // 2)
        angle = positions.t().double() * 1000.0 ** (-2 * pair / dim)
        wanted = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angle), angle)[..., None]
        torch.testing.assert_close(turned[..., first], wanted.real, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(turned[..., second], wanted.imag, rtol=1e-10, atol=1e-11)
    assert torch.equal(turned[..., dim:], x[..., dim:])


def test_grouped_heads_and_expanded_positions_give_the_same() -> None:
    x = torch.randn(5, 2, 2, 3, 8, dtype=torch.float64)
    embedding = RotaryEmbedding(8)
    expanded = torch.arange(5).expand(2, -1)
    assert embedding(expanded)[0].shape == (5, 1, 1, 4)
    assert embedding(expanded.contiguous())[0].shape == (5, 2, 1, 4)
    one_head_axis = rotate(x.flatten(2, 3), expanded.contiguous(), embedding)
    torch.testing.assert_close(rotate(x, expanded, embedding).flatten(2, 3), one_head_axis, rtol=0, atol=0)


def test_angles_of_far_positions_are_exact_in_float32() -> None:
    position = 1_000_003
    cos, sin = RotaryEmbedding(8)(torch.tensor([[position]]), torch.float32)
    assert cos.flatten()[0].item() == pytest.approx(math.cos(position), abs=1e-7)
    assert sin.flatten()[1].item() == pytest.approx(math.sin(position * 0.1), abs=1e-7)


def test_linear_interpolation_divides_positions() -> None:
    positions = torch.arange(0, 40, 4)[None]
    stretched = RotaryEmbedding(8, seq_len_interpolation_factor=4)(positions, torch.float64)
    torch.testing.assert_close(stretched, RotaryEmbedding(8)(positions // 4, torch.float64))


def test_llama3_scaling() -> None:
    """By wavelengths, with Llama 3.1's constants: kept below 8192/4, divided by 8 above 8192, blended between."""
    plain = rotary_inverse_frequencies(128, 500_000.0)
    scaled = llama3_inverse_frequencies(plain)
    kinds = set()
    for frequency, got in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            wanted, kind = frequency, "kept"
        elif wavelength > 8192:
            wanted, kind = frequency / 8, "stretched"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted, kind = (1 - smooth) * frequency / 8 + smooth * frequency, "blended"
        kinds.add(kind)
        assert got == pytest.approx(wanted, rel=1e-12)
    assert kinds == {"kept", "stretched", "blended"}
    assert torch.equal(RotaryEmbedding(128, rotary_base=500_000.0, rope_scaling=True).inverse_frequencies, scaled)


def test_yarn_frequencies() -> None:
    """Pairs that turn more than 32 times over 4096 positions are kept, less than once divided by 40 (section 3.2)."""
    plain = rotary_inverse_frequencies(64, 10_000.0)
    yarn = YarnScaling(scaling_factor=40.0)
    ratio = (yarn_inverse_frequencies(plain, 10_000.0, yarn) / plain).tolist()
    turns = [4096 * frequency / (2 * math.pi) for frequency in plain.tolist()]
    # Where 10000^(2i/64) = 4096 / (turns 2 pi): pair 10.5 turns 32 times, pair 22.5 once; rounded outwards, 10 and 23.
    assert turns[10] > 32 > turns[11]
    assert turns[22] > 1 > turns[23]
    for pair, got in enumerate(ratio):
        share = min(max((pair - 10) / (23 - 10), 0.0), 1.0)
        assert got == pytest.approx((1 - share) + share / 40, rel=1e-12), pair
    exact = YarnScaling(scaling_factor=40.0, correction_range_round_to_int=False)
    low = 64 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10_000))
    high = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(10_000))
    share = (15 - low) / (high - low)
    got = (yarn_inverse_frequencies(plain, 10_000.0, exact) / plain)[15].item()
    assert got == pytest.approx((1 - share) + share / 40, rel=1e-12)


def test_yarn_ends_in_the_wrong_order() -> None:
    """All pairs turn often within a long original context: clamping puts the end of the ramp before its start.

    Mutation: such a ramp taken for a step that keeps all pairs.
    """
    plain = rotary_inverse_frequencies(8, 50.0)
    yarn = YarnScaling(scaling_factor=4.0, original_max_position_embeddings=10**6)
    assert (yarn_inverse_frequencies(plain, 50.0, yarn) / plain).tolist() == pytest.approx([0.25] * 4)


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(YarnScaling(scaling_factor=40.0)) == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn_attention_factor(YarnScaling(scaling_factor=1.0)) == 1.0
    assert yarn_attention_factor(YarnScaling(scaling_factor=16.0, mscale=0.7, mscale_all_dim=0.7)) == 1.0
    embedding = RotaryEmbedding(8, yarn=YarnScaling(scaling_factor=40.0))
    cos, sin = embedding(torch.arange(9)[None], torch.float64)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, (0.1 * math.log(40) + 1) ** 2))


def test_tables_are_rounded_once_to_the_dtype_of_the_input() -> None:
    x = torch.randn(4, 1, 2, 8).bfloat16()
    positions = torch.arange(4)[None]
    embedding = RotaryEmbedding(8)
    assert rotate(x, positions, embedding).dtype == torch.bfloat16
    cos64 = embedding(positions, torch.float64)[0]
    assert torch.equal(embedding(positions, torch.bfloat16)[0], cos64.bfloat16())
