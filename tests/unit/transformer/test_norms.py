"""Norms against their formulas, and in bfloat16 against float64."""

import pytest
import torch

from megatron_lite.transformer.norms import LayerNorm, RMSNorm, build_norm
from megatron_lite.transformer.transformer_config import TransformerConfig


def config(**settings: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_formula(normalization: str, zero_centered: bool) -> None:
    """Fails if layernorm_zero_centered_gamma does not add one, or epsilon is left out."""
    norm = build_norm(
        config(
            normalization=normalization,
            layernorm_zero_centered_gamma=zero_centered,
            fp64=True,
            layernorm_epsilon=0.1,
        ),
        64,
    )
    assert norm.weight.dtype == torch.float64
    assert norm.weight.eq(0.0 if zero_centered else 1.0).all()
    x = torch.randn(3, 2, 64, dtype=torch.float64) * 2 + 1
    with torch.no_grad():
        norm.weight.normal_()
    gain = norm.weight + (1 if zero_centered else 0)
    if isinstance(norm, LayerNorm):
        with torch.no_grad():
            norm.bias.normal_()
        wanted = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, unbiased=False) + 0.1
        ).sqrt() * gain + norm.bias
    else:
        assert isinstance(norm, RMSNorm)
        wanted = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * gain
    torch.testing.assert_close(norm(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_statistics_are_float32_for_bfloat16_input(normalization: str, zero_centered: bool) -> None:
    """The sum of 4096 squares near 1 would be off by several percent in bfloat16."""
    settings = {"normalization": normalization, "layernorm_zero_centered_gamma": zero_centered}
    narrow = build_norm(config(bf16=True, **settings), 4096)
    wide = build_norm(config(fp64=True, **settings), 4096)
    with torch.no_grad():
        narrow.weight.add_(torch.rand(4096) * 1e-3)
        wide.weight.copy_(narrow.weight)
    x = (torch.randn(2, 4096) + 3).bfloat16()
    got, wanted = narrow(x), wide(x.double())
    assert got.dtype == torch.bfloat16
    assert ((got.double() - wanted).abs() <= 2**-7 * wanted.abs().clamp(min=0.1)).all()
    shifted = (got.double() / wanted)[wanted.abs() > 0.5]
    assert abs(shifted.mean().item() - 1) < 1e-3, "rounding errors average out, a wrong statistic does not"
