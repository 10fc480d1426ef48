"""linear_cross_entropy against log_softmax over whole logits, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite import parallel_state
from megatron_lite.ops.linear_cross_entropy import default_chunk_tokens, linear_cross_entropy
from tests.parallel.pool import WorkerPool

TOKENS, HIDDEN, VOCAB, PADDED = 37, 8, 50, 56


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[3] = -100
    mask = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    mask[5:9] = 0
    return hidden.to(dtype), weight.to(dtype), labels, mask


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    losses = F.cross_entropy(hidden @ weight[:VOCAB].t(), labels, reduction="none", ignore_index=-100)
    return losses if mask is None else losses * mask


def gradients(function: Any, hidden: Tensor, weight: Tensor, incoming: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = function(hidden, weight)
    (losses.sum() / 7 if incoming is None else losses * incoming).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_cross_entropy_on_whole_logits(chunk: int | None, uniform: bool, masked: bool) -> None:
    hidden, weight, labels, mask = problem()
    incoming = None if uniform else torch.linspace(-1, 2, TOKENS, dtype=torch.float64)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(
            h, w, labels, loss_mask=mask if masked else None, vocab_size=VOCAB, chunk_tokens=chunk
        )

    got = gradients(ours, hidden, weight, incoming)
    wanted = gradients(lambda h, w: reference(h, w, labels, mask if masked else None), hidden, weight, incoming)
    for ours_, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-13)
    assert got[0][3] == 0, "an ignored label has no loss"
    assert got[1][3].eq(0).all(), "an ignored label has no gradient"
    assert got[2][VOCAB:].eq(0).all(), "padding rows have no gradient"


def test_blocks_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the softmax sees a few rows of a chunk at a time; how many changes nothing."""
    hidden, weight, labels, mask = problem()

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, loss_mask=mask, vocab_size=VOCAB, chunk_tokens=10)

    whole = gradients(ours, hidden, weight, None)
    monkeypatch.setattr("megatron_lite.ops.linear_cross_entropy._CPU_BLOCK_BYTES", 3 * VOCAB * 8)
    for in_blocks, at_once in zip(gradients(ours, hidden, weight, None), whole, strict=True):
        assert torch.equal(in_blocks, at_once)


def test_gradient_of_a_float32_weight_is_not_rounded_to_bfloat16() -> None:
    hidden, weight, labels, mask = problem(dtype=torch.bfloat16)
    _, grad_hidden, grad_weight = gradients(
        lambda h, w: linear_cross_entropy(h, w, labels, loss_mask=mask, vocab_size=VOCAB),
        hidden,
        weight.float(),
        None,
    )
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(grad_weight, grad_weight.bfloat16().float())


class RecordProducts(TorchDispatchMode):
    """Shapes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.shapes |= {one.shape for one in args if isinstance(one, Tensor)}
        return func(*args, **(kwargs or {}))


def test_padding_is_multiplied_up_to_a_multiple_of_64() -> None:
    """Rows behind it are not, whatever they hold. Mutations: the real rows only, 50; their logits not -inf."""
    hidden, weight, labels, mask = problem()
    weight = F.pad(weight, (0, 0, 0, 64 - PADDED), value=3.0)
    wanted = gradients(lambda h, w: reference(h, w, labels, mask), hidden, weight, None)
    weight = F.pad(weight, (0, 0, 0, 136), value=torch.nan)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, loss_mask=mask, vocab_size=VOCAB, chunk_tokens=16)

    with RecordProducts() as record:
        loss, grad_hidden, grad_weight = gradients(ours, hidden, weight, None)
    assert {size for shape in record.shapes for size in shape} == {16, TOKENS % 16, HIDDEN, 64}
    grad_weight = grad_weight[:64]
    for found, expected in zip((loss, grad_hidden, grad_weight), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_no_tokens() -> None:
    """Losses of none, and gradients of zeros. Mutation: the weight's gradient is whatever the memory held."""
    hidden = torch.empty(0, 16, requires_grad=True)
    weight = torch.randn(24, 16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()


def test_gradcheck() -> None:
    hidden, weight, labels, mask = problem(1)
    hidden, weight = hidden[:5].requires_grad_(), weight[:, :].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels[:5], loss_mask=mask[:5], vocab_size=VOCAB, chunk_tokens=2),
        (hidden, weight),
        fast_mode=True,
    )


def test_backward_twice_gives_the_same_gradient() -> None:
    hidden, weight, labels, _ = problem()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB).sum() * 3
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


def test_evaluation_forms_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, _ = problem()
    wanted = linear_cross_entropy(hidden, weight.requires_grad_(), labels, vocab_size=VOCAB).detach()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(Tensor, "scatter_add_", refuse)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB), wanted)


def test_huge_logits_and_unknown_labels() -> None:
    hidden, weight, labels, _ = problem()
    got = linear_cross_entropy(hidden * 1e4, weight, labels, vocab_size=VOCAB)
    torch.testing.assert_close(got, reference(hidden * 1e4, weight, labels, None))
    labels[0] = VOCAB  # a padding entry is no token
    assert linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)[0] == torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_loss_and_close_gradients(dtype: torch.dtype) -> None:
    hidden, weight, labels, mask = problem(dtype=dtype)
    got = gradients(
        lambda h, w: linear_cross_entropy(h, w, labels, loss_mask=mask, vocab_size=VOCAB, chunk_tokens=10),
        hidden,
        weight,
        None,
    )
    wanted = gradients(lambda h, w: reference(h, w, labels, mask), hidden.double(), weight.double(), None)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == dtype
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours.double() - theirs).abs().max() < 2e-2 * theirs.abs().max()


def test_chunks_bound_the_memory_of_logits() -> None:
    assert default_chunk_tokens(128_256, torch.device("cuda"), torch.bfloat16) * 128_256 <= 2**27
    assert default_chunk_tokens(8192, torch.device("cpu"), torch.float32) == 256
    assert default_chunk_tokens(8192, torch.device("cpu"), torch.bfloat16) == 512


def _sharded(rank: int, world_size: int, uniform: bool, padded: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    hidden, weight, labels, mask = problem()
    weight = F.pad(weight, (0, 0, 0, padded - PADDED))
    rows = padded // world_size
    incoming = None if uniform else torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    group = parallel_state.get_tensor_model_parallel_group()

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(
            h, w, labels, loss_mask=mask, vocab_start=rank * rows, vocab_size=VOCAB, tp_group=group, chunk_tokens=10
        )

    return gradients(ours, hidden * scale, weight[rank * rows : (rank + 1) * rows], incoming)


@pytest.mark.parametrize(("world_size", "padded"), [(2, 56), (4, 56), (4, 80)])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_split_vocabulary(pool: WorkerPool, world_size: int, padded: int, uniform: bool, scale: float) -> None:
    """Padded to 80 over 4 ranks, the last rank holds padding only."""
    hidden, weight, labels, mask = problem()
    incoming = None if uniform else torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    loss, grad_hidden, grad_weight = gradients(
        lambda h, w: reference(h, w, labels, mask), hidden * scale, F.pad(weight, (0, 0, 0, padded - PADDED)), incoming
    )
    ranks = pool.run(_sharded, uniform, padded, scale, world_size=world_size)
    for rank_loss, _, _ in ranks:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(grad for _, grad, _ in ranks), grad_hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in ranks]), grad_weight, rtol=1e-11, atol=1e-12)
