"""DotProductAttention against softmax(q k^T) v written out, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel import model_parallel_cuda_manual_seed
from megatron_lite.transformer import dot_product_attention
from megatron_lite.transformer.dot_product_attention import DotProductAttention, sdpa_kernels
from megatron_lite.transformer.enums import AttnMaskType
from megatron_lite.transformer.transformer_config import TransformerConfig

LENGTH, BATCH, HEADS, WIDTH = 9, 2, 4, 8


def config(**settings: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=4, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, fp64=True, **settings)


def draw(length: int = LENGTH, groups: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def one(heads: int, tokens: int) -> Tensor:
        return torch.randn(tokens, BATCH, heads, WIDTH, dtype=torch.float64, generator=generator)

    return one(HEADS, length), one(groups, LENGTH), one(groups, LENGTH)


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    scale: float = 1 / math.sqrt(WIDTH),
    sinks: Tensor | None = None,
) -> Tensor:
    """`hidden` [sq, sk] or [b, sq, sk]: True where attention is forbidden. `sinks` [n] are scores without a value."""
    outputs = []
    for head in range(HEADS):
        group = head * key.size(2) // HEADS
        scores = torch.einsum("qbd,kbd->bqk", query[:, :, head], key[:, :, group]) * scale
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[head].expand(*scores.shape[:-1], 1)), -1)
        weights = scores.softmax(-1)[..., : key.size(0)]
        outputs.append(torch.einsum("bqk,kbd->qbd", weights, value[:, :, group]))
    return torch.cat(outputs, -1)


def later() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_with_grouped_queries(groups: int) -> None:
    """Fails if the heads of a group are taken as i % g instead of i // (n / g)."""
    query, key, value = draw(groups=groups)
    attention = DotProductAttention(config=config(num_query_groups=groups), layer_number=1)
    got = attention(query=query, key=key, value=value, attention_mask=None)
    torch.testing.assert_close(got, written_out(query, key, value, later()), rtol=1e-12, atol=1e-12)


def test_mask_types() -> None:
    query, key, value = draw()
    padding = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    padding[1, ..., 6:] = True
    attention = DotProductAttention(config(), 1)
    for kind, mask, hidden in (
        (AttnMaskType.no_mask, None, torch.zeros(LENGTH, LENGTH, dtype=torch.bool)),
        (AttnMaskType.padding, padding, padding[:, 0].expand(-1, LENGTH, -1)),
        (AttnMaskType.padding_causal, padding, padding[:, 0] | later()),
        (AttnMaskType.causal, later()[None, None], later()),
    ):
        got = attention(query, key, value, mask, attn_mask_type=kind)
        torch.testing.assert_close(got, written_out(query, key, value, hidden), rtol=1e-12, atol=1e-12)
    cross = DotProductAttention(config(), 1, attention_type="cross")
    seen = cross(query[:3], key, value)
    torch.testing.assert_close(seen, written_out(query[:3], key, value, torch.zeros(3, LENGTH, dtype=torch.bool)))


@pytest.mark.parametrize("window", [(2, 0), (0, 0), (8, 0), (-1, 0), (3, 5)])
def test_sliding_window_equals_an_explicit_mask(window: tuple[int, int]) -> None:
    """Fails with an off-by-one at the left edge: a window of 2 shows the query and two positions before it."""
    query, key, value = draw(groups=2)
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    left, right = window
    outside = (columns < rows - left) if left >= 0 else torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    attention = DotProductAttention(config(window_size=window, num_query_groups=2), 1)
    got = attention(query, key, value)
    torch.testing.assert_close(got, written_out(query, key, value, outside | later()), rtol=1e-12, atol=1e-12)
    both_sides = attention(query, key, value, attn_mask_type=AttnMaskType.no_mask)
    wanted = written_out(query, key, value, outside | (columns > rows + right))
    torch.testing.assert_close(both_sides, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("frequency", "windowed"), [(None, [1, 2, 3, 4]), (2, [1, 3]), (4, [1, 2, 3]), ([0, 1, 1, 0], [2, 3])]
)
def test_layers_with_a_window(frequency: Any, windowed: list[int]) -> None:
    settings = config(window_size=(2, 0), window_attn_skip_freq=frequency)
    layers = [DotProductAttention(settings, number) for number in range(1, 5)]
    assert [layer.layer_number for layer in layers if layer.window_size is not None] == windowed
    assert DotProductAttention(config(window_attn_skip_freq=frequency), 1).window_size is None


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_queries_at_the_end_of_more_keys(window: tuple[int, int] | None) -> None:
    """What decoding with a cache does: the last query stands at the last key."""
    query, key, value = draw()
    attention = DotProductAttention(config(window_size=window), 1)
    whole = attention(query, key, value)
    for count in (1, 4):
        torch.testing.assert_close(attention(query[-count:], key, value), whole[-count:], rtol=1e-12, atol=1e-12)


