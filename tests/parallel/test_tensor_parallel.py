"""Tensor and sequence parallelism on real processes, in float64, against one process.

Each worker computes the single-process reference too and compares its own part of every output and gradient. The
docstring of each test names a mutation of the code that makes it fail.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite import parallel_state, tensor_parallel
from megatron_lite.errors import ConfigError
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    collectives,
    local,
)
from tests.parallel.pool import WorkerPool

SEQUENCE, BATCH, HIDDEN, FFN, VOCAB = 8, 3, 12, 16, 24
SIZES = pytest.mark.parametrize("tp", [2, 4])
SEQUENCE_PARALLEL = pytest.mark.parametrize("sequence_parallel", [False, True])


def draw(seed: int, *shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(tensor: Tensor, dim: int) -> Tensor:
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return tensor.chunk(size, dim)[rank]


def assert_equal(ours: Tensor | None, reference: Tensor | None) -> None:
    assert ours is not None
    assert reference is not None
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def start(tp: int, sequence_parallel: bool = False) -> ModelParallelConfig:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    return ModelParallelConfig(
        tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel, params_dtype=torch.float64
    )


def fill(parameter: Tensor, full: Tensor, dim: int | None) -> None:
    with torch.no_grad():
        local(parameter).copy_(full if dim is None else part(full, dim))


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return local(parameter.grad)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    torch.distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


# Mappings. Forward and backward of each against its definition on the inputs and gradients of all ranks.

MAPPINGS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    # name: (function, output of rank r from all inputs, input gradient of rank r from all output gradients)
    "copy": (tensor_parallel.copy_to_tensor_model_parallel_region, lambda x, r: x[r], lambda g, r: sum(g)),
    "reduce": (tensor_parallel.reduce_from_tensor_model_parallel_region, lambda x, r: sum(x), lambda g, r: g[r]),
    "scatter": (
        tensor_parallel.scatter_to_tensor_model_parallel_region,
        lambda x, r: x[r].chunk(len(x), -1)[r],
        lambda g, r: torch.cat(g, -1),
    ),
    "gather": (
        tensor_parallel.gather_from_tensor_model_parallel_region,
        lambda x, r: torch.cat(x, -1),
        lambda g, r: g[r].chunk(len(g), -1)[r],
    ),
    "scatter sequence": (
        tensor_parallel.scatter_to_sequence_parallel_region,
        lambda x, r: x[r].chunk(len(x), 0)[r],
        lambda g, r: torch.cat(g, 0),
    ),
    "gather sequence": (
        tensor_parallel.gather_from_sequence_parallel_region,
        lambda x, r: torch.cat(x, 0),
        lambda g, r: sum(g).chunk(len(g), 0)[r],
    ),
    "gather sequence, replicated": (
        lambda x: tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False),
        lambda x, r: torch.cat(x, 0),
        lambda g, r: g[r].chunk(len(g), 0)[r],
    ),
    "reduce-scatter sequence": (
        tensor_parallel.reduce_scatter_to_sequence_parallel_region,
        lambda x, r: sum(x).chunk(len(x), 0)[r],
        lambda g, r: torch.cat(g, 0),
    ),
    "all-gather last": (
        tensor_parallel.all_gather_last_dim_from_tensor_parallel_region,
        lambda x, r: torch.cat(x, -1),
        lambda g, r: sum(g).chunk(len(g), -1)[r],
    ),
    "reduce-scatter last": (
        tensor_parallel.reduce_scatter_last_dim_to_tensor_parallel_region,
        lambda x, r: sum(x).chunk(len(x), -1)[r],
        lambda g, r: torch.cat(g, -1),
    ),
    "tokens to features": (
        tensor_parallel.all_to_all_sp2hp,
        lambda x, r: torch.cat([one.flatten(0, 1).chunk(len(x), -1)[r] for one in x]),
        lambda g, r: torch.cat([one.chunk(len(g), 0)[r] for one in g], -1).view(SEQUENCE, BATCH, -1),
    ),
    "features to tokens": (
        tensor_parallel.all_to_all_hp2sp,
        lambda x, r: torch.cat([one.flatten(0, 1).chunk(len(x), 0)[r] for one in x], -1),
        lambda g, r: torch.cat([one.chunk(len(g), -1)[r] for one in g]).view(SEQUENCE, BATCH, -1),
    ),
}


def check_mapping(rank: int, tp: int, name: str) -> None:
    start(tp)
    function, forward, backward = MAPPINGS[name]
    inputs = [draw(r, SEQUENCE, BATCH, HIDDEN) for r in range(tp)]
    mine = inputs[rank].clone().requires_grad_()
    output = function(mine)
    assert_equal(output, forward(inputs, rank))
    grads = [draw(100 + r, *output.shape) for r in range(tp)]
    output.backward(grads[rank])
    assert_equal(mine.grad, backward(grads, rank))


@SIZES
@pytest.mark.parametrize("name", MAPPINGS)
def test_mapping_contract(pool: WorkerPool, tp: int, name: str) -> None:
    """Mutation: do not reduce in _CopyToRegion.backward; split where _Gather should reduce-scatter."""
    pool.run(check_mapping, name, world_size=tp)


def check_uneven_all_to_all(rank: int, tp: int) -> None:
    start(tp)
    sent = [[(source + 2 * target) % 3 for target in range(tp)] for source in range(tp)]
    received = [sent[source][rank] for source in range(tp)]
    mine = draw(rank, sum(sent[rank]), HIDDEN).requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()
    output = tensor_parallel.all_to_all(group, mine, received, sent[rank])
    assert_equal(output, torch.cat([draw(s, sum(sent[s]), HIDDEN).split(sent[s])[rank] for s in range(tp)]))
    (output * output).sum().backward()
    assert_equal(mine.grad, 2 * mine.detach())


@SIZES
def test_all_to_all_with_uneven_and_empty_parts(pool: WorkerPool, tp: int) -> None:
    """Mutation: do not exchange the split sizes in _AllToAll.backward."""
    pool.run(check_uneven_all_to_all, world_size=tp)


# Layers.


def check_column(rank: int, tp: int, sequence_parallel: bool, gather_output: bool, skip_bias_add: bool) -> None:
    config = start(tp, sequence_parallel)
    weight, bias, x = draw(1, FFN, HIDDEN), draw(2, FFN), draw(3, SEQUENCE, BATCH, HIDDEN)
    upstream = draw(4, SEQUENCE, BATCH, FFN)
    layer = ColumnParallelLinear(HIDDEN, FFN, config=config, gather_output=gather_output, skip_bias_add=skip_bias_add)
    fill(layer.weight, weight, 0)
    fill(layer.bias, bias, 0)
    reference = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.linear(*reference)
    expected.backward(upstream)

    mine = (part(x, 0) if sequence_parallel else x).clone().requires_grad_()
    result = layer(mine)
    output = result[0] + result[1] if skip_bias_add else result
    assert_equal(output, expected if gather_output else part(expected, -1))
    output.backward(upstream if gather_output else part(upstream, -1))
    assert_equal(mine.grad, part(reference[0].grad, 0) if sequence_parallel else reference[0].grad)
    assert_equal(gradient(layer.weight), part(reference[1].grad, 0))
    assert_equal(gradient(layer.bias), part(reference[2].grad, 0))


@SIZES
@SEQUENCE_PARALLEL
@pytest.mark.parametrize(("gather_output", "skip_bias_add"), [(False, False), (True, False), (False, True)])
def test_column_parallel_linear(
    pool: WorkerPool, tp: int, sequence_parallel: bool, gather_output: bool, skip_bias_add: bool
) -> None:
    """Mutation: in the linear's backward do not reduce the input gradient, or use only the local input."""
    pool.run(check_column, sequence_parallel, gather_output, skip_bias_add, world_size=tp)


