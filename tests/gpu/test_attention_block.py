"""CUDA's attention kernels against plain operations in float32, and packed documents on one GPU.

pytest -m gpu
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.context_parallel import PackedSeqParams, SequenceLayout
from megatron_lite.context_parallel.block_attention import AttentionGradient, RunningAttention, of_step
from megatron_lite.context_parallel.blocks import Block, attention_blocks
from megatron_lite.ops.attention_block import attention_block, attention_block_backward, choose_backend, merge
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.transformer_config import TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
SCALE = 0.1
NO_SINKS = torch.empty(0)
DTYPES = [torch.bfloat16, torch.float16]
# Largest error in units of the largest number (of 0.1 where all are nearly 0): a few roundings of the dtype.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture
def groups():
    """A world of one process on NCCL."""
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.shutdown()


def inputs(queries: int, keys: int, heads: int, key_heads: int, head_size: int, batch: int, dtype: torch.dtype):
    """Query, key, value and the gradient of the output; the query a strided part of a wider tensor."""
    torch.manual_seed(queries + keys)
    sizes = [(queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads)]
    query, key, value, grad = (
        torch.randn(s, batch, n, 2 * head_size, device="cuda").to(dtype)[..., :head_size] for s, n in sizes
    )
    return query, key.contiguous(), value.contiguous(), grad.contiguous()


def compute(tensors: tuple[Tensor, ...], causal: bool, backend: str, window: int = -1) -> list[Tensor]:
    """Output, log_sum and gradients of one block."""
    query, key, value, grad = tensors
    out, log_sum = attention_block(query, key, value, causal, SCALE, backend, window=window)
    seen = (grad, query, key, value, out, log_sum)
    return [out, log_sum, *attention_block_backward(*seen, causal, SCALE, backend, window=window)]


def assert_close(actual: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Equal to rounding, and finite."""
    for number, (x, y) in enumerate(zip(actual, wanted, strict=True)):
        assert x.shape == y.shape, number
        assert torch.isfinite(x).all(), number
        error = ((x.float() - y.float()).abs().max() / y.float().abs().max().clamp_min(0.1)).item()
        assert error <= BOUNDS[dtype], f"{number}: {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "head_size", "causal"),
    [
        (512, 512, 8, 8, 64, True),
        (300, 300, 8, 2, 128, True),
        (300, 700, 8, 1, 64, False),
        (700, 300, 4, 4, 40, False),
        (130, 2, 4, 2, 64, False),
        (2, 130, 4, 2, 64, False),
        (1, 130, 4, 2, 64, False),
        (64, 64, 4, 2, 256, True),
    ],
)
def test_block_equals_plain_operations(dtype, backend, queries, keys, heads, key_heads, head_size, causal):
    """Squares and rectangles, shared key heads, a strided query.

    Mutations of ops/attention_block.py: log_sum permuted otherwise, or not contiguous for the backward; causal left
    out; cuDNN given a gradient that lies otherwise than the output.
    """
    if backend == "cudnn" and head_size > 128:
        pytest.skip("choose_backend gives cuDNN no heads above 128")
    tensors = inputs(queries, keys, heads, key_heads, head_size, 2, dtype)
    wanted = compute(tuple(x.float() for x in tensors), causal, "eager")
    actual = compute(tensors, causal, backend)
    assert actual[1].dtype == torch.float32
    assert_close(actual, wanted, dtype)


@pytest.mark.parametrize("window", [0, 100, 127])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_a_window_equals_plain_operations(backend, window):
    """As gpt-oss has them. Mutation: the window left out, or one wider."""
    tensors = inputs(512, 512, 8, 2, 64, 2, torch.bfloat16)
    wanted = compute(tuple(x.float() for x in tensors), True, "eager", window)
    assert_close(compute(tensors, True, backend, window), wanted, torch.bfloat16)


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("cuts", [[0, 100, 300], [0, 1, 150, 300]], ids=["two", "three"])
def test_merged_blocks_equal_all_keys(backend, cuts):
    """Keys in several blocks: merged results, and the backward of each block with the merged log_sum."""
    dtype = torch.bfloat16
    query, key, value, grad = inputs(200, 300, 8, 2, 64, 1, dtype)
    wanted = compute((query.float(), key.float(), value.float(), grad.float()), False, "eager")
    out, log_sum = torch.zeros(query.shape, device="cuda"), torch.full(query.shape[:3], -math.inf, device="cuda")
    parts = [slice(*pair) for pair in itertools.pairwise(cuts)]
    for part in parts:
        merge(out, log_sum, *attention_block(query, key[part], value[part], False, SCALE, backend))
    out = out.to(dtype)
    grads = [
        attention_block_backward(grad, query, key[part], value[part], out, log_sum, False, SCALE, backend)
        for part in parts
    ]
    dq, dk, dv = zip(*grads, strict=True)
    actual = [out, log_sum, sum(x.float() for x in dq), torch.cat(dk), torch.cat(dv)]
    assert_close(actual, wanted, dtype)