def test_a_query_that_may_look_nowhere_gives_zero_and_finite_gradients() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in draw())
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[0, :, 5] = True
    output = DotProductAttention(config(), 1)(query, key, value, mask)
    assert output[5, 0].eq(0).all()
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_no_queries() -> None:
    """Nothing in, nothing out. Mutation: the kernel of a CPU, which divides by the length."""
    query, key, value = (tensor[:0].requires_grad_() for tensor in draw())
    output = DotProductAttention(config(), 1)(query, key, value)
    assert output.shape == (0, query.size(1), query.size(2) * query.size(3))
    output.sum().backward()


def test_scale_and_backends() -> None:
    query, key, value = draw()
    wanted = written_out(query, key, value, later(), scale=0.7)
    for attention in (
        DotProductAttention(config(), 1, softmax_scale=0.7),
        DotProductAttention(config(softmax_scale=0.7), 1),
        DotProductAttention(config(softmax_scale=0.7, attention_backend="unfused"), 1),
        DotProductAttention(config(softmax_scale=0.7, attention_backend="flash"), 1),
    ):
        torch.testing.assert_close(attention(query, key, value), wanted, rtol=1e-12, atol=1e-12)


def test_softmax_is_float32_for_bfloat16_input() -> None:
    query, key, value = (tensor.bfloat16() for tensor in draw())
    for backend in ("auto", "unfused"):
        got = DotProductAttention(config(attention_backend=backend), 1)(query * 8, key, value)
        wanted = written_out(query.double() * 8, key.double(), value.double(), later())
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).abs().max() < 0.02


def test_dropout_draws_from_the_model_parallel_stream() -> None:
    """T12. Fails if dropout draws from the default stream, which tensor parallel ranks share."""
    query, key, value = draw()
    attention = DotProductAttention(config(attention_dropout=0.5), 1)
    model_parallel_cuda_manual_seed(1)
    before = torch.get_rng_state()
    first = attention(query, key, value)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(attention(query, key, value), first)
    model_parallel_cuda_manual_seed(1)
    assert torch.equal(attention(query, key, value), first)
    model_parallel_cuda_manual_seed(1, tp_rank=1)
    assert not torch.equal(attention(query, key, value), first)
    plain = written_out(query, key, value, later())
    torch.testing.assert_close(attention.eval()(query, key, value), plain, rtol=1e-12, atol=1e-12)


def test_what_is_refused() -> None:
    query, key, value = draw()
    with pytest.raises(ConfigError, match="context_parallel_size is 2"):
        DotProductAttention(config(context_parallel_size=2), 1)
    with pytest.raises(ConfigError, match="'self' or 'cross'"):
        DotProductAttention(config(), 1, attention_type="decoder")
    attention = DotProductAttention(config(), 1)
    with pytest.raises(ConfigError, match=r"dtype torch.float64, but it must be torch.bool"):
        attention(query, key, value, later().double())
    with pytest.raises(ConfigError, match="attention_bias"):
        attention(query, key, value, attention_bias=later().double())
    query, key, value = (x[:, :1] for x in (query, key, value))
    other = PackedSeqParams(cu_seqlens_q=torch.tensor([0, query.size(0) + 1]))
    with pytest.raises(ConfigError, match="packed_seq_params describes"):
        attention(query, key, value, packed_seq_params=other)
    fitting = PackedSeqParams(cu_seqlens_q=torch.tensor([0, query.size(0)]))
    with pytest.raises(ConfigError, match=r"There are \d+ queries and \d+ keys"):
        attention(query, key[1:], value[1:], packed_seq_params=fitting)
    with pytest.raises(ConfigError, match="attention_mask is given"):
        attention(query, key, value, later(), packed_seq_params=fitting)


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_packed_shapes_that_are_refused(window: tuple[int, int] | None) -> None:
    """Mutation: _check_shapes that returns at once; some are then computed wrongly, others fail in a kernel."""
    rows = [x[:, :1] for x in draw()]
    query, key, value = rows
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 4, LENGTH]))
    attention = DotProductAttention(config(window_size=window), 1)
    attention(*rows, packed_seq_params=packed)
    attention(*(x.squeeze(1) for x in rows), packed_seq_params=packed)
    attention(query, key[:, :, :2], value[:, :, :2], packed_seq_params=packed)
    refused = {
        "must divide theirs": [
            (query, key[:, :, :3], value[:, :, :3]),
            (query, key[:, :, :2], value[:, :, :1]),
            (query, key, value[1:]),
            (query, key[..., :4], value[..., :4]),
            (query, key.squeeze(1), value.squeeze(1)),
        ],
        "there are 2 sequences of": [draw()],
        r"it must be \[s, b, n, d\]": [tuple(x.flatten(1) for x in rows)],
    }
    for message, cases in refused.items():
        for case in cases:
            with pytest.raises(ConfigError, match=message):
                attention(*case, packed_seq_params=packed)