def check_row(rank: int, tp: int, sequence_parallel: bool, whole_input: bool, skip_bias_add: bool) -> None:
    config = start(tp, sequence_parallel)
    weight, bias, x = draw(1, HIDDEN, FFN), draw(2, HIDDEN), draw(3, SEQUENCE, BATCH, FFN)
    upstream = draw(4, SEQUENCE, BATCH, HIDDEN)
    layer = RowParallelLinear(FFN, HIDDEN, config=config, skip_bias_add=skip_bias_add)
    fill(layer.weight, weight, 1)
    fill(layer.bias, bias, None)
    reference = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.linear(*reference)
    expected.backward(upstream)

    mine = (x if whole_input else part(x, -1)).clone().requires_grad_()
    result = layer(mine)
    output = result[0] + result[1] if skip_bias_add else result
    assert_equal(output, part(expected, 0) if sequence_parallel else expected)
    output.backward(part(upstream, 0) if sequence_parallel else upstream)
    assert_equal(mine.grad, reference[0].grad if whole_input else part(reference[0].grad, -1))
    assert_equal(gradient(layer.weight), part(reference[1].grad, 1))
    specs = tensor_parallel.named_parameter_specs(layer)
    assert specs["bias"].partial_over_tp == sequence_parallel
    bias_grad = gradient(layer.bias)
    assert_equal(sum_over_ranks(bias_grad) if specs["bias"].partial_over_tp else bias_grad, reference[2].grad)


