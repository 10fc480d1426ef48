"""Without other ranks nothing is wrapped, gathered, reduced or copied."""

import pytest
import torch
from torch import nn

from megatron_lite import parallel_state
from megatron_lite.distributed import (
    DistributedDataParallelConfig,
    finalize_model_grads,
    reshard_parameters,
    set_is_last_microbatch,
    wrap_data_parallel,
)
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.optimizer import OptimizerConfig, counts_here, get_megatron_optimizer, global_grad_statistics
from megatron_lite.tensor_parallel import ColumnParallelLinear
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.transformer_config import TransformerConfig


@pytest.fixture
def mesh():
    parallel_state.initialize_model_parallel()
    yield parallel_state.get_dense_mesh()
    parallel_state.shutdown()


@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
def test_one_rank_trains_the_module_itself(mesh, strategy):
    config = ModelParallelConfig()
    model = nn.Sequential(ColumnParallelLinear(4, 3, config=config))
    ddp = DistributedDataParallelConfig(data_parallel_sharding_strategy=strategy)
    assert wrap_data_parallel(model, config, ddp, mesh) is model
    assert type(model) is nn.Sequential
    set_is_last_microbatch(model, False)
    reshard_parameters(model)
    model(torch.ones(2, 4)).sum().backward()
    finalize_model_grads(model, parallel_state.get_tensor_model_parallel_group())
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=0.1), model)
    norm = optimizer.step().grad_norm.item()
    assert norm == pytest.approx((12 * 4 + 3 * 4) ** 0.5)  # 12 weights and 3 biases with gradient 2
    assert set(optimizer.state_dict()) == {
        "optimizer.state.0.weight.momentum_buffer",
        "optimizer.state.0.bias.momentum_buffer",
    }


def test_experts_of_one_rank_are_left_as_they_are(mesh):
    """Mutation: wrap them over their mesh whatever its size."""
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}
    config = TransformerConfig(**sizes)
    model = nn.ModuleDict({"experts": GroupedMLP(2, config)})
    with pytest.raises(AssertionError, match="needs the mesh of the experts"):
        wrap_data_parallel(model, config, DistributedDataParallelConfig(), mesh)
    wrap_data_parallel(model, config, DistributedDataParallelConfig(), mesh, parallel_state.get_expert_mesh())
    assert type(model["experts"]) is GroupedMLP
    set_is_last_microbatch(model, True)
    model["experts"].forward_dispatched(torch.ones(3, 8), torch.ones(3), torch.tensor([3, 0])).sum().backward()
    finalize_model_grads(model, None)
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=0.1), model)
    expected = sum(parameter.grad.full_tensor().square().sum() for parameter in model.parameters())
    assert optimizer.step().grad_norm.item() == pytest.approx(expected.sqrt().item(), rel=1e-6)


def test_a_float16_model_has_its_loss_scaled(mesh):
    config = ModelParallelConfig(fp16=True)
    model = ColumnParallelLinear(4, 3, config=config)
    plain = get_megatron_optimizer(OptimizerConfig(lr=0.1), nn.Sequential(model))
    assert plain.grad_scaler is None
    scaled = get_megatron_optimizer(OptimizerConfig(lr=0.1, initial_loss_scale=1024.0), model)
    scaled.scale_loss(model(torch.ones(2, 4, dtype=torch.float16)).sum()).backward()
    result = scaled.step()
    assert scaled.get_loss_scale() == 1024.0
    assert result.found_inf == 0.0
    assert result.grad_norm.item() == pytest.approx((12 * 4 + 3 * 4) ** 0.5)


def test_plain_tensors_without_any_group():
    assert counts_here(torch.ones(3))
    norm, zeros = global_grad_statistics([torch.ones(3), torch.zeros(0), torch.zeros(1)], torch.device("cpu"), True)
    assert (norm.item(), zeros.item()) == (pytest.approx(3**0.5), 1)
    norm, zeros = global_grad_statistics([], torch.device("cpu"))
    assert norm == 0.0
    assert zeros is None
