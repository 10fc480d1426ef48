"""Attention of one block of keys, against the formula and autograd in float64.

And blocks of a step packed into one call, against one mask. CUDA's kernels themselves are tested in tests/gpu; here
torch's shape functions and a stand-in for flash take their place. Mutations are of ops/attention_block.py, from
"Packed blocks" on of context_parallel/block_attention.py, unless said otherwise; each was tried and made the test that
names it fail.
"""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.context_parallel import SequenceLayout, block_attention
from megatron_lite.context_parallel.block_attention import AttentionGradient, RunningAttention, calls, of_step
from megatron_lite.context_parallel.blocks import Block, attention_blocks
from megatron_lite.ops import attention_block as attention_block_module
from megatron_lite.ops.attention_block import (
    Lengths,
    attention_block,
    attention_block_backward,
    choose_backend,
    merge,
)
from tests.gpu.flash_stand_in import FlashStandIn

ON_CPU = ["flash_cpu", "eager"]
SCALE, HEADS, KEY_HEADS, HEAD_SIZE = 0.3, 4, 2, 8
NO_SINKS = torch.empty(0)

# (queries, keys, heads, key heads, causal)
SHAPES = [
    (40, 40, 4, 4, True),
    (40, 40, 4, 2, True),
    (700, 700, 2, 1, True),  # several tiles of the kernel
    (5, 33, 4, 1, False),
    (33, 5, 4, 2, False),
    (1, 1, 2, 2, True),
    (1, 9, 2, 1, False),
    (9, 1, 2, 1, False),
]


def inputs(queries: int, keys: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads)]
    return [torch.randn(s, 2, n, 8, generator=generator, dtype=torch.float64).to(dtype) for s, n in shapes]