@SIZES
@SEQUENCE_PARALLEL
@pytest.mark.parametrize(("whole_input", "skip_bias_add"), [(False, False), (True, False), (False, True)])
def test_row_parallel_linear_adds_its_bias_once(
    pool: WorkerPool, tp: int, sequence_parallel: bool, whole_input: bool, skip_bias_add: bool
) -> None:
    """T5. Mutation: add the bias before the reduction; declare the bias complete under sequence parallelism (T1)."""
    pool.run(check_row, sequence_parallel, whole_input, skip_bias_add, world_size=tp)


def check_embedding(rank: int, tp: int, reduce_scatter: bool) -> None:
    config = start(tp)
    table = draw(1, VOCAB, HIDDEN)
    shard = VOCAB // tp
    boundaries = [id_ for first in range(0, VOCAB, shard) for id_ in (first, first + shard - 1)]
    ids = torch.tensor([boundaries, boundaries[::-1], [VOCAB - 1] * len(boundaries)])
    layer = VocabParallelEmbedding(VOCAB, HIDDEN, config=config, reduce_scatter_embeddings=reduce_scatter)
    fill(layer.weight, table, 0)
    reference = table.clone().requires_grad_()
    expected = F.embedding(ids, reference)
    upstream = draw(2, *expected.shape)
    expected.backward(upstream)

    output = layer(ids)
    assert_equal(output, part(expected.transpose(0, 1), 0) if reduce_scatter else expected)
    output.backward(part(upstream.transpose(0, 1), 0) if reduce_scatter else upstream)
    assert_equal(gradient(layer.weight), part(reference.grad, 0))


@SIZES
@pytest.mark.parametrize("reduce_scatter", [False, True])
def test_embedding_at_shard_boundaries(pool: WorkerPool, tp: int, reduce_scatter: bool) -> None:
    """T6. Mutation: `>` for `>=` at the end of a rank's range; do not zero the rows of ids held elsewhere."""
    pool.run(check_embedding, reduce_scatter, world_size=tp)


