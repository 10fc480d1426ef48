"""LayerNorm and RMSNorm over the last dimension, with statistics in float32 (float64 for float64 input)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import apex
from megatron_lite.ops.rms_norm import rms_norm
from megatron_lite.tensor_parallel.parameters import create_parameter, local
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.transformer_config import TransformerConfig


class _Norm(MegatronModule):
    """What both norms share: a weight, stored minus one under layernorm_zero_centered_gamma.

    Args:
        config: supplies epsilon, the storage dtype and layernorm_zero_centered_gamma.
        hidden_size: size of the last dimension.
        eps: epsilon, default config.layernorm_epsilon.
        partial_over_tp: whether the local weight gradient is a partial sum over the tensor parallel ranks. Default
            config.sequence_parallel: each rank then normalizes its own part of the sequence. Norms of single heads
            see only the heads of their rank, so they pass True whenever TP > 1.
    """

    config: TransformerConfig
    weight: torch.nn.Parameter

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float | None = None,
        partial_over_tp: bool | None = None,
    ) -> None:
        super().__init__(config)
        self.hidden_size = hidden_size
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.partial_over_tp = config.sequence_parallel if partial_over_tp is None else partial_over_tp
        self._create("weight", torch.nn.init.zeros_ if self.zero_centered else torch.nn.init.ones_)

    def _create(self, name: str, init_method: Callable[[Tensor], Tensor]) -> None:
        create_parameter(
            self,
            name,
            (self.hidden_size,),
            init_method=init_method,
            dtype=self.config.main_params_dtype,
            partial_over_tp=self.partial_over_tp,
        )

    def extra_repr(self) -> str:
        """Size and epsilon, for printing."""
        return f"{self.hidden_size}, eps={self.eps}, zero_centered={self.zero_centered}"


class LayerNorm(_Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias, [..., h] -> [..., h]. No communication."""

    bias: torch.nn.Parameter

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float | None = None,
        partial_over_tp: bool | None = None,
    ) -> None:
        super().__init__(config, hidden_size, eps, partial_over_tp)
        self._create("bias", torch.nn.init.zeros_)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h] in the dtype of x."""
        weight, bias = local(self.weight).to(x.dtype), local(self.bias).to(x.dtype)
        if self.config.has_apex_norms:
            return apex.layer_norm(x, weight, bias, self.eps)
        if not self.zero_centered:
            return F.layer_norm(x, (self.hidden_size,), weight, bias, self.eps)
        # 1 + weight would round a small weight away in bfloat16, so the sum is left to the multiplication.
        normalized = F.layer_norm(x, (self.hidden_size,), None, None, self.eps)
        return torch.addcmul(normalized + bias, normalized, weight)


class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), [..., h] -> [..., h]. No communication."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h] in the dtype of x."""
        weight = local(self.weight).to(x.dtype)
        if self.config.has_apex_norms:
            return apex.rms_norm(x, weight, self.eps)
        if not self.zero_centered:
            return rms_norm(x, weight, self.eps)
        normalized = F.rms_norm(x, (self.hidden_size,), None, self.eps)
        return torch.addcmul(normalized, normalized, weight)


def build_norm(config: TransformerConfig, hidden_size: int, partial_over_tp: bool | None = None) -> LayerNorm | RMSNorm:
    """The norm that config.normalization names, over a last dimension of `hidden_size`."""
    kind = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    return kind(config, hidden_size, partial_over_tp=partial_over_tp)
