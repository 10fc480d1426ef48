"""What a layer does on a GPU, followed without one: tensors without data that say they are there.

No operation is computed, so this shows which are chosen, and that torch.compile can follow all of it: on a GPU layers
are compiled by default. Only forward, and without rotary positions: recording for backward and slicing ask CUDA itself.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from megatron_lite.transformer import dot_product_attention
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer

LLAMA = {"num_query_groups": 2, "gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm"}
SIZES = {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 4, "bf16": True, "perform_initialization": False}


# torch's CUDA builds ask the driver which kernels there are, even for tensors without data.
needs_driver = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="a CUDA build of torch without a GPU"
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU with a flash kernel, as far as attention asks."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        dot_product_attention, "choose_backend", lambda _, requested: "eager" if requested == "unfused" else "flash"
    )
    torch._C._ensureCUDADeviceGuardSet()
    with FakeTensorMode(), torch.no_grad():
        yield
    torch._dynamo.reset()


def operations(**settings: Any) -> list[str]:
    """Names of what a compiled layer calls, in order, if it is one graph."""
    with torch.device("cuda"):
        layer = TransformerLayer(TransformerConfig(**{**SIZES, **settings}))
        x = torch.empty(64, 2, 256, dtype=torch.bfloat16)
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    output = torch.compile(layer, fullgraph=True, backend=keep)(x)
    assert (output.shape, output.device.type, output.dtype) == (x.shape, "cuda", torch.bfloat16)
    (graph,) = graphs
    return [str(node.args[0]) if "from_string" in node.name else node.name for node in graph.graph.nodes]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        LLAMA | {"qk_layernorm": True},
        {"attention_output_gate": True, "layernorm_zero_centered_gamma": True},
        {"fp32_residual_connection": True, "attention_backend": "unfused"},
        LLAMA | {"fp8": "hybrid"},
        LLAMA | {"fp8": "e4m3", "fp8_recipe": "rowwise"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("hopper")
def test_a_compiled_layer_is_one_graph(settings: dict[str, Any]) -> None:
    """Mutations: choose the attention kernel in an ExitStack, or by what is no constant for the compiler."""
    assert operations(**settings)


@pytest.mark.parametrize(
    ("requested", "first"),
    [
        ("auto", None),
        pytest.param("flash", "FLASH_ATTENTION", marks=needs_driver),
        pytest.param("fused", "CUDNN_ATTENTION", marks=needs_driver),
        ("unfused", "MATH"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_the_attention_kernel(requested: str, first: str | None) -> None:
    """The one that is asked for, or torch's choice. Mutation: nothing handed on."""
    kernels = [name for name in operations(attention_backend=requested) if name.isupper()]
    assert (kernels or [None])[0] == first