def test_packed_batches_are_rows_behind_one_another() -> None:
    """Two sequences with their own documents. Mutations: [s, b] not transposed; rows cut in the middle accepted."""
    batch = draw()
    documents = torch.tensor([0, 4, LENGTH, LENGTH + 1, 2 * LENGTH])
    rows = PackedSeqParams(cu_seqlens_q=documents, cu_seqlens_split=torch.arange(3) * LENGTH)
    attention = DotProductAttention(config(), 1)
    together = attention(*batch, packed_seq_params=rows)
    for number, cumulative in enumerate(([0, 4, LENGTH], [0, 1, LENGTH])):
        alone = PackedSeqParams(cu_seqlens_q=torch.tensor(cumulative))
        expected = attention(*(x[:, number : number + 1] for x in batch), packed_seq_params=alone)
        torch.testing.assert_close(together[:, number : number + 1], expected)
    whole = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 2 * LENGTH]))
    with pytest.raises(ConfigError, match="must be split by itself"):
        attention(*batch, packed_seq_params=whole)


SINKS = torch.tensor([-1.0, 0.5, 2.0, 0.0], dtype=torch.float64)


def with_sinks(**settings: Any) -> DotProductAttention:
    attention = DotProductAttention(config(softmax_type="learnable", **settings), 1)
    assert attention.softmax_offset is not None
    attention.softmax_offset.data.copy_(SINKS)
    return attention


