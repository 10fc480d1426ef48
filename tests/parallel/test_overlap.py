"""Products that overlap with their communication give what the same products and collectives give apart.

On real processes, in float64. torch's operators for GPUs run here as torch itself spells them out in collectives, on
the CPU: what is tested is how they are called. The docstring of each test names mutations of the code that fail it.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _symmetric_memory

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear, collectives, overlapped
from megatron_lite.tensor_parallel.layers import way_of_overlap
from megatron_lite.tensor_parallel.overlapped import Way, gather_then_multiply, multiply_then_reduce_scatter
from tests.parallel.pool import WorkerPool
from tests.parallel.test_tensor_parallel import RecordOperators, assert_equal, draw, fill, gradient, part

PART, BATCH = 3, 5  # positions of a rank, sequences
SIZES = pytest.mark.parametrize("tp", [2, 3, 4])
WAYS = pytest.mark.parametrize("way", ["ring", "symmetric"])
CALLS: list[tuple[str, dict[str, Any]]] = []
"""What torch's operators were called with by name, since `by` began."""


@contextlib.contextmanager
def operators() -> Iterator[None]:
    """torch's operators on the CPU, by torch's own definition of what they mean; they are chosen for every group."""

    def recorded(name: str, meaning: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            assert arguments[0].is_contiguous(), "the parts that are copied have to be"
            CALLS.append((name, named))
            return meaning(*arguments, **named)

        return call

    with torch.library._scoped_library("symm_mem", "IMPL") as library:
        for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
            meaning = getattr(_symmetric_memory, f"_{name}_fallback")
            library.impl(name, recorded(name, meaning), "CPU")
        with mock.patch.object(overlapped, "has_symmetric_memory", return_value=True):
            yield


def by(way: Way) -> Any:
    CALLS.clear()
    return operators() if way == "symmetric" else nullcontext()


def start(tp: int, overlap: bool = True, **settings: Any) -> ModelParallelConfig:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    settings = {"sequence_parallel": True, "tp_comm_overlap": overlap, "params_dtype": torch.float64} | settings
    return ModelParallelConfig(tensor_model_parallel_size=tp, **settings)


def tp_group() -> dist.ProcessGroup:
    group = parallel_state.get_tensor_model_parallel_group()
    assert group is not None
    return group


# Products.


def check_gather(rank: int, tp: int, way: Way, dtype: torch.dtype) -> None:
    start(tp)
    k, n = (5, 7) if way == "ring" else (16, 8)
    parts = [draw(r, BATCH, PART, k).to(dtype).transpose(0, 1) for r in range(tp)]  # not contiguous
    weight, bias = draw(10, n, k).to(dtype), draw(11, n).to(dtype)
    with by(way):
        for added, keep in itertools.product((bias, None), (False, True)):
            product, gathered = gather_then_multiply(parts[rank], weight, added, tp_group(), way, keep=keep)
            apart = torch.cat([F.linear(x.contiguous(), weight, added) for x in parts])
            if way == "ring":
                assert torch.equal(product, apart)
            else:
                assert_equal(product, apart)
            assert (gathered is not None) == keep
            assert gathered is None or torch.equal(gathered, torch.cat(parts))
    assert [call.get("return_A", True) for _, call in CALLS] == ([False, True] * 2 if way == "symmetric" else [])


@SIZES
@WAYS
def test_gathered_and_multiplied(pool: WorkerPool, tp: int, way: Way) -> None:
    """Mutations: multiply the part at hand in the place of another; begin with what arrives; forget the last part."""
    pool.run(check_gather, way, torch.float64, world_size=tp)


def check_scatter(rank: int, tp: int, way: Way, dtype: torch.dtype) -> None:
    start(tp)
    k, n = (7, 5) if way == "ring" else (16, 8)
    shards = (20, (tp * PART, BATCH, k)), (30, (n, k))
    inputs, weights = ([draw(s + r, *shape).to(dtype) for r in range(tp)] for s, shape in shards)
    with by(way):
        found = multiply_then_reduce_scatter(inputs[rank], weights[rank], tp_group(), way)
    assert len(CALLS) == (way == "symmetric")
    products = [F.linear(x.chunk(tp)[rank], weight) for x, weight in zip(inputs, weights, strict=True)]
    if way == "symmetric":
        assert_equal(found, torch.stack(products).sum(0))
        return
    order = [(rank + 1 + step) % tp for step in range(tp)]
    wanted = products[order[0]]
    for source in order[1:]:
        wanted = wanted + products[source]
    assert torch.equal(found, wanted)
    apart = collectives.reduce_scatter(
        torch.cat([F.linear(x, weights[rank]) for x in inputs[rank].chunk(tp)]), 0, tp_group()
    )
    assert tp != 2 or torch.equal(found, apart)


@SIZES
@pytest.mark.parametrize(
    ("way", "dtype"), [("ring", torch.float64), ("ring", torch.bfloat16), ("symmetric", torch.float64)]
)
def test_multiplied_and_scattered(pool: WorkerPool, tp: int, way: Way, dtype: torch.dtype) -> None:
    """In the order that is stated, and with two ranks as a plain reduce-scatter, bit for bit.

    Mutations: let the sum of a part end on its neighbour; add the part of another rank; leave out the last addition.
    """
    pool.run(check_scatter, way, dtype, world_size=tp)


def check_unaligned(rank: int, tp: int) -> None:
    start(tp)
    with by("symmetric"):
        for k, n in ((5, 8), (8, 5)):
            x, weight = draw(1, PART, BATCH, k), draw(2, n, k)
            gather_then_multiply(x, weight, None, tp_group(), "symmetric")
            multiply_then_reduce_scatter(draw(3, tp * PART, BATCH, k), weight, tp_group(), "symmetric")
    assert not CALLS


def test_rows_of_odd_sizes_take_the_ring(pool: WorkerPool) -> None:
    """Mutation: leave out the check of either size."""
    pool.run(check_unaligned, world_size=2)


# Layers.


def check_layer(rank: int, tp: int, kind: str, bias: bool, way: Way, frozen: str | None) -> None:
    config = start(tp)
    k, n = (16, 8 * tp) if kind == "column" else (8 * tp, 16)
    if way == "ring" and kind == "column":
        k, n = 7, 5 * tp
    elif way == "ring":
        k, n = 5 * tp, 7
    x, weight, added = draw(3, tp * PART, BATCH, k), draw(1, n, k), draw(2, n)
    upstream = draw(4, tp * PART, BATCH, n)
    reference = [tensor.clone().requires_grad_() for tensor in (x, weight, added)]
    expected = F.linear(reference[0], reference[1], reference[2] if bias else None)
    expected.backward(upstream)

    with by(way):
        layer: nn.Module
        if kind == "column":
            layer = ColumnParallelLinear(k, n, config=config, bias=bias)
            dims = {"x": 0, "output": -1, "weight": 0, "bias": 0}
        else:
            layer = RowParallelLinear(k, n, config=config, bias=bias, input_is_parallel=True)
            dims = {"x": -1, "output": 0, "weight": 1, "bias": None}
        assert layer.overlap == way
        fill(layer.weight, weight, dims["weight"])
        if bias:
            fill(layer.bias, added, dims["bias"])
        layer.weight.requires_grad_(frozen != "weight")
        mine = part(x, dims["x"]).clone().requires_grad_(frozen != "x")
        output = layer(mine)
        assert_equal(output, part(expected, dims["output"]))
        output.backward(part(upstream, dims["output"]))
    if frozen != "x":
        assert_equal(mine.grad, part(reference[0].grad, dims["x"]))
    if frozen != "weight":
        assert_equal(gradient(layer.weight), part(reference[1].grad, dims["weight"]))
    if bias:
        ours = gradient(layer.bias).clone()
        if kind == "row":
            dist.all_reduce(ours, group=tp_group())
        assert_equal(ours, reference[2].grad if kind == "row" else part(reference[2].grad, 0))
    names = [name for name, _ in CALLS]
    gather, scatter = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
    backward = {"column": [scatter] if frozen == "weight" else [], "row": [] if frozen == "x" else [gather]}
    wanted = [gather if kind == "column" else scatter, *backward[kind]]
    assert names == (wanted if way == "symmetric" else [])


@pytest.mark.parametrize("tp", [2, 4])
@WAYS
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize(("bias", "frozen"), [(True, None), (False, None), (False, "weight"), (True, "x")])
def test_layer(pool: WorkerPool, tp: int, way: Way, kind: str, bias: bool, frozen: str | None) -> None:
    """Output and all gradients, sizes odd where the ring may.

    Mutations: in backward multiply with the weight not transposed (other shapes), or scatter what has to be gathered;
    add the row layer's bias before the reduction; use the local gradient for the weight's.
    """
    pool.run(check_layer, kind, bias, way, frozen, world_size=tp)


class MLP(nn.Module):
    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(16, 32, config=config)
        self.fc2 = RowParallelLinear(32, 16, config=config, input_is_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def train_mlp(config: ModelParallelConfig, compiled: bool) -> tuple[list[Tensor], int]:
    """Output and gradients, and how many elements autograd kept."""
    torch.manual_seed(1)
    mlp = MLP(config)
    if compiled:
        mlp.compile(fullgraph=True, backend="aot_eager")
    x = part(draw(5, 4 * PART, BATCH, 16), 0).clone().requires_grad_()
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = mlp(x)
    output.backward(part(draw(6, 4 * PART, BATCH, 16), 0))
    assert x.grad is not None
    return [output, x.grad, *(gradient(parameter) for parameter in mlp.parameters())], kept


def check_against_plain(rank: int, tp: int, way: Way, compiled: bool) -> None:
    plain, kept = train_mlp(start(tp, overlap=False), False)
    with by(way):
        ours, kept_by_ours = train_mlp(
            ModelParallelConfig(
                tensor_model_parallel_size=tp, sequence_parallel=True, tp_comm_overlap=True, params_dtype=torch.float64
            ),
            compiled,
        )
    for wanted, found in zip(plain, ours, strict=True):
        assert_equal(found, wanted)
    assert compiled or kept_by_ours == kept
    assert bool(CALLS) == (way == "symmetric")


@WAYS
@pytest.mark.parametrize("tp", [2, 4])
def test_nothing_more_is_kept_for_backward(pool: WorkerPool, tp: int, way: Way) -> None:
    """Mutation: keep the gathered input of the column layer."""
    pool.run(check_against_plain, way, False, world_size=tp)


@WAYS
def test_layers_compile_as_one_graph(pool: WorkerPool, way: Way) -> None:
    """Mutation: choose the way while the layer runs."""
    pool.run(check_against_plain, way, True, world_size=2, timeout_s=300.0)


def operators_of(rank: int, tp: int, kind: str) -> tuple[list[str], list[str]]:
    config = start(tp)
    layer: nn.Module
    if kind == "column":
        layer, width = ColumnParallelLinear(16, 8 * tp, config=config, bias=False), 16
    else:
        layer, width = RowParallelLinear(16 * tp, 8, config=config, bias=False, input_is_parallel=True), 16
    rows = PART if kind == "column" else tp * PART
    x = draw(1, rows, BATCH, width).requires_grad_()
    interesting = ("mm", "all_gather_into_tensor", "all_to_all_single", "wait_tensor")
    with RecordOperators() as forward:
        output = layer(x)
    with RecordOperators() as backward:
        output.backward(torch.ones_like(output))
    one, two = ([name for name in record.names if name in interesting] for record in (forward, backward))
    return one, two


def test_parts_travel_while_others_are_multiplied(pool: WorkerPool) -> None:
    """Mutations: wait for a part before the one at hand is multiplied; wait for the sum before its own part is."""
    send, wait = "all_to_all_single", "wait_tensor"
    gathering = [send, "mm", wait, send, "mm", wait, "mm"]
    column, backward = pool.run(operators_of, "column", world_size=3)[0]
    assert column == gathering
    assert backward == ["all_gather_into_tensor", "mm", send, wait, "mm", wait]  # as without overlap
    row, backward = pool.run(operators_of, "row", world_size=3)[0]
    assert row == ["mm", send, "mm", wait, send, "mm", wait]
    assert backward == [*gathering, "mm"]


# Who takes part, and how.


def check_who_takes_part(rank: int, tp: int) -> None:
    config = start(tp)
    group = tp_group()
    assert overlapped.choose_way(group) == "ring"  # gloo
    with mock.patch.object(overlapped, "has_symmetric_memory", side_effect=AssertionError("chosen already")):
        assert way_of_overlap(config, group) == "ring"
    assert way_of_overlap(config, None) is None
    alone = dist.new_subgroups(1)[0]
    assert way_of_overlap(config, alone) is None
    for off in ({"tp_comm_overlap": False}, {"sequence_parallel": False}):
        settings = {"tp_comm_overlap": True, "sequence_parallel": True} | off
        assert ColumnParallelLinear(16, 16, config=ModelParallelConfig(**settings)).overlap is None
    for layer in (ColumnParallelLinear, RowParallelLinear):
        assert layer(16, 16, config=config).overlap == "ring"
        assert layer(16, 16, config=config, is_expert=True, tp_group=group).overlap is None
    row = RowParallelLinear(16, 16, config=config, input_is_parallel=True)
    with pytest.raises(ConfigError, match=r"sequence length \(dim 0\) is 9.*pad it to"):
        row(draw(1, 9, BATCH, 16 // tp))
    row.product = mock.Mock(side_effect=F.linear)  # type: ignore[assignment]
    row(draw(1, 8, BATCH, 16 // tp))
    row.product.assert_called_once()


def test_who_takes_part(pool: WorkerPool) -> None:
    """Mutations: choose anew for each layer; let experts take part; multiply without the fp8 product."""
    pool.run(check_who_takes_part, world_size=2)


def test_each_rank_needs_a_device_that_reaches_all_others() -> None:
    """Mutations: leave out any of the three conditions; ask about the rank in place of the device."""

    def access(own: int, other: int) -> bool:
        return {own, other} != {0, 3}

    devices = ["a", "b", "c", "d"]
    assert overlapped.reaches(1, ["b", "c"], devices, access)
    assert overlapped.reaches(3, ["c", "d"], devices, access)
    assert not overlapped.reaches(0, ["a", "d"], devices, access)
    assert not overlapped.reaches(1, ["b", "b"], devices, access)  # two ranks share one
    assert not overlapped.reaches(1, ["b", "e"], devices, access)  # of another host


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, True), (2, False)])
def test_without_sequence_parallelism_it_is_refused(tp: int, sequence_parallel: bool) -> None:
    """Mutation: remove the rule."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel, tp_comm_overlap=True
    )
    with pytest.raises(ConfigError, match=f"tp_comm_overlap is set with tensor_model_parallel_size {tp} and seq"):
        config.validate()


def check_backends(rank: int, world_size: int) -> None:
    backends = {"cpu:gloo,cuda:gloo": False, "cpu:fake,cuda:fake": False, "cuda:nccl": True, "cpu:gloo,cuda:nccl": True}
    for backend, asks in backends.items():
        asked = mock.Mock(side_effect=LookupError)
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "current_device", asked),
            mock.patch.object(dist, "get_backend_config", return_value=backend),
            pytest.raises(LookupError) if asks else nullcontext(),
        ):
            assert not overlapped.has_symmetric_memory(dist.group.WORLD)
        assert asked.called == asks


def test_only_nccl_on_gpus_asks_for_symmetric_memory(pool: WorkerPool) -> None:
    """Mutation: ask whatever the backend is: gloo, of ranks that share a GPU, and no backend at all in a dry run."""
    pool.run(check_backends, world_size=1)


def announced(rank: int, world_size: int, words: list[str]) -> str:
    """What start-up says to the first rank of a run."""
    from megatron_lite.arguments import parse_args
    from megatron_lite.training.initialize import announce

    start(world_size)
    out = io.StringIO()
    with mock.patch.dict("os.environ", WORLD_SIZE=str(world_size)), contextlib.redirect_stdout(out):
        announce(parse_args(words), torch.device("cpu"))
    return out.getvalue()


def test_start_up_says_how(pool: WorkerPool) -> None:
    """Mutation: say it without the switch."""
    words = [
        "--num-layers",
        "1",
        "--hidden-size",
        "32",
        "--num-attention-heads",
        "4",
        "--seq-length",
        "16",
        "--lr",
        "1",
    ]
    words += ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--micro-batch-size", "1"]
    words += ["--train-iters", "1", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert "overlap" not in pool.run(announced, words, world_size=2)[0]
    assert "· tensor parallel overlap: ring\n" in pool.run(announced, [*words, "--tp-comm-overlap"], world_size=2)[0]
