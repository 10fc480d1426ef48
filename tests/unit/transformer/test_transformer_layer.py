"""What a layer and its parts promise beyond the equations, which the model's tests check."""

from typing import Any

import pytest
import torch

from megatron_lite.tensor_parallel import model_parallel_cuda_manual_seed
from megatron_lite.transformer.attention import SelfAttention
from megatron_lite.transformer.mlp import MLP
from megatron_lite.transformer.transformer_block import TransformerBlock
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer, hidden_dropout


def config(**settings: Any) -> TransformerConfig:
    shape = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "fp64": True, "init_method_std": 0.3}
    return TransformerConfig(**{**shape, **settings})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_gates_are_the_even_rows_whichever_way_they_are_sorted(activation: str, bias: bool) -> None:
    """Few tokens reorder the output, many the weight; both give the same, gradients included."""
    torch.manual_seed(0)
    mlp = MLP(config(add_bias_linear=bias, **{activation: True}))
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    many = torch.randn(200, 1, 32, dtype=torch.float64, requires_grad=True)
    one_by_one = torch.cat([mlp(many[index : index + 1]) for index in range(200)])
    together = mlp(many)
    torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-10)
    inputs = [many, *mlp.parameters()]
    weights = torch.randn_like(together)
    for ours, theirs in zip(
        torch.autograd.grad((together * weights).sum(), inputs),
        torch.autograd.grad((one_by_one * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-8)


def test_names_and_shapes_are_megatrons() -> None:
    layer = TransformerLayer(config(num_query_groups=2, qk_layernorm=True, add_bias_linear=False, add_qkv_bias=True))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "input_layernorm.weight": (32,),
        "input_layernorm.bias": (32,),
        "self_attention.linear_qkv.weight": (64, 32),
        "self_attention.linear_qkv.bias": (64,),
        "self_attention.q_layernorm.weight": (8,),
        "self_attention.q_layernorm.bias": (8,),
        "self_attention.k_layernorm.weight": (8,),
        "self_attention.k_layernorm.bias": (8,),
        "self_attention.linear_proj.weight": (32, 32),
        "pre_mlp_layernorm.weight": (32,),
        "pre_mlp_layernorm.bias": (32,),
        "mlp.linear_fc1.weight": (128, 32),
        "mlp.linear_fc2.weight": (32, 128),
    }


def test_a_stage_names_its_layers_by_their_global_index() -> None:
    stage = TransformerBlock(config(window_size=(2, 0), window_attn_skip_freq=2), [2, 3], post_process=False)
    assert list(stage.layers) == ["2", "3"]
    assert stage.final_layernorm is None
    windows = [layer.self_attention.core_attention.window_size for layer in stage.layers.values()]
    assert windows == [(2, 0), None], "layers 3 and 4, counted from 1"


def test_parameters_keep_float32_masters_and_layers_compute_in_the_dtype_of_the_input() -> None:
    attention = SelfAttention(config(fp64=False, bf16=True), 1)
    assert {parameter.dtype for parameter in attention.parameters()} == {torch.float32}
    assert attention(torch.randn(4, 2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_hidden_dropout_draws_from_the_stream_of_its_activations() -> None:
    """T12. Fails with the two streams exchanged."""
    x = torch.ones(50, 2, 8)
    model_parallel_cuda_manual_seed(5, tp_rank=0)
    default = torch.get_rng_state()
    split = hidden_dropout(x, 0.5, training=True, sequence_parallel=True)
    assert torch.equal(torch.get_rng_state(), default)
    shared = hidden_dropout(x, 0.5, training=True, sequence_parallel=False)
    assert not torch.equal(torch.get_rng_state(), default)
    model_parallel_cuda_manual_seed(5, tp_rank=1)
    assert not torch.equal(hidden_dropout(x, 0.5, training=True, sequence_parallel=True), split)
    assert torch.equal(hidden_dropout(x, 0.5, training=True, sequence_parallel=False), shared)
    assert set(shared.unique().tolist()) == {0.0, 2.0}
    assert hidden_dropout(x, 0.5, training=False, sequence_parallel=True) is x
