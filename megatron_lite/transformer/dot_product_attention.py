"""Scaled dot product attention on torch's SDPA: causal, sliding-window and explicit masks, grouped queries."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.random import get_cuda_rng_tracker
from megatron_lite.transformer.enums import AttnMaskType
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.transformer_config import TransformerConfig

_BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "fused": [SDPBackend.CUDNN_ATTENTION],
    "unfused": [SDPBackend.MATH],
    "local": [SDPBackend.MATH],
}


class DotProductAttention(MegatronModule):
    """softmax(query key^T * scale + mask) value, for the heads of this rank. No communication, no parameters.

    The softmax is computed in float32 (float64 for float64 input) by every backend. Dropout on the probabilities
    draws from the model parallel stream, because the heads differ between tensor parallel ranks.

    Args:
        config: supplies attention_dropout, window_size, window_attn_skip_freq, softmax_scale, attention_backend.
        layer_number: number of the layer, counted from 1; decides about the sliding window.
        attn_mask_type: default causal for self-attention and no_mask for cross-attention.
        attention_type: "self" or "cross".
        attention_dropout: default config.attention_dropout.
        softmax_scale: default config.softmax_scale, else 1 / sqrt(d).
        cp_comm_type: how context parallel ranks exchange keys and values; unused while context_parallel_size is 1.
        pg_collection: accepted for Megatron's signature; attention on local heads needs no group.

    Raises:
        ConfigError: an unknown attention_type, or context_parallel_size above 1.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        if attention_type not in ("self", "cross"):
            raise ConfigError(f"attention_type is {attention_type!r}, but it must be 'self' or 'cross'.")
        if config.context_parallel_size > 1:
            raise ConfigError(
                f"context_parallel_size is {config.context_parallel_size}, but this attention sees whole sequences "
                "only; use context_parallel_size 1."
            )
        if attn_mask_type is None:
            attn_mask_type = AttnMaskType.causal if attention_type == "self" else AttnMaskType.no_mask
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.window_size = config.window_size if uses_window(config, layer_number) else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, n, d].
            key: [sk, b, g, d] with g dividing n: head i uses group i // (n / g).
            value: [sk, b, g, d].
            attention_mask: bool, True where attention is forbidden, broadcastable to [b, n, sq, sk]. A causal mask
                type forbids later positions too, so the mask may leave them out.
            attn_mask_type: overrides the type given at construction.
            attention_bias: not supported, must be None.
            packed_seq_params: not supported, must be None.

        Returns:
            [sq, b, n * d]. A query that may look nowhere gives zeros.

        Raises:
            ConfigError: attention_bias or packed_seq_params is given, or the mask is not boolean.
        """
        if attention_bias is not None or packed_seq_params is not None:
            unsupported = "attention_bias" if attention_bias is not None else "packed_seq_params"
            raise ConfigError(f"{unsupported} is given, but DotProductAttention supports masks only; pass None.")
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise ConfigError(
                f"attention_mask has dtype {attention_mask.dtype}, but it must be torch.bool, True where attention is "
                "forbidden."
            )
        causal = (attn_mask_type or self.attn_mask_type).is_causal
        lengths = query.size(0), key.size(0)
        plain = attention_mask is None and self._needs_no_mask(*lengths, causal)
        visible = None if plain else visible_positions(*lengths, causal, self.window_size, query.device)
        if visible is not None and attention_mask is not None:
            visible = visible & ~attention_mask
        dropout = self.attention_dropout if self.training else 0.0
        with contextlib.ExitStack() as scope:
            if dropout > 0.0:
                scope.enter_context(get_cuda_rng_tracker().fork())
            if self.config.attention_backend in _BACKENDS:
                scope.enter_context(sdpa_kernel(_BACKENDS[self.config.attention_backend]))
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=visible,
                dropout_p=dropout,
                is_causal=plain and causal and lengths[0] > 1,
                scale=self.softmax_scale,
                enable_gqa=key.size(2) != query.size(2),
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _needs_no_mask(self, query_length: int, key_length: int, causal: bool) -> bool:
        """Whether SDPA's own triangle (or no mask at all) says what may be seen."""
        left, right = self.window_size or (-1, -1)
        reaches_back = left < 0 or left >= key_length - 1
        reaches_on = causal or right < 0 or right >= key_length - 1
        return reaches_back and reaches_on and (not causal or query_length in (1, key_length))


def uses_window(config: TransformerConfig, layer_number: int) -> bool:
    """Whether layer `layer_number` (counted from 1) sees a sliding window instead of the whole sequence.

    window_attn_skip_freq N leaves full attention to every N-th layer; a list holds 1 (window) or 0 (full) per layer.
    """
    if config.window_size is None:
        return False
    frequency = config.window_attn_skip_freq
    if frequency is None:
        return True
    if isinstance(frequency, int):
        return layer_number % frequency != 0
    return bool(frequency[layer_number - 1])


def visible_positions(
    query_length: int,
    key_length: int,
    causal: bool,
    window_size: tuple[int, int] | None,
    device: torch.device,
) -> Tensor:
    """The mask [sq, sk] of the key positions each query may look at.

    The last query stands at the last key: a decoding step brings fewer queries than there are keys in the cache.
    """
    left, right = window_size or (-1, -1)
    queries = torch.arange(key_length - query_length, key_length, device=device).unsqueeze(1)
    keys = torch.arange(key_length, device=device).unsqueeze(0)
    visible = keys <= queries if causal else torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible & (keys >= queries - left)
    if right >= 0:
        visible = visible & (keys <= queries + right)
    return visible