def check_mlp(rank: int, tp: int, sequence_parallel: bool, compiled: bool) -> None:
    config = start(tp, sequence_parallel)
    mlp = GatedMLP(config)
    weights = {"fc1.weight": draw(1, 2 * FFN, HIDDEN), "fc1.bias": draw(2, 2 * FFN)}
    weights |= {"fc2.weight": draw(3, HIDDEN, FFN), "fc2.bias": draw(4, HIDDEN)}
    dims = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1, "fc2.bias": None}
    for name, parameter in mlp.named_parameters():
        fill(parameter, weights[name], dims[name])
    x, upstream = draw(5, SEQUENCE, BATCH, HIDDEN), draw(6, SEQUENCE, BATCH, HIDDEN)
    reference = {name: weight.clone().requires_grad_() for name, weight in {"x": x, **weights}.items()}
    expected = gate_and_up(F.linear(reference["x"], reference["fc1.weight"], reference["fc1.bias"]))
    expected = F.linear(expected, reference["fc2.weight"], reference["fc2.bias"])
    expected.backward(upstream)

    if compiled:
        mlp.compile(fullgraph=True, backend="aot_eager")
    mine = (part(x, 0) if sequence_parallel else x).clone().requires_grad_()
    output = mlp(mine)
    assert_equal(output, part(expected, 0) if sequence_parallel else expected)
    output.backward(part(upstream, 0) if sequence_parallel else upstream)
    assert_equal(mine.grad, part(reference["x"].grad, 0) if sequence_parallel else reference["x"].grad)
    specs = tensor_parallel.named_parameter_specs(mlp)
    for name, parameter in mlp.named_parameters():
        ours = gradient(parameter).clone()
        ours = sum_over_ranks(ours) if specs[name].partial_over_tp else ours
        full, dim = reference[name].grad, dims[name]
        assert full is not None
        assert_equal(ours, full if dim is None else part(full, dim))


def gate_and_up(fused: Tensor) -> Tensor:
    """Rows are interleaved gate, up, gate, up, so that any contiguous block of them can be used alone."""
    return F.silu(fused[..., 0::2]) * fused[..., 1::2]


class GatedMLP(nn.Module):
    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(HIDDEN, 2 * FFN, config=config)
        self.fc2 = RowParallelLinear(FFN, HIDDEN, config=config, input_is_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gate_and_up(self.fc1(x)))


@SIZES
@SEQUENCE_PARALLEL
def test_slices_of_one_process_weights_give_the_same_mlp(pool: WorkerPool, tp: int, sequence_parallel: bool) -> None:
    """T9. Mutation: split a fused matrix in halves (chunk instead of interleaved rows) in gate_and_up."""
    pool.run(check_mlp, sequence_parallel, False, world_size=tp)


@SEQUENCE_PARALLEL
def test_layers_compile_as_one_graph(pool: WorkerPool, sequence_parallel: bool) -> None:
    """Mutation: read a value on the host in the forward of the linear, as `total_input.sum().item()`."""
    pool.run(check_mlp, sequence_parallel, True, world_size=2, timeout_s=300.0)


class RecordOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators_of_backward(rank: int, tp: int, sequence_parallel: bool, exchanges: bool) -> list[str]:
    config = start(tp, sequence_parallel)
    layer = ColumnParallelLinear(HIDDEN, FFN, config=config, bias=False)
    x = draw(1, SEQUENCE, BATCH, HIDDEN).requires_grad_()
    output = layer(x)
    with RecordOperators() as record, mock.patch.object(collectives, "exchanges", return_value=exchanges):
        output.backward(torch.ones_like(output))
    interesting = (
        "mm",
        "all_reduce",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_to_all_single",
        "wait_tensor",
    )
    return [name for name in record.names if name in interesting]


def test_communication_is_in_flight_during_the_weight_gradient(pool: WorkerPool) -> None:
    """Mutation: wait for the reduction before the product that makes the weight gradient."""
    for exchanges, reduce, scatter in (
        (False, "all_reduce", "reduce_scatter_tensor"),
        (True, "all_to_all_single", "all_to_all_single"),
    ):
        plain = pool.run(operators_of_backward, False, exchanges, world_size=2)[0]
        assert plain == ["mm", reduce, "mm", "wait_tensor"]
        split = pool.run(operators_of_backward, True, exchanges, world_size=2)[0]
        assert split == ["all_gather_into_tensor", "mm", scatter, "wait_tensor", "mm", "wait_tensor"]