LAYOUTS = {
    "documents": SequenceLayout((0, 512), ((0, 1), (1, 200), (200, 203), (203, 512))),
    "padding between": SequenceLayout((0, 256, 512), ((0, 100), (130, 250), (256, 500))),
    "one token each": SequenceLayout((0, 512), tuple((i, i + 1) for i in range(512))),
}


def run_plan(plan: list[Block], steps: int, tensors: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    """All steps of a plan, with the keys of every step in one tensor [steps, 2, s, b, g, d]."""
    query, grad, keys_values = tensors
    running = RunningAttention(query, SCALE, backend)
    for step in range(steps):
        running.add(keys_values[step], of_step(plan, step))
    out, log_sum = running.finish(NO_SINKS)
    gradient = AttentionGradient(grad, query, out, log_sum, SCALE, backend)
    parts = torch.zeros_like(keys_values, dtype=torch.float32)
    for step in range(steps):
        gradient.add(keys_values[step], of_step(plan, step), parts[step])
    return [out, log_sum.masked_fill(log_sum.isinf(), 0.0), gradient.grad_query, parts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_packed_blocks_equal_plain_operations(name, cp, key_heads, dtype, backend):
    """Documents in one call a step, with and without gaps, each rank's plan in turn, without waiting for the device.

    "One token each" with shared heads is the case in which the kernel swaps queries and heads. Mutations of
    context_parallel/block_attention.py: _places always a slice; lengths of the keys taken from the queries; copies to
    the device that wait.
    """
    for rank in range(cp):
        plan = attention_blocks(LAYOUTS[name], cp, rank)
        rows = 512 // cp
        query, _, _, grad = inputs(rows, rows, 8, key_heads, 64, 1, dtype)
        keys_values = torch.randn(cp, 2, rows, 1, key_heads, 64, device="cuda").to(dtype)
        wanted = run_plan(plan, cp, (query.float(), grad.float(), keys_values.float()), "eager")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = run_plan(plan, cp, (query, grad, keys_values), backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_close(actual, wanted, dtype)


def packed_attention(backend: str = "auto") -> DotProductAttention:
    """Attention of 8 heads of 64 that share 2 key heads."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=512,
        num_attention_heads=8,
        num_query_groups=2,
        bf16=True,
        attention_backend=backend,
    )
    return DotProductAttention(config, layer_number=1)


def packed_rows(ends: list[int], attention: DotProductAttention) -> PackedSeqParams:
    """Documents one behind the other, with their plan made."""
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor(ends), cu_seqlens_split=torch.tensor([0, 512]))
    attention.prepare(packed)
    return packed


def by_mask(query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
    """The same in float32, with the mask written out."""
    document = torch.searchsorted(torch.tensor(ends[1:], device="cuda"), torch.arange(512, device="cuda"), right=True)
    visible = (document[:, None] == document[None]).tril() & (document < len(ends) - 1)[:, None]
    first = [x.float().permute(1, 2, 0, 3) for x in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(*first, attn_mask=visible, enable_gqa=True)
    return torch.where(visible.any(1)[:, None, None, None], out.permute(2, 0, 1, 3), 0.0).flatten(2)


DOCUMENTS = [[0, 1, 100, 101, 400, 512], [0, 512], [0, 200, 450], [0, *range(3, 512, 7)]]


@pytest.mark.parametrize("backend", ["auto", "fused", "unfused"])
@pytest.mark.parametrize("ends", DOCUMENTS, ids=len)
def test_packed_attention_equals_a_mask(groups, ends, backend):
    """DotProductAttention of packed rows on one GPU, forward and backward, in bfloat16."""
    attention = packed_attention(backend)
    query, key, value, grad = inputs(512, 512, 8, 2, 64, 1, torch.bfloat16)
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = attention(*leaves, packed_seq_params=packed_rows(ends, attention))
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    wanted = by_mask(*wide, ends)
    weight = grad.flatten(2)
    assert_close(
        [out, *torch.autograd.grad((out * weight).sum(), leaves)],
        [wanted, *torch.autograd.grad((wanted * weight.float()).sum(), wide)],
        torch.bfloat16,
    )


def test_compiled_packed_attention_is_compiled_once(groups):
    """A compiled layer takes rows with any number of documents above 1, and computes what the uncompiled one does.

    One block alone is compiled for itself, as torch does with every dimension of 1. Mutation of
    context_parallel/operators.py: the plan as a list of blocks instead of a tensor.
    """
    attention = packed_attention()
    assert choose_backend(torch.empty(1, 1, 8, 64, device="cuda", dtype=torch.bfloat16)) == "flash"
    compiled = torch.compile(attention)
    query, key, value, _ = inputs(512, 512, 8, 2, 64, 1, torch.bfloat16)
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    for number, ends in enumerate([[0, 1, 100, 101, 400, 512], [0, 200, 450], [0, *range(3, 512, 7)], [0, 9, 10, 512]]):
        packed = packed_rows(ends, attention)
        wanted = attention(*leaves, packed_seq_params=packed)
        # The second number of documents may make the plan's length dynamic; none after it compiles anything.
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            out = compiled(*leaves, packed_seq_params=packed)
        assert_close([out], [wanted], torch.bfloat16)
        out.float().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)