def formula(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log of the denominator, straight from the definition."""
    key, value = (x.repeat_interleave(query.size(2) // x.size(2), dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->qbnk", query, key) * SCALE
    if causal:
        hidden = torch.arange(key.size(0)) > torch.arange(query.size(0))[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    return torch.einsum("qbnk,kbnd->qbnd", scores.softmax(-1), value), scores.logsumexp(-1)


def expected(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, causal: bool) -> list[Tensor]:
    """Output, log of the denominator and the three gradients in float64."""
    leaves = [x.detach().double().clone().requires_grad_() for x in (query, key, value)]
    out, log_sum = formula(*leaves, causal)
    return [out.detach(), log_sum.detach(), *torch.autograd.grad((out * grad).sum(), leaves)]


def computed(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, causal: bool, backend: str) -> list[Tensor]:
    """The same by attention_block."""
    out, log_sum = attention_block(query, key, value, causal, SCALE, backend)
    tensors = (grad, query, key, value, out, log_sum)
    return [out, log_sum, *attention_block_backward(*tensors, causal, SCALE, backend)]


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """The largest error, in units of the largest number."""
    assert torch.isfinite(actual).all()
    return ((actual.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)).item()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("strided", range(4))
def test_numbers_of_a_head_far_apart_in_memory(backend, strided):
    """Query, key, value or gradient as somebody's transpose left them.

    Mutation: _with_dense_heads that returns x (flash_cpu then reads other numbers for a query, without an error).
    """
    tensors = inputs(40, 40, 4, 2)
    tensors[strided] = tensors[strided].transpose(2, 3).contiguous().transpose(2, 3)
    assert tensors[strided].stride(-1) > 1
    for actual, wanted in zip(computed(*tensors, True, backend), expected(*tensors, True), strict=True):
        assert relative_error(actual, wanted) <= 1e-13


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_formula(shape, backend):
    """Output, log_sum and gradients to 1e-13, with the shapes and dtypes promised.

    Mutations: triu(0) or triu(2) in _scores; the scale dropped in _scores or in grad_scores; `out` not subtracted in
    _eager_backward; _repeat by `repeat` instead of repeat_interleave; _sum_repeated without its sum; log_sum returned
    as [b, n, s]; causal not passed on, forward or backward.
    """
    *sizes, causal = shape
    tensors = inputs(*sizes)
    for name, actual, wanted in zip(
        ("out", "log_sum", "dq", "dk", "dv"),
        computed(*tensors, causal, backend),
        expected(*tensors, causal),
        strict=True,
    ):
        assert actual.shape == wanted.shape, name
        assert actual.dtype == torch.float64, name
        if sizes[1] == 1 and name in ("dq", "dk"):  # one key has probability 1 whatever its score
            assert actual.abs().max() <= 1e-13, name
        else:
            assert relative_error(actual, wanted) <= 1e-13, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("backend", ON_CPU)
def test_narrow_dtypes(backend, dtype, bound):
    """To rounding; log_sum stays in float32, all else in the dtype of its tensor. 8 query heads share a key head.

    Mutations: `wide` as the queries' dtype in _scores (log_sum is 16-bit); outputs left in float32 by _eager.
    """
    tensors = inputs(300, 300, 8, 1, dtype)
    for name, actual, wanted in zip(
        ("out", "log_sum", "dq", "dk", "dv"), computed(*tensors, True, backend), expected(*tensors, True), strict=True
    ):
        assert actual.dtype == (torch.float32 if name == "log_sum" else dtype), name
        assert relative_error(actual, wanted) <= bound, name


def test_shared_keys_lose_no_bits():
    """The gradient of a bfloat16 key that 16 query heads share is as good as that of a key of one head.

    Mutation: `shared` for every dtype (the error grows from 0.4 % to 0.9 %).
    """

    def error(heads: int) -> float:
        tensors = inputs(256, 256, heads, 1, torch.bfloat16)
        actual, wanted = computed(*tensors, True, "flash_cpu")[3].double(), expected(*tensors, True)[3]
        return ((actual - wanted).norm() / wanted.norm()).item()

    assert error(16) < 1.3 * error(1)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("cuts", [[0, 13, 40], [0, 1, 39, 40]], ids=["two", "three"])
def test_merged_blocks_equal_all_keys(cuts, backend):
    """Sets of keys one after the other, merged, give the output of all keys; gradients from merged results add up.

    Mutations: the sign of the difference in merge; log_sum left as it was; the block's own log_sum or output given to
    the backward of a block.
    """
    query, key, value, grad = inputs(17, 40, 4, 2)
    wanted_out, wanted_sum, *wanted_grads = expected(query, key, value, grad, False)
    out, log_sum = torch.zeros_like(query), torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    parts = [slice(*pair) for pair in itertools.pairwise(cuts)]
    for part in parts:
        merge(out, log_sum, *attention_block(query, key[part], value[part], False, SCALE, backend))
    assert relative_error(out, wanted_out) <= 1e-14
    assert relative_error(log_sum, wanted_sum) <= 1e-14
    grads = [
        attention_block_backward(grad, query, key[part], value[part], out, log_sum, False, SCALE, backend)
        for part in parts
    ]
    dq, dk, dv = zip(*grads, strict=True)
    for actual, wanted in zip((sum(dq), torch.cat(dk), torch.cat(dv)), wanted_grads, strict=True):
        assert relative_error(actual, wanted) <= 1e-13


def test_merge_with_rows_that_saw_nothing():
    """A row with log_sum -inf becomes the block's, whatever finite numbers it held, and the others' mean is weighted.

    Also where one side outweighs the other by e^1000. Mutation: weights as exp(log_sum) (inf / inf).
    """
    out, log_sum = torch.full((5, 1, 1, 2), 7.0), torch.tensor([-math.inf, 0.0, -1e3, 1e3, 1e3]).view(5, 1, 1)
    block, block_sum = torch.ones(5, 1, 1, 2, dtype=torch.bfloat16), torch.tensor([3.0, math.log(2.0), 0.0, 0.0, 1e3])
    merge(out, log_sum, block, block_sum.view(5, 1, 1))
    torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor([1.0, (7.0 + 2.0) / 3.0, 1.0, 7.0, 4.0]))
    torch.testing.assert_close(log_sum.flatten(), torch.tensor([3.0, math.log(3.0), 0.0, 1e3, 1e3 + math.log(2.0)]))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(backend, dtype):
    """Scores of some 10,000: the largest takes all, nothing is infinite or NaN, merged or not.

    Mutation: logsumexp as exp().sum().log() in _eager.
    """
    query, key, value, grad = inputs(40, 40, 2, 2, dtype)
    query, key = query * 100, key * 100
    out, log_sum, *grads = computed(query, key, value, grad, True, backend)
    assert log_sum.max() > 5_000
    assert log_sum.min() < -100
    assert all(torch.isfinite(x).all() for x in (out, log_sum, *grads))
    wide = out.to(log_sum.dtype)
    merge(wide, log_sum, *attention_block(query, -key, value, False, SCALE, backend))
    assert torch.isfinite(wide).all()
    assert torch.isfinite(log_sum).all()
    assert wide.abs().max() <= value.abs().max() * 1.01


CUDA, CPU, META = (torch.device(name) for name in ("cuda", "cpu", "meta"))
CHOICES = [
    (CPU, torch.float64, 64, "auto", "flash_cpu"),
    (CPU, torch.bfloat16, 20, "flash", "flash_cpu"),
    (CPU, torch.float32, 64, "unfused", "eager"),
    (CPU, torch.float32, 64, "local", "eager"),
    (META, torch.bfloat16, 64, "auto", "eager"),
    (CUDA, torch.bfloat16, 64, "auto", "flash"),
    (CUDA, torch.float16, 256, "flash", "flash"),
    (CUDA, torch.bfloat16, 128, "fused", "cudnn"),
    (CUDA, torch.bfloat16, 136, "fused", "flash"),
    (CUDA, torch.bfloat16, 264, "auto", "eager"),
    (CUDA, torch.bfloat16, 20, "auto", "eager"),
    (CUDA, torch.float32, 64, "fused", "eager"),
    (CUDA, torch.bfloat16, 64, "unfused", "eager"),
]


@pytest.mark.parametrize(("device", "dtype", "head_size", "requested", "backend"), CHOICES)
def test_choose_backend(monkeypatch, device, dtype, head_size, requested, backend):
    """The table. Mutations: any bound moved, a condition left out."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=8))
    query = SimpleNamespace(device=device, dtype=dtype, size=(3, 2, 4, head_size).__getitem__)
    assert choose_backend(query, requested) == backend


def test_choose_backend_by_device(monkeypatch):
    """Devices before Ampere have neither kernel, and cuDNN is not deterministic. Mutation: either line dropped."""
    query = SimpleNamespace(device=CUDA, dtype=torch.float16, size=(3, 2, 4, 64).__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=7))
    assert choose_backend(query, "fused") == "eager"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_backend(query, "fused") == "flash"


