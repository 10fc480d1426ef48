"""The count of operations against torch's own counter and against a published model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_lite.models.gpt.flops import num_floating_point_operations
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.models.gpt.parameter_count import count_parameters
from megatron_lite.transformer.transformer_config import TransformerConfig


@pytest.mark.parametrize(
    "settings", [{}, {"swiglu": True, "num_query_groups": 2, "kv_channels": 16}, {"num_query_groups": 1}]
)
def test_equals_torchs_counter(settings: dict[str, object]) -> None:
    """torch counts a forward pass with whole attention; three of them, less the masked half, is a training step."""
    config = TransformerConfig(num_layers=3, hidden_size=32, num_attention_heads=4, **settings)  # type: ignore[arg-type]
    batch, length = 2, 16
    model = GPTModel(config, 100, length)
    ids = torch.randint(0, 100, (batch, length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids, torch.arange(length).expand(batch, -1))
    queries = config.num_attention_heads * (config.kv_channels or 0)
    masked_half = 0.5 * config.num_layers * batch * 4 * queries * length**2
    wanted = 3 * (counter.get_total_flops() - masked_half)
    assert num_floating_point_operations(config, model.padded_vocab_size, batch, length) == wanted


MIXED = {"num_moe_experts": 4, "moe_router_topk": 3, "moe_layer_freq": [0, 1, 1], "moe_ffn_hidden_size": 24}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_moe_experts": 4},
        MIXED,
        MIXED | {"swiglu": True, "moe_shared_expert_intermediate_size": 40},
        MIXED | {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_layer_freq": 2},
    ],
)
def test_experts_equal_torchs_counter(settings: dict[str, object]) -> None:
    """As above, less the router's product, which Megatron's formula leaves out: 2 h E a token and layer of experts.

    Mutations: without topk, with the dense width for experts, or counting all layers alike, every case differs.
    """
    config = TransformerConfig(num_layers=3, hidden_size=32, num_attention_heads=4, **settings)  # type: ignore[arg-type]
    batch, length = 2, 16
    model = GPTModel(config, 100, length)
    ids = torch.randint(0, 100, (batch, length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids, torch.arange(length).expand(batch, -1))
    queries = config.num_attention_heads * (config.kv_channels or 0)
    masked_half = 0.5 * config.num_layers * batch * 4 * queries * length**2
    routers = config.num_moe_layers * 2 * batch * length * config.hidden_size * (config.num_moe_experts or 0)
    wanted = 3 * (counter.get_total_flops() - masked_half - routers)
    assert num_floating_point_operations(config, model.padded_vocab_size, batch, length) == wanted


def test_parameters_that_a_token_meets() -> None:
    """Mutations: counting experts as active, or 1 of them instead of topk, changes the second number."""
    config = TransformerConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, add_bias_linear=False, **MIXED  # type: ignore[arg-type]
    )  # fmt: skip
    model = GPTModel(config, 100, 16)
    count = count_parameters(model, config)
    one_expert = 2 * 32 * 24
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.experts == 2 * 4 * one_expert
    assert count.active == count.total - 2 * one_expert


def test_llama3_8b() -> None:
    """6 operations per token and weight of a matrix product, plus attention; 8.03 G weights, 0.53 embed."""
    config = TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        swiglu=True,
    )
    weights = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    attention = 6 * 4096 * 8192 * 32
    assert num_floating_point_operations(config, 128_256, 1, 8192) == 8192 * (6 * weights + attention)
