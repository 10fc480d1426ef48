"""Linear layers and attention by NVIDIA's Transformer Engine (--transformer-impl transformer_engine).

Its modules are made without weights of their own, and each call lends them those of our layers. So weights are stored,
split, initialized and saved as in any other run, and a checkpoint of one is a checkpoint of the other. Norms are not
its business, as torch's are one kernel each; experts: ops/grouped_linear.py; fp8: ops/fp8_linear.py, whose scales
belong to logical tensors and not to a rank's part.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.transformer_config import TransformerConfig


def use_transformer_engine(layer: nn.Module, config: TransformerConfig) -> None:
    """Let the package compute the linear layers inside a transformer layer, but those in fp8, and its attention."""
    if config.transformer_impl != "transformer_engine":
        return
    for module in layer.modules():
        if isinstance(module, DotProductAttention) and config.attention_backend == "auto":
            module.whole_attention = attend
        is_linear = isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and not module.is_expert
        if is_linear and module.product is None:
            module.product = EngineLinear(module, config.params_dtype)


@dataclass
class EngineLinear:
    """x weight^T + b: [..., k] x [n, k] -> [..., n] in the dtype of x.

    In a column layer with its communication: x is gathered along dim 0 under sequence parallelism, and its gradient is
    summed over the ranks (and scattered) while that of the weight is computed.

    Attributes:
        layer: ours.
        dtype: of x and the weight.
    """

    layer: ColumnParallelLinear | RowParallelLinear
    dtype: torch.dtype

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`weight` is this rank's shard in the dtype of x."""
        output: Tensor = torch.func.functional_call(self._module, {"weight": weight}, (x,))
        return output if bias is None else output + bias

    @functools.cached_property
    def _module(self) -> nn.Module:
        """The package's layer, made when it is first called; what a row layer computes is summed by ours."""
        layer = self.layer
        options: dict[str, Any] = {"bias": False, "params_dtype": self.dtype, "device": "meta"}
        if isinstance(layer, RowParallelLinear):
            sizes = layer.input_size_per_partition, layer.output_size
        else:
            sizes = layer.input_size, layer.output_size
            if layer.communicates:
                options |= {"parallel_mode": "column", "tp_group": layer.tp_group}
                options |= {"tp_size": layer.tp_size, "sequence_parallel": layer.sequence_parallel}
        return _package().Linear(*sizes, **options)  # type: ignore[no-any-return]


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, window_size: tuple[int, int] | None
) -> Tensor:
    """softmax(query key^T * scale) value: [s, b, n, d], keys and values [s, b, g, d] -> [s, b, n, d].

    Args:
        query, key, value: of whole sequences, as many queries as keys if `causal`.
        causal: query i sees no key after i.
        scale: factor on the scores.
        window_size: how many keys before and after its own a query sees, -1 for all; None for all.
    """
    module = _attention(query.size(2), key.size(2), query.size(3), scale)
    left, right = window_size or (-1, -1)
    window = (left, 0 if causal else right)
    output = module(query, key, value, attn_mask_type="causal" if causal else "no_mask", window_size=window)
    return output.view(query.shape)  # type: ignore[no-any-return]


@functools.cache
def _attention(heads: int, groups: int, channels: int, scale: float) -> nn.Module:
    """The package's attention, which has no weights and may serve all layers."""
    return _package().DotProductAttention(  # type: ignore[no-any-return]
        heads, channels, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="sbhd", softmax_scale=scale
    )


def _package() -> Any:
    return importlib.import_module("transformer_engine.pytorch")