def reductions(rank: int, ranks: int, dtype: torch.dtype) -> None:
    """Sums and maxima of few and of many numbers, as gloo itself has them."""
    group = torch.distributed.group.WORLD
    assert group is not None
    for rows in (ranks, 64 * ranks):
        x = (torch.arange(rows * 96).view(rows, 96) * (rank + 1) % 7 - 3).to(dtype)
        for op, their_op in (("sum", torch.distributed.ReduceOp.SUM), ("max", torch.distributed.ReduceOp.MAX)):
            wanted = x.clone()
            torch.distributed.all_reduce(wanted, their_op)
            found = collectives.all_reduce(x, group, op)
            assert found.dtype == dtype
            assert torch.equal(found, wanted), (rows, op)
        wanted = x.clone()
        torch.distributed.all_reduce(wanted)
        assert torch.equal(collectives.reduce_scatter(x, 0, group), wanted.chunk(ranks)[rank])
        assert torch.equal(collectives.reduce_scatter(x, -1, group), wanted.chunk(ranks, -1)[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_reductions_on_a_cpu(pool: WorkerPool, ranks: int, dtype: torch.dtype) -> None:
    """Mutations: two ranks keep their own; int32 becomes int64; max adds; parts of the wrong rank."""
    pool.run(reductions, dtype, world_size=ranks)


def check_bfloat16(rank: int, tp: int) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config = ModelParallelConfig(tensor_model_parallel_size=tp, bf16=True)
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, config=config)
    mlp = GatedMLP(config)
    output = mlp(embedding(torch.arange(VOCAB).view(2, -1)))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for parameter in (*embedding.parameters(), *mlp.parameters()):
        assert parameter.dtype == torch.float32
        assert gradient(parameter).dtype == torch.float32
        assert gradient(parameter).isfinite().all()


def test_bfloat16_activations_with_float32_parameters(pool: WorkerPool) -> None:
    """Mutation: leave out the cast of the weight to the input's dtype."""
    pool.run(check_bfloat16, world_size=2)


# Cross entropy.


def check_cross_entropy(rank: int, tp: int, scale: float, offset: float, smoothing: float, vocab_size: int) -> None:
    start(tp)
    logits = draw(1, SEQUENCE, BATCH, VOCAB) * scale + offset
    logits[..., vocab_size:] = 1e30  # padded columns: must not matter, whatever they hold
    shard = VOCAB // tp
    targets = [id_ for first in range(0, VOCAB, shard) for id_ in (first, first + shard - 1)]
    targets = [min(id_, vocab_size - 1) for id_ in targets]
    target = torch.tensor(targets).repeat(SEQUENCE * BATCH)[: SEQUENCE * BATCH].view(SEQUENCE, BATCH)
    target[1, 0] = target[3, 2] = -100
    reference = logits[..., :vocab_size].clone().requires_grad_()
    spread = smoothing * vocab_size / (vocab_size - 1)
    expected = F.cross_entropy(
        reference.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=spread
    ).view_as(target)
    upstream = draw(2, SEQUENCE, BATCH)
    expected.backward(upstream)
    assert reference.grad is not None

    mine = part(logits, -1).clone().requires_grad_()
    before = mine.detach().clone()
    loss = tensor_parallel.vocab_parallel_cross_entropy(
        mine, target, smoothing, vocab_size=vocab_size, padded_vocab_size=VOCAB
    )
    assert_equal(loss, expected)
    assert loss[1, 0] == 0
    loss.backward(upstream)
    assert_equal(mine.grad, part(F.pad(reference.grad, (0, VOCAB - vocab_size)), -1))
    assert mine.grad is not None
    assert not mine.grad[target == -100].any()
    assert torch.equal(mine.detach(), before)


@SIZES
@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB - 3, VOCAB - 14])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e3, 0.0), (1.0, 1e5)])
def test_cross_entropy(
    pool: WorkerPool, tp: int, vocab_size: int, smoothing: float, scale: float, offset: float
) -> None:
    """T7, T8. Mutations: drop the all-reduce of the maximum; smooth over the local columns; keep padded columns;

    do not exclude ignored targets. With 10 real ids of 24 whole ranks hold nothing but padding.
    """
    if offset and smoothing:  # the mean over the vocabulary rounds at 1e5 * eps in the reference as in ours
        scale, offset = 1.0, 0.0
    pool.run(check_cross_entropy, scale, offset, smoothing, vocab_size, world_size=tp)


