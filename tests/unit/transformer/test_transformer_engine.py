"""Transformer Engine's layers behind ours, with a stand-in for the package, which needs a GPU."""

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.pipeline_parallel.pipelined import PipelinedForwardBackward
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron_lite.transformer.rope import RotaryEmbedding
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer
from tests import transformer_engine_stand_in as stand_in

SIZES = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
LINEARS = 4


def build(impl: str, **settings: Any) -> TransformerLayer:
    torch.manual_seed(1)
    return TransformerLayer(TransformerConfig(**{**SIZES, **settings}, transformer_impl=impl))


def results(layer: TransformerLayer, mask: Tensor | None = None, length: int = 12) -> list[Tensor]:
    """Output, and gradients of the input and of every weight."""
    model_parallel_cuda_manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, 2, 32, generator=generator, dtype=layer.config.params_dtype).requires_grad_()
    rotary = RotaryEmbedding(layer.config.rotary_channels)(torch.arange(length)[None])
    output = layer(x, mask, rotary)
    factor = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad((output * factor).sum(), [x, *layer.parameters()])]


def both(mask: Tensor | None = None, **settings: Any) -> Counter[str]:
    """Compare the package with torch, and say what of it was called."""
    wanted = results(build("local", **settings), mask)
    with stand_in.installed():
        layer = build("transformer_engine", **settings)
        found = results(layer, mask)
        assert [name for name, _ in layer.named_parameters()] == [
            name for name, _ in build("local", **settings).named_parameters()
        ]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        return Counter(stand_in.calls)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_query_groups": 2, "gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm"},
        {"window_size": (3, 0)},
        {"softmax_scale": 0.5, "recompute_granularity": "selective"},
        {"layernorm_zero_centered_gamma": True, "kv_channels": 16},
    ],
    ids=str,
)
def test_a_layer_computes_the_same(settings: dict[str, Any]) -> None:
    """Mutations: no bias; the window not handed on; torch's scale; weights of the module instead of the layer's."""
    again = 2 if settings.get("recompute_granularity") else 1
    assert both(**settings) == {"linear": LINEARS, "causal": again}


@pytest.mark.parametrize(
    "settings",
    [
        {"softmax_type": "learnable"},
        {"attention_backend": "flash"},
        {"attention_dropout": 0.1},
    ],
    ids=str,
)
def test_attention_that_is_left_to_torch(settings: dict[str, Any]) -> None:
    """Sinks, a backend that is asked for, dropout. Mutation: any of these handed over, where it would be lost."""
    assert both(**settings) == {"linear": LINEARS}


def test_masks_and_decoding_are_left_to_torch() -> None:
    """Mutation: hand over a mask; as many queries as keys not asked for."""
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    mask[..., 3] = True
    assert both(mask) == {"linear": LINEARS}
    with stand_in.installed():
        attention = build("transformer_engine").self_attention.core_attention
        attention(torch.randn(1, 2, 4, 8), torch.randn(5, 2, 4, 8), torch.randn(5, 2, 4, 8))
        assert not stand_in.calls


def test_layers_in_fp8_stay_torch() -> None:
    """Their scales belong to logical tensors. Mutation: replace every product."""
    assert both(fp64=True, fp8="hybrid") == {"causal": 1}


def test_layers_are_built_without_the_package_and_differentiated_once() -> None:
    """A dry run builds them. Its Function lets go of what backward needs, so schedules must not split it.

    Mutations: the package's layer made at once; gradients of weights computed apart.
    """
    layer = build("transformer_engine")
    assert "transformer_engine.pytorch" not in sys.modules
    for impl, splits in (("local", True), ("transformer_engine", False)):
        config = SimpleNamespace(schedule="zbv", gradients_together=build(impl).config.gradients_together)
        pipelined: Any = SimpleNamespace(config=config)
        assert PipelinedForwardBackward._splits_backward(pipelined, layer) == splits


def check_layer(rank: int, world_size: int, sequence_parallel: bool) -> list[float]:
    """Deviations of the package's layer from ours at tensor parallel size `world_size`."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    split = {
        "tensor_model_parallel_size": world_size,
        "sequence_parallel": sequence_parallel,
        "gated_linear_unit": True,
    }
    wanted = run_part(build("local", **split), rank)
    with stand_in.installed():
        found = run_part(build("transformer_engine", **split), rank)
        assert Counter(stand_in.calls) == {"linear": LINEARS, "causal": 1}
    return [(one - other).abs().max().item() for one, other in zip(found, wanted, strict=True)]


def run_part(layer: TransformerLayer, rank: int) -> list[Tensor]:
    """`results` with this rank's part of the sequence under sequence parallelism."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, 2, 32, generator=generator)
    x = whole.chunk(2)[rank] if layer.config.sequence_parallel else whole
    x.requires_grad_()
    output = layer(x, None, RotaryEmbedding(layer.config.rotary_channels)(torch.arange(12)[None]))
    gradients = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    return [output.detach(), *(local(gradient) for gradient in gradients)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_with_tensor_parallelism(pool: Any, sequence_parallel: bool) -> None:
    """A column layer brings its communication, a row layer is summed by ours.

    Mutations: sequence_parallel not handed on; parallel_mode row, which sums twice; no group.
    """
    for deviations in pool.run(check_layer, sequence_parallel, world_size=2):
        assert max(deviations) < 1e-5