def test_choose_backend_in_a_compiled_layer(monkeypatch):
    """The question about the device is one that dynamo folds into a constant; any other breaks the graph on CUDA.

    Mutation: torch.cuda.get_device_capability.
    """
    from torch._dynamo.variables.torch import constant_fold_functions

    asked = []
    for name in ("get_device_capability", "get_device_properties", "get_device_name"):
        answer = {"get_device_capability": (8, 0)}.get(name, SimpleNamespace(major=8, minor=0))
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name, answer=answer: (asked.append(name), answer)[1])
    query = SimpleNamespace(device=CUDA, dtype=torch.float16, size=(3, 2, 4, 64).__getitem__)
    assert choose_backend(query, "fused") == "cudnn"
    monkeypatch.undo()
    assert asked
    assert all(getattr(torch.cuda, name) in constant_fold_functions for name in asked)


@pytest.mark.parametrize("backend", ["flash", "cudnn", "packed"])
@pytest.mark.parametrize("keys", [24, 1])
def test_calls_of_cuda_kernels_fit_torch(backend, keys):
    """Torch's shape functions of the CUDA kernels take our arguments, and their results have the promised shapes.

    Mutations: an argument of a call left out, or two of different type swapped; a permutation of a result left out.
    """

    def empty(rows: int, heads: int, *head_size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(rows, batch, heads, *head_size, dtype=dtype, device="meta")

    batch, lengths = (1 if backend == "packed" else 2), None
    if backend == "packed":
        places = torch.empty(4, dtype=torch.int32, device="meta")
        lengths = Lengths(places, places, 10, 12)
    query, key = empty(16, 8, 32), empty(keys, 2, 32)
    backend = "cudnn" if backend == "cudnn" else "flash"
    out, log_sum = attention_block(query, key, key, False, SCALE, backend, lengths)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    assert (log_sum.shape, log_sum.dtype) == (query.shape[:3], torch.float32)
    whole = empty(16, 8, dtype=torch.float32)
    tensors = (query, query, key, key, query, whole)
    dq, dk, dv = attention_block_backward(*tensors, False, SCALE, backend, lengths)
    assert (dq.shape, dk.shape, dv.shape) == (query.shape, key.shape, key.shape)
    assert {dq.dtype, dk.dtype, dv.dtype} == {torch.bfloat16}


# Packed blocks


@pytest.fixture
def stand_in(monkeypatch) -> FlashStandIn:
    """Flash's operators replaced; any other use of CUDA's kernels fails."""
    instance = FlashStandIn()
    monkeypatch.setattr(attention_block_module, "_aten", instance)
    return instance


def draw(rows: int, steps: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Queries, gradient of the output, each step's keys and values, and what their gradients are added to."""
    generator = torch.Generator().manual_seed(rows)
    heads = [(rows, 1, HEADS)] * 2 + [(2, rows, 1, KEY_HEADS)] * 2 * steps
    query, grad, *others = [torch.randn(*x, HEAD_SIZE, generator=generator, dtype=torch.float64) for x in heads]
    return query, grad, others[:steps], others[steps:]


def run_blocks(plan: list[Block], steps: int, rows: int, backend: str, window: int = -1) -> list[Tensor]:
    """Output, log_sum and the gradients of queries and of each step's keys and values, block by block."""
    query, grad, keys_values, parts = draw(rows, steps)
    running = RunningAttention(query, SCALE, backend, window)
    for step in range(steps):
        running.add(keys_values[step], of_step(plan, step))
    out, log_sum = running.finish(NO_SINKS)
    gradient = AttentionGradient(grad, query, out, log_sum, SCALE, backend, window)
    for step in range(steps):
        before = parts[step].clone()
        gradient.add(keys_values[step], of_step(plan, step), parts[step])
        parts[step] -= before
    return [out, log_sum, gradient.grad_query, *parts]


def run_whole(plan: list[Block], steps: int, rows: int, window: int = -1) -> list[Tensor]:
    """The same from one mask over the keys of all steps, by autograd."""
    query, grad, keys_values, _ = draw(rows, steps)
    visible = torch.zeros(rows, steps, rows, dtype=torch.bool)
    for block in plan:
        part = visible[block.q_start : block.q_end, block.step, block.k_start : block.k_end]
        triangle = torch.ones_like(part).tril()
        part |= (triangle if window < 0 else triangle.triu(-window)) if block.causal else True
    mask = visible.view(rows, 1, 1, -1)
    leaves = [query.requires_grad_(), *(x.requires_grad_() for x in keys_values)]
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=2) for x in torch.cat(keys_values, dim=1))
    scores = (torch.einsum("qbnd,kbnd->qbnk", query, key) * SCALE).masked_fill(~mask, -math.inf)
    seen = mask.any(-1, keepdim=True)
    probabilities = torch.where(seen, torch.where(seen, scores, 0.0).softmax(-1), 0.0)
    out = torch.einsum("qbnk,kbnd->qbnd", probabilities, value)
    return [out.detach(), scores.detach().logsumexp(-1), *torch.autograd.grad((out * grad).sum(), leaves)]


