"""grouped_linear: every backend equals a product of each row with its own matrix, forward and backward."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.errors import ConfigError
from megatron_lite.ops import grouped_linear as module
from megatron_lite.ops.grouped_linear import available_backends, grouped_linear

# Rows of each expert: unequal, empty at either end and in the middle, all with one, none at all.
COUNTS = [[3, 5, 1], [0, 4, 0, 6], [0, 0, 7], [5, 0, 0], [0, 0, 0]]
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def one_by_one(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    return torch.einsum("mi,moi->mo", x, weight[experts])


def inputs(counts: list[int], dtype: torch.dtype, size_in: int = 16, size_out: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(counts))
    x = torch.randn(sum(counts), size_in, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(counts), size_out, size_in, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.tensor(counts)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "loop", "torch"])
def test_output_and_gradients(backend: str, dtype: torch.dtype, counts: list[int]) -> None:
    """Mutations: one count off in the cumulative sum; the weight not transposed; weights detached for empty groups."""
    x, weight, tokens = inputs(counts, dtype)
    reference_x, reference_weight, _ = inputs(counts, torch.float64)
    expected = one_by_one(reference_x, reference_weight, counts)
    output = grouped_linear(x, weight, tokens, backend)
    assert output.dtype == dtype
    factor = torch.linspace(-1, 1, 8, dtype=dtype)
    (output * factor).sum().backward()
    (expected * factor.double()).sum().backward()
    for found, wanted in ((output, expected), (x.grad, reference_x.grad), (weight.grad, reference_weight.grad)):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype] * 5)
    assert all(weight.grad[expert].any() == bool(count) for expert, count in enumerate(counts))


@pytest.mark.parametrize("counts", [[2, 3], [0, 0]])
def test_a_bare_sum_can_be_differentiated(counts: list[int]) -> None:
    """Its gradient has stride 0, which F.grouped_mm refuses. Mutation: return the output as it is."""
    x, weight, tokens = inputs(counts, torch.float32)
    grouped_linear(x, weight, tokens, "auto").sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize(("size_in", "size_out"), [(6, 8), (16, 5), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_are_not_aligned(dtype: torch.dtype, size_in: int, size_out: int) -> None:
    """Mutation: ask F.grouped_mm regardless, which raises."""
    x, weight, tokens = inputs([2, 0, 3], dtype, size_in, size_out)
    output = grouped_linear(x, weight, tokens, "torch")
    output.sum().backward()
    torch.testing.assert_close(output, one_by_one(x, weight, [2, 0, 3]), rtol=2e-2, atol=2e-2)


def test_rows_that_are_not_contiguous() -> None:
    x, weight, tokens = inputs([2, 3], torch.float32)
    wide = torch.cat([x.detach(), x.detach()], dim=1)[:, 3:19].requires_grad_()
    grouped_linear(wide, weight, tokens).sum().backward()
    torch.testing.assert_close(grouped_linear(wide, weight, tokens), one_by_one(wide, weight, [2, 3]))


def test_the_grouped_kernel_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: always the loop. The counts stay on the device."""
    if "torch" not in available_backends():
        pytest.skip("this torch has no F.grouped_mm")
    calls = []
    original = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the host waited for the counts"))
    x, weight, tokens = inputs([2, 3], torch.float32)
    for backend in ("auto", "torch"):
        grouped_linear(x, weight, tokens, backend)
    assert len(calls) == 2
    monkeypatch.undo()
    grouped_linear(x.double(), weight.double(), tokens, "torch")
    grouped_linear(x, weight, tokens, "loop")
    assert len(calls) == 2


def test_backends_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, tokens = inputs([2, 3], torch.float32)
    with pytest.raises(ConfigError, match="'fast', but must be one of auto, torch"):
        grouped_linear(x, weight, tokens, "fast")
    available_backends.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    assert module.available_backends() == ("loop",)
    with pytest.raises(ConfigError, match="grouped_gemm, which is not installed here; write one of loop"):
        grouped_linear(x, weight, tokens, "grouped_gemm")
    torch.testing.assert_close(grouped_linear(x, weight, tokens), one_by_one(x, weight, [2, 3]))
    available_backends.cache_clear()