def gradients(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Of a sum in which each element of the output weighs otherwise."""
    weights = torch.linspace(-1.0, 2.0, output.numel(), dtype=torch.float64).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), leaves))


def within(window: tuple[int, int] | None) -> Tensor:
    """[sq, sk]: True where a causal query with this window may not look."""
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    return later() if window is None else later() | (columns < rows - window[0])


@pytest.mark.parametrize("backend", ["auto", "unfused"])
@pytest.mark.parametrize("window", [None, (2, 0), (0, 0)])
@pytest.mark.parametrize("groups", [4, 1])
def test_sinks_take_part_in_the_denominator(groups: int, window: tuple[int, int] | None, backend: str) -> None:
    """Mutations: the sink not in log_sum; its gradient with the other sign; a window one wider."""
    query, key, value = (x.requires_grad_() for x in draw(groups=groups))
    attention = with_sinks(num_query_groups=groups, window_size=window, attention_backend=backend)
    assert attention.softmax_offset is not None
    sinks = SINKS.clone().requires_grad_()
    got = attention(query, key, value)
    wanted = written_out(query, key, value, within(window), sinks=sinks)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    found = gradients(got, query, key, value, attention.softmax_offset)
    for ours, theirs in zip(found, gradients(wanted, query, key, value, sinks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_sinks_by_an_explicit_mask(window: tuple[int, int] | None) -> None:
    """What blocks cannot do: a mask, fewer queries than keys, packed documents with dropout."""
    query, key, value = (x.requires_grad_() for x in draw(groups=2))
    attention = with_sinks(num_query_groups=2, window_size=window)
    assert attention.softmax_offset is not None
    sinks = SINKS.clone().requires_grad_()
    padding = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    padding[1, ..., :3] = True
    hidden = padding[:, 0] | within(window)
    got, wanted = attention(query, key, value, padding), written_out(query, key, value, hidden, sinks=sinks)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    found = gradients(got, query, key, value, attention.softmax_offset)
    for ours, theirs in zip(found, gradients(wanted, query, key, value, sinks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    whole = attention(query, key, value)
    torch.testing.assert_close(attention(query[-2:], key, value), whole[-2:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, (1, 0)])
def test_sinks_of_packed_documents(window: tuple[int, int] | None) -> None:
    """Each document has the same sinks. With dropout, in training only, it goes by a mask instead of blocks."""
    rows = tuple(x[:, :1] for x in draw())
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 4, LENGTH]))
    document = torch.tensor([0] * 4 + [1] * (LENGTH - 4))
    hidden = within(window) | (document[:, None] != document[None, :])
    wanted = written_out(*rows, hidden, sinks=SINKS)
    attention = with_sinks(window_size=window)
    torch.testing.assert_close(attention(*rows, packed_seq_params=packed), wanted, rtol=1e-12, atol=1e-12)
    attention.attention_dropout = 1e-300  # drops nothing
    model_parallel_cuda_manual_seed(1)
    torch.testing.assert_close(attention(*rows, packed_seq_params=packed), wanted, rtol=1e-12, atol=1e-12)


def test_a_sink_of_score_zero_is_softmax_off_by_one() -> None:
    query, key, value = draw()
    got = DotProductAttention(config(softmax_type="off-by-one"), 1)(query, key, value)
    wanted = written_out(query, key, value, later(), sinks=torch.zeros(HEADS, dtype=torch.float64))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"softmax_type": "learnable"}, {"window_size": (3, 0)}])
def test_shapes_that_blocks_cannot_do(settings: dict[str, Any]) -> None:
    """SDPA broadcasts them or refuses them. Mutation: given to a kernel that reads other memory then."""
    attention = DotProductAttention(config(**settings), 1)
    query, key, value = draw()
    one_batch = attention(query, key[:, :1], value[:, :1])
    expanded = attention(query, key[:, :1].expand(-1, BATCH, -1, -1), value[:, :1].expand(-1, BATCH, -1, -1))
    torch.testing.assert_close(one_batch, expanded, rtol=1e-12, atol=1e-12)
    narrow = attention(query, key, value[..., :3])
    torch.testing.assert_close(narrow.unflatten(-1, (HEADS, 3)), attention(query, key, value).unflatten(
        -1, (HEADS, WIDTH))[..., :3], rtol=1e-12, atol=1e-12)  # fmt: skip
    with pytest.raises(RuntimeError):
        attention(query, key[:, :, :3], value[:, :, :3])


def test_sinks_are_computed_in_the_dtype_of_the_scores() -> None:
    """As all weights are, whoever casts them: FSDP where there are replicas, the layer otherwise."""
    attention = with_sinks()
    sinks = attention.sinks(draw()[0].bfloat16())
    assert sinks is not None
    assert sinks.dtype == torch.bfloat16


def test_kernels_of_sdpa() -> None:
    """Torch chooses, under a mask not cuDNN's. Mutations: cuDNN under a mask; a request ignored."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert sdpa_kernels(gpu, "auto", masked=False) == sdpa_kernels(cpu, "auto", masked=True) == []
    assert SDPBackend.CUDNN_ATTENTION not in sdpa_kernels(gpu, "auto", masked=True)
    assert SDPBackend.FLASH_ATTENTION in sdpa_kernels(gpu, "auto", masked=True)
    for masked in (False, True):
        assert sdpa_kernels(gpu, "flash", masked) == [SDPBackend.FLASH_ATTENTION]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_is_that_and_a_compiled_layer_stays_one_graph(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's compiler knows sdpa_kernel in a with statement only. Mutations: not handed on; an ExitStack."""
    attention = DotProductAttention(config(), layer_number=1)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    run = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    taken = {}
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        monkeypatch.setattr(dot_product_attention, "sdpa_kernels", lambda *_, kernel=kernel: [kernel])
        torch._dynamo.reset()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run(*draw(), mask)
        names = {event.key for event in profiler.key_averages()}
        taken[kernel] = "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert taken == {SDPBackend.MATH: False, SDPBackend.FLASH_ATTENTION: True}