def check_gathered_logits_are_refused(rank: int, tp: int) -> None:
    start(tp)
    target = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match="gathered"):
        tensor_parallel.vocab_parallel_cross_entropy(draw(1, 2, 2, VOCAB), target, vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="gathered"):
        tensor_parallel.vocab_parallel_cross_entropy(draw(1, 2, 2, VOCAB), target, padded_vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="too few"):
        tensor_parallel.vocab_parallel_cross_entropy(draw(1, 2, 2, VOCAB // tp - 1), target, vocab_size=VOCAB)


def test_gathered_logits_are_refused(pool: WorkerPool) -> None:
    """T7. Mutation: remove the checks of the number of columns."""
    pool.run(check_gathered_logits_are_refused, world_size=2)


# Refusals, initialization, randomness.


def check_indivisible_sequence(rank: int, tp: int) -> None:
    config = start(tp, sequence_parallel=True)
    odd = draw(1, SEQUENCE + 1, BATCH, FFN // tp)
    with pytest.raises(ConfigError, match=r"sequence length \(dim 0\) is 9.*pad it to"):
        RowParallelLinear(FFN, HIDDEN, config=config)(odd)
    with pytest.raises(ConfigError, match="sequence length"):
        tensor_parallel.scatter_to_sequence_parallel_region(odd)
    ids = torch.zeros(BATCH, SEQUENCE + 1, dtype=torch.long)
    with pytest.raises(ConfigError, match="sequence length"):
        VocabParallelEmbedding(VOCAB, HIDDEN, config=config, reduce_scatter_embeddings=True)(ids)
    with pytest.raises(ConfigError, match="15 is not divisible by"):
        ColumnParallelLinear(HIDDEN, 15, config=config)
    with pytest.raises(ConfigError, match="last dimension is 5"):
        RowParallelLinear(FFN, HIDDEN, config=config)(draw(1, SEQUENCE, BATCH, 5))


@SIZES
def test_sequence_that_cannot_be_split_is_refused(pool: WorkerPool, tp: int) -> None:
    """T13. Mutation: remove require_divisible (torch.chunk then gives parts of unequal size)."""
    pool.run(check_indivisible_sequence, world_size=tp)


class EmbeddedMLP(nn.Module):
    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, config=config)
        self.mlp = GatedMLP(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.embedding(ids))


def initial_weights(rank: int, world_size: int, tp: int, wrapped: bool) -> dict[str, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config = ModelParallelConfig(tensor_model_parallel_size=tp, params_dtype=torch.float64)
    with torch.device("meta"):
        model = EmbeddedMLP(config)
    if wrapped:
        fully_shard(model, mesh=parallel_state.get_dense_mesh()["dp_replicate", "dp_shard"])
    model.to_empty(device="cpu")
    before = torch.get_rng_state()
    tensor_parallel.initialize_parameters(model, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in model.named_parameters()
    }


@pytest.mark.parametrize(("world_size", "tp", "wrapped"), [(2, 2, False), (4, 4, False), (4, 2, True), (3, 1, True)])
def test_initial_weights_do_not_depend_on_the_layout(pool: WorkerPool, world_size: int, tp: int, wrapped: bool) -> None:
    """T11. Mutation: take the FSDP chunk before the tensor parallel one in _shard_of; seed without the name."""
    alone = pool.run(initial_weights, 1, False, world_size=1)[0]
    assert not torch.equal(alone["mlp.fc1.weight"].flatten()[:64], alone["mlp.fc2.weight"].flatten()[:64])
    for weights in pool.run(initial_weights, tp, wrapped, world_size=world_size):
        assert weights.keys() == alone.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, alone[name]), name


def layer_weights(rank: int, world_size: int) -> Tensor:
    config = start(world_size)
    torch.manual_seed(5)
    return local(ColumnParallelLinear(HIDDEN, FFN, config=config, bias=False).weight).detach()


def test_a_layer_alone_draws_the_same_weight_at_every_size(pool: WorkerPool) -> None:
    """T11. Mutation: draw only the shard in create_parameter."""
    expected = pool.run(layer_weights, world_size=1)[0]
    for tp in (2, 4):
        assert torch.equal(torch.cat(pool.run(layer_weights, world_size=tp)), expected)


def random_draws(rank: int, world_size: int, tp: int, cp: int) -> dict[str, float]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        sharded = torch.rand(()).item()
    return {"replicated": torch.rand(()).item(), "sharded": sharded}


def test_dropout_streams(pool: WorkerPool) -> None:
    """T12. Mutation: leave the tensor parallel rank, or the data x context parallel rank, out of the seeds."""
    draws = pool.run(random_draws, 2, 2, world_size=8)  # tp2 x cp2 x dp2
    replicas = [{draws[first]["replicated"], draws[first + 1]["replicated"]} for first in range(0, 8, 2)]
    assert all(len(values) == 1 for values in replicas)
    assert len(set().union(*replicas)) == 4
    assert len({draw["sharded"] for draw in draws}) == 8


def check_recompute(rank: int, tp: int, distribute: bool) -> None:
    start(tp)
    tensor_parallel.model_parallel_cuda_manual_seed(11)
    weight = draw(1, HIDDEN, HIDDEN).requires_grad_()
    x = draw(2, SEQUENCE, BATCH, HIDDEN).requires_grad_()

    def function(hidden: Tensor, scale: float) -> Tensor:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            dropped = F.dropout(hidden @ weight, 0.5)
        return F.dropout(torch.tanh(dropped), 0.5) * scale

    function(x, 2.0).square().sum().backward()
    expected = [x.grad, weight.grad]
    x.grad = weight.grad = None
    tensor_parallel.model_parallel_cuda_manual_seed(11)
    output = tensor_parallel.checkpoint(function, distribute, x, 2.0)
    after = tensor_parallel.get_cuda_rng_tracker().get_states()["model-parallel-rng"].cpu.clone()
    output.square().sum().backward()
    assert torch.equal(after, tensor_parallel.get_cuda_rng_tracker().get_states()["model-parallel-rng"].cpu)
    assert_equal(weight.grad, expected[1])
    if distribute:  # each rank's x is a copy of one tensor, of which it kept a part: gradients come from all of them
        parts = [torch.empty_like(expected[0].flatten().chunk(tp)[0]) for _ in range(tp)]
        torch.distributed.all_gather(parts, expected[0].flatten().chunk(tp)[rank].contiguous())
        assert_equal(x.grad.flatten(), torch.cat(parts))
    else:
        assert_equal(x.grad, expected[0])


@pytest.mark.parametrize("distribute", [False, True])
def test_recompute_repeats_the_random_numbers(pool: WorkerPool, distribute: bool) -> None:
    """Mutation: do not restore the tracker's streams for the second call."""
    pool.run(check_recompute, distribute, world_size=2)


def check_broadcast(rank: int, tp: int) -> None:
    start(tp)
    batch = {"tokens": torch.arange(6).view(2, 3), "labels": torch.arange(4)} if rank == 0 else None
    received = tensor_parallel.broadcast_data(["tokens", "labels"], batch, torch.int64)
    assert torch.equal(received["tokens"], torch.arange(6).view(2, 3))
    assert torch.equal(received["labels"], torch.arange(4))


def test_broadcast_data_gives_all_ranks_one_batch(pool: WorkerPool) -> None:
    """Mutation: broadcast from the last rank of the group."""
    pool.run(check_broadcast, world_size=2)