def check(plan: list[Block], steps: int, rows: int, backend: str = "flash", window: int = -1) -> None:
    """The blocks together give attention under the mask that they stand for."""
    found, expected = run_blocks(plan, steps, rows, backend, window), run_whole(plan, steps, rows, window)
    for actual, wanted in zip(found, expected, strict=True):
        assert not actual.isnan().any()
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@st.composite
def rows_of_documents(draw: Callable[..., Any]) -> tuple[int, SequenceLayout]:
    """A context parallel size, and stretches that each have one or two documents and perhaps padding behind them."""
    cp, ends, documents = draw(st.integers(1, 4)), [0], []
    for _ in range(draw(st.integers(2, 4))):
        low, room = ends[-1], draw(st.integers(1, 3)) * 2 * cp
        first = draw(st.integers(1, room))
        second = draw(st.integers(first, room))
        documents += [(low, low + first), (low + first, low + second)]
        ends.append(low + room)
    return cp, SequenceLayout(tuple(ends), tuple(documents))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=rows_of_documents())
def test_packed_calls_equal_one_mask(stand_in: FlashStandIn, drawn: tuple[int, SequenceLayout]) -> None:
    """Documents of any length, gaps of padding and of chunks that see nothing, every rank, at most one call a step.

    Mutations: _places always a slice, or its indices in another order than the blocks; lengths of the keys taken from
    the queries; cumulative lengths without the 0, or as int64; max_keys from the queries; `before` not written back
    (rows of a gap are a copy); later steps stored instead of merged; gradients stored instead of added, or left out.
    In ops/attention_block.py: log_sum of packed rows not transposed, or not contiguous for the backward.
    """
    cp, layout = drawn
    rows = layout.stretches[-1] // cp
    for rank in range(cp):
        plan = attention_blocks(layout, cp, rank)
        stand_in.packed = stand_in.dense = 0
        check(plan, cp, rows)
        sizes = [len(of_step(plan, step)) for step in range(cp)]
        assert stand_in.packed == 2 * sum(size > 1 for size in sizes)
        assert stand_in.dense == 2 * sizes.count(1)


