"""Tensor parallel layers in one process, with and without a process group: the plain layers they are named after."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, local
from megatron_lite.tensor_parallel.layers import look_up
from megatron_lite.tensor_parallel.linear import linear_with_grad_accumulation_and_async_allreduce

CONFIG = ModelParallelConfig()


@pytest.fixture(params=[False, True], ids=["no group", "group of one"])
def _group(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param:
        parallel_state.initialize_model_parallel()
    yield
    parallel_state.shutdown()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("layer_type", [ColumnParallelLinear, RowParallelLinear])
def test_a_linear_layer_alone(layer_type: type[ColumnParallelLinear] | type[RowParallelLinear]) -> None:
    layer = layer_type(12, 8, config=CONFIG)
    x = torch.randn(2, 5, 12)
    output = layer(x)
    assert torch.equal(output, F.linear(x, local(layer.weight), local(layer.bias)))
    output.sum().backward()
    assert isinstance(layer.weight, DTensor) == parallel_state.is_initialized()
    assert local(layer.weight.grad).shape == (8, 12)
    assert not local(layer.bias).any()
    assert 0.01 < local(layer.weight).std() < 0.03


@pytest.mark.usefixtures("_group")
def test_sequence_parallelism_over_one_rank_changes_nothing() -> None:
    config = ModelParallelConfig(sequence_parallel=True)
    x = torch.randn(5, 2, 12)
    for layer in (ColumnParallelLinear(12, 8, config=config), RowParallelLinear(12, 8, config=config)):
        assert layer(x).shape == (5, 2, 8)
        assert not layer.parameter_specs["bias"].partial_over_tp


@pytest.mark.usefixtures("_group")
def test_an_embedding_alone() -> None:
    layer = VocabParallelEmbedding(10, 4, config=CONFIG)
    ids = torch.tensor([[0, 9, 3]])
    assert torch.equal(layer(ids), F.embedding(ids, local(layer.weight)))
    with pytest.raises(IndexError):
        layer(torch.tensor([[10]]))
    transposed = VocabParallelEmbedding(10, 4, config=CONFIG, reduce_scatter_embeddings=True)
    assert transposed(ids).shape == (3, 1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_frequent_id_is_summed_in_float32(dtype: torch.dtype) -> None:
    """T25. 3000 times one: bfloat16 stops at 256, float16 at 2048. Mutation: F.embedding on the table itself."""
    table = torch.zeros(4, 2, dtype=dtype, requires_grad=True)
    look_up(torch.full((3000,), 1), table).sum().backward()
    assert table.grad is not None
    assert table.grad.dtype == dtype
    assert table.grad[1].tolist() == torch.tensor([3000.0, 3000.0]).to(dtype).tolist()


def test_one_process_takes_no_detour_through_an_autograd_function() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    output = linear_with_grad_accumulation_and_async_allreduce(x, torch.randn(5, 4))
    assert "Async" not in output.grad_fn.name()


def test_bias_is_returned_only_when_its_addition_is_skipped() -> None:
    x = torch.randn(2, 12)
    for layer_type in (ColumnParallelLinear, RowParallelLinear):
        output, bias = layer_type(12, 8, config=CONFIG, skip_bias_add=True)(x)
        assert (output.shape, bias.shape) == ((2, 8), (8,))
        output, bias = layer_type(12, 8, config=CONFIG, skip_bias_add=True, bias=False)(x)
        assert bias is None
        assert isinstance(layer_type(12, 8, config=CONFIG, bias=False)(x), torch.Tensor)


def test_a_layer_without_a_weight_is_given_one() -> None:
    layer = ColumnParallelLinear(12, 8, config=CONFIG, bias=False, skip_weight_param_allocation=True)
    assert list(layer.parameters()) == []
    x, weight = torch.randn(2, 12), torch.randn(8, 12)
    assert torch.equal(layer(x, weight=weight), x @ weight.t())
    with pytest.raises(ConfigError, match="skip_weight_param_allocation"):
        layer(x)
    with pytest.raises(ConfigError, match=r"shape is \(7, 12\)"):
        layer(x, weight=torch.randn(7, 12))


def test_initialization_is_the_callers_choice() -> None:
    layer = ColumnParallelLinear(12, 8, config=CONFIG, init_method=torch.nn.init.ones_)
    assert (local(layer.weight) == 1).all()
    with torch.device("meta"):
        assert ColumnParallelLinear(12, 8, config=CONFIG).weight.is_meta
    on_cpu = ModelParallelConfig(use_cpu_initialization=True)
    with torch.device("meta"):
        assert not RowParallelLinear(12, 8, config=on_cpu).weight.is_meta
    called: list[torch.Tensor] = []
    skipped = ModelParallelConfig(perform_initialization=False)
    VocabParallelEmbedding(10, 4, config=skipped, init_method=called.append)
    assert not called


@pytest.mark.parametrize(("compute", "stored"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_parameters_are_stored_in_the_main_dtype(compute: torch.dtype, stored: torch.dtype) -> None:
    config = ModelParallelConfig(params_dtype=compute)
    embedding = VocabParallelEmbedding(10, 12, config=config)
    layer = ColumnParallelLinear(12, 8, config=config)
    hidden = embedding(torch.tensor([[1, 2]]))
    assert (hidden.dtype, layer(hidden).dtype) == (compute, compute)
    assert {parameter.dtype for parameter in (*embedding.parameters(), *layer.parameters())} == {stored}


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"stride is 2.*interleave"):
        ColumnParallelLinear(12, 8, config=CONFIG, stride=2)
    with pytest.raises(ConfigError, match=r"last dimension is 7.*takes 12"):
        RowParallelLinear(12, 8, config=CONFIG)(torch.randn(2, 7))
