"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extensions to long contexts.

The angle of pair i at position p is p * inverse_frequencies[i]. Linear interpolation, Llama 3's scaling and YaRN
differ in the inverse frequencies (and, YaRN, in the length of the rotated vectors) and in nothing else.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_lite.host_copies import copy_to_device

RotaryTables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class YarnScaling:
    """Settings of YaRN (Peng et al. 2023, arXiv:2309.00071); names and defaults as in Megatron."""

    scaling_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    correction_range_round_to_int: bool = True


def rotary_inverse_frequencies(dim: int, base: float) -> Tensor:
    """base^(-2i/dim) for i = 0 .. dim/2 - 1, as [dim/2] in float64 on the CPU."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return base**-exponents


def llama3_inverse_frequencies(
    frequencies: Tensor,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position_embeddings: int = 8192,
) -> Tensor:
    """Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    rotations = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


def yarn_inverse_frequencies(frequencies: Tensor, base: float, yarn: YarnScaling) -> Tensor:
    """YaRN's "NTK by parts": pairs that turn often are kept, slow ones interpolated, with a linear ramp between."""
    dim = 2 * frequencies.numel()

    def pair_that_turns(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.correction_range_round_to_int:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    # Where clamping has put the ends in the wrong order the ramp falls, as in Megatron and transformers.
    interpolated = ((pairs - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return frequencies * (1.0 - interpolated + interpolated / yarn.scaling_factor)


def yarn_temperature(yarn: YarnScaling, mscale: float) -> float:
    """The factor on the length of queries and keys by which YaRN sharpens attention (its equation 22), weighted."""
    return 0.1 * mscale * math.log(yarn.scaling_factor) + 1.0 if yarn.scaling_factor > 1 else 1.0


def yarn_attention_factor(yarn: YarnScaling) -> float:
    """The factor on cos and sin (so, squared, on the scores of what is rotated): its temperature, less that of all."""
    return yarn_temperature(yarn, yarn.mscale) / yarn_temperature(yarn, yarn.mscale_all_dim)


class RotaryEmbedding(torch.nn.Module):
    """Cosines and sines for given positions.

    It has no parameters and no buffers, so it needs nothing after a build on the meta device, and positions come from
    the caller: a slice of a sequence, a packed document or a decoding step get the angles of their true positions.

    Args:
        kv_channels: width d of a head.
        rotary_percent: share of the head that is rotated; the rest passes unchanged.
        rotary_interleaved: pairs are neighbours (2i, 2i+1) instead of (i, i + dim/2).
        seq_len_interpolation_factor: divides the positions (linear interpolation, Chen et al. 2023).
        rotary_base: base of the geometric series of wavelengths.
        rope_scaling: apply Llama 3.1's rule with `rope_scaling_factor`.
        yarn: apply YaRN with these settings.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float = 1.0,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        yarn: YarnScaling | None = None,
    ) -> None:
        super().__init__()
        frequencies = rotary_inverse_frequencies(int(kv_channels * rotary_percent), rotary_base)
        if rope_scaling:
            frequencies = llama3_inverse_frequencies(frequencies, rope_scaling_factor)
        if yarn is not None:
            frequencies = yarn_inverse_frequencies(frequencies, rotary_base, yarn)
        if seq_len_interpolation_factor is not None:
            frequencies = frequencies / seq_len_interpolation_factor
        self.inverse_frequencies = frequencies
        self.rotary_interleaved = rotary_interleaved
        self.attention_factor = 1.0 if yarn is None else yarn_attention_factor(yarn)
        self._on_device: dict[torch.device, Tensor] = {}

    def forward(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> RotaryTables:
        """Positions [b, s] -> (cos, sin), each [s, b, 1, dim/2] in `dtype`.

        Angles are computed in float64: position 100,000 in float32 would be off by 1e-2 radian. Positions expanded
        over the batch (stride 0) give [s, 1, 1, dim/2], which broadcasts.
        """
        if position_ids.stride(0) == 0:
            position_ids = position_ids[:1]
        device = position_ids.device
        if device not in self._on_device:
            self._on_device[device] = copy_to_device(self.inverse_frequencies, device)
        angles = (position_ids.t().unsqueeze(-1) * self._on_device[device]).unsqueeze(2)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def apply_rotary_pos_emb(x: Tensor, tables: RotaryTables, rotary_interleaved: bool = False) -> Tensor:
    """Rotate each pair of the first dim channels by its angle; the remaining channels pass unchanged.

    Args:
        x: [s, b, ..., d], any number of head dimensions.
        tables: (cos, sin), each [s, b or 1, 1, dim/2], in the dtype of x.
        rotary_interleaved: pairs are neighbours (2i, 2i+1) instead of (i, i + dim/2).

    Returns:
        [s, b, ..., d] in the dtype of x.
    """
    cos, sin = (table.reshape(*table.shape[:2], *[1] * (x.dim() - 3), -1) for table in tables)
    return _Rotate.apply(x, cos, sin, rotary_interleaved)  # type: ignore[no-any-return]


class _Rotate(Function):
    """The gradient is rotated back by the same angles, so nothing is kept but the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin, ctx.interleaved), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x cos + partner(x) sin, where the partner of (first, second) is (-second, first)."""
    dim = 2 * cos.size(-1)
    turning = x[..., :dim]
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
    partner = _joined(second, first, interleaved)
    turned = partner.mul_(_joined(-sin, sin, interleaved)).addcmul_(turning, _joined(cos, cos, interleaved))
    return turned if dim == x.size(-1) else torch.cat((turned, x[..., dim:]), dim=-1)


def _joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """The channels of all pairs in their places: two of [..., dim/2] -> [..., dim]."""
    return torch.stack((first, second), dim=-1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
