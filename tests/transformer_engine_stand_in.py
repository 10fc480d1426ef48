"""What this framework uses of transformer_engine.pytorch, computed by torch, on any device."""

import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.tensor_parallel.linear import linear_with_grad_accumulation_and_async_allreduce
from megatron_lite.transformer import transformer_engine


class Linear(nn.Module):
    """Its Linear: sizes are those of the whole layer where a parallel_mode is given."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert parallel_mode in (None, "column")
        assert (parallel_mode is None) == (tp_group is None)
        assert tp_size == (1 if tp_group is None else tp_group.size())
        shape = (out_features // tp_size, in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        assert not bias
        self.tp_group, self.sequence_parallel = tp_group, sequence_parallel

    def forward(self, inp: Tensor) -> Tensor:
        """[..., k] -> [..., n]; the real one insists on the dtypes too."""
        assert self.weight.device.type != "meta", "a call without the layer's weight"
        assert inp.dtype == self.weight.dtype
        calls.append("linear")
        return linear_with_grad_accumulation_and_async_allreduce(
            inp, self.weight, sequence_parallel=self.sequence_parallel, tp_group=self.tp_group
        )


class DotProductAttention(nn.Module):
    """Its DotProductAttention, for the format sbhd: [s, b, n, d] -> [s, b, n d]."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int,
        attention_dropout: float,
        qkv_format: str,
        softmax_scale: float,
    ) -> None:
        super().__init__()
        assert qkv_format == "sbhd"
        assert attention_dropout == 0.0
        self.shapes = (num_attention_heads, kv_channels), (num_gqa_groups, kv_channels)
        self.scale = softmax_scale

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attn_mask_type: str, window_size: Any
    ) -> Tensor:
        """The window counts keys before and after; a causal one has none after."""
        calls.append(attn_mask_type)
        assert (query_layer.shape[2:], key_layer.shape[2:]) == self.shapes
        assert value_layer.shape == key_layer.shape
        left, right = window_size
        assert attn_mask_type in ("causal", "no_mask")
        assert attn_mask_type == "no_mask" or right == 0
        distance = torch.arange(query_layer.size(0))[:, None] - torch.arange(key_layer.size(0))
        visible = (left < 0) | (distance <= left)
        visible = visible & ((right < 0) | (-distance <= right))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


calls: list[str] = []
"""What was called since the stand-in was installed."""


def installed() -> Any:
    """Context in which the package is this stand-in."""
    fake = ModuleType("transformer_engine.pytorch")
    fake.Linear, fake.DotProductAttention = Linear, DotProductAttention  # type: ignore[attr-defined]
    calls.clear()
    transformer_engine._attention.cache_clear()
    return mock.patch.dict(sys.modules, {"transformer_engine.pytorch": fake})