@settings(max_examples=15, deadline=None)
@given(drawn=rows_of_documents())
def test_loop_over_blocks_equals_one_mask(drawn: tuple[int, SequenceLayout]) -> None:
    """The same without packing, by the CPU's kernel. Mutations: as above, of what is not about packing."""
    cp, layout = drawn
    for rank in range(cp):
        check(attention_blocks(layout, cp, rank), cp, layout.stretches[-1] // cp, "flash_cpu")


@pytest.mark.parametrize("causal", [True, False])
def test_many_blocks_in_several_calls(stand_in, monkeypatch, causal):
    """More blocks than one call takes. Mutation: only the first part, or parts that overlap."""
    monkeypatch.setattr(block_attention, "_BLOCKS_PER_CALL", 3)
    ends = [0, 1, 2, 9, 10, 17, 24, 30, 32]
    layout = SequenceLayout((0, 32), tuple(itertools.pairwise(ends)))
    check(attention_blocks(layout, 1, 0, causal), 1, 32)
    assert stand_in.packed == 6


def test_without_gaps_rows_are_slices():
    """Nothing is gathered where blocks are neighbours, and indices are used elsewhere. Mutation: always one."""
    neighbours = [Block(0, 2, 5, 2, 5, 1), Block(0, 5, 9, 5, 9, 1)]
    (call,) = calls(neighbours, "flash", torch.device("cpu"))
    assert (call.rows, call.columns, call.causal) == (slice(2, 9), slice(2, 9), True)
    (call,) = calls([Block(1, 0, 3, 0, 1, 0), Block(1, 3, 4, 2, 4, 0)], "flash", torch.device("cpu"))
    assert (call.rows, call.causal) == (slice(0, 4), False)
    assert call.columns.tolist() == [0, 2, 3]
    assert call.lengths.cu_queries.tolist() == [0, 3, 4]
    assert call.lengths.cu_keys.tolist() == [0, 1, 3]
    assert (call.lengths.max_queries, call.lengths.max_keys) == (3, 2)


def test_cudnn_leaves_packed_rows_and_single_keys_to_flash(stand_in):
    """cuDNN would plan anew for each length, and has no kernel for one key. Mutation: either case dropped."""
    documents = SequenceLayout((0, 12), ((0, 5), (5, 12)))
    check(attention_blocks(documents, 1, 0), 1, 12, "cudnn")
    check(attention_blocks(SequenceLayout((0, 8), ((3, 4),)), 1, 0), 1, 8, "cudnn")
    assert (stand_in.packed, stand_in.dense) == (2, 2)


def test_cudnn_gets_what_it_takes_for_granted(monkeypatch):
    """It keeps graphs by the strides of query, key and value alone, so output and gradient must lie as the query does.

    Mutations of ops/attention_block.py: a .contiguous() left out; an argument of the forward in another's place.
    """
    strides: list[tuple[int, ...]] = []

    class CuDNN:
        def _scaled_dot_product_cudnn_attention(
            self, query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale
        ):
            assert (attn_bias, return_debug_mask, scale) == (None, False, SCALE)
            assert compute_log_sumexp is is_causal is True
            assert isinstance(dropout_p, float)
            assert dropout_p == 0.0
            return query, query[..., :1], None

        def _scaled_dot_product_cudnn_attention_backward(
            self, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
            cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale,
        ):  # fmt: skip
            strides.extend(x.stride() for x in (grad_out, query, out))
            assert logsumexp.shape == (*query.shape[:3], 1)
            assert logsumexp.is_contiguous()
            assert attn_bias is cum_seq_q is cum_seq_k is None
            assert (max_q, max_k, dropout_p, is_causal, scale) == (6, 6, 0.0, True, SCALE)
            return query, key, value

    monkeypatch.setattr(attention_block_module, "_aten", CuDNN())
    query = torch.randn(6, 2, HEADS, 3 * HEAD_SIZE)[..., :HEAD_SIZE]
    key, grad = torch.randn(6, 2, KEY_HEADS, HEAD_SIZE), torch.ones(()).expand(query.shape)
    out, log_sum = torch.randn(2, HEADS, 6, HEAD_SIZE).permute(2, 0, 1, 3), torch.randn(6, 2, HEADS)
    assert attention_block(query, key, key, True, SCALE, "cudnn")[1].shape == (6, 2, HEADS)
    attention_block_backward(grad, query, key, key, out, log_sum, True, SCALE, "cudnn")
    assert len(set(strides)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_result_is_wide_once_blocks_are_merged(dtype):
    """One step keeps the queries' dtype; further ones add in float32, to within one rounding of the whole.

    A query that saw nothing has zeros and -inf. Mutation: the result never widened (bfloat16 errors add up).
    """
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(16, 1, HEADS, HEAD_SIZE, generator=generator).to(dtype)
    keys = torch.randn(64, 2, 4, 1, KEY_HEADS, HEAD_SIZE, generator=generator).to(dtype)
    running = RunningAttention(query, SCALE, "flash_cpu")
    for step, part in enumerate(keys):
        running.add(part, [Block(step, 0, 15, 0, 4, 0)])
        assert running.out.dtype == (dtype if step == 0 else torch.float32)
    out, log_sum = running.finish(NO_SINKS)
    whole = keys.movedim(1, 0).flatten(1, 2)
    wanted, wanted_sum = attention_block(query[:15].float(), *whole.float(), False, SCALE, "eager")
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[:15].float(), wanted, rtol=bound, atol=bound / 10)
    torch.testing.assert_close(log_sum[:15], wanted_sum, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[15], torch.zeros_like(out[15]))
    assert (log_sum[15] == -torch.inf).all()
    assert out.dtype == dtype
    assert out.is_contiguous()


@pytest.mark.parametrize("window", [0, 2, 40])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_windows_of_documents(stand_in: FlashStandIn, backend: str, window: int) -> None:
    """By flash, with and without packing. Mutations: the window left out of the backward pass; right edge -1; cuDNN
    called for a window, which it does not know."""
    check(attention_blocks(SequenceLayout((0, 12), ((0, 5), (5, 12))), 1, 0), 1, 12, backend, window)
    check(attention_blocks(SequenceLayout((0, 12), ((0, 12),)), 1, 0), 1, 12, backend, window)
    assert (stand_in.packed, stand_in.dense) == (2, 2)


@pytest.mark.parametrize("window", [0, 2, 40])
@pytest.mark.parametrize("backend", ["flash_cpu", "eager"])
def test_windows_by_the_cpus_kernel_and_by_hand(backend: str, window: int) -> None:
    """Mutation: a window one wider."""
    check(attention_blocks(SequenceLayout((0, 12), ((0, 5), (5, 12))), 1, 0), 1, 12, backend, window)
