"""grouped_linear: every backend equals a product of each row with its own matrix, forward and backward."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.errors import ConfigError
from megatron_lite.ops import grouped_linear as module
from megatron_lite.ops.grouped_linear import Before, available_backends, choose_backend, grouped_linear, preference

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


@pytest.mark.parametrize("counts", [[17, 0, 40, 3], [0, 90, 5, 0, 33], [1, 1, 1], [200, 3], [3, 200]])
def test_half_precision_on_a_cpu_multiplies_round_numbers_of_rows(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few kernels are needed, and what the further rows are changes nothing.

    Mutations: exact numbers of rows; further rows of the gradient not zero; groups in reverse order; the last window
    not shifted back.
    """
    seen = set()
    mm = torch.mm

    def noted(left: torch.Tensor, right: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        seen.add(min(left.size(0), left.size(1)) if left.stride(0) == 1 else left.size(0))
        return mm(left, right, **more)

    monkeypatch.setattr(torch, "mm", noted)
    x, weight, tokens = inputs(counts, torch.bfloat16)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    output = grouped_linear(x, weight, tokens)
    factor = torch.linspace(-1, 1, 8, dtype=torch.bfloat16)
    (output * factor).sum().backward()
    expected = one_by_one(exact_x, exact_weight, counts)
    (expected * factor.double()).sum().backward()
    for found, wanted in ((output, expected), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=2e-2)
    rows = sum(counts)
    assert all(size % 16 == 0 for size in seen if size not in (8, rows, *(c for c in counts if c + 16 > rows)))


@pytest.mark.parametrize("counts", [[2, 3], [0, 0]])
def test_a_bare_sum_can_be_differentiated(counts: list[int]) -> None:
    """Its gradient has stride 0, which F.grouped_mm refuses. Mutation: multiply with the gradient as it comes."""
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


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("gates_first", [False, True])
def test_what_happens_before_and_after_the_product(backend: str, gates_first: bool) -> None:
    """Mutations: interleave the weight's gradient twice, or not at all; lose the gradient of the factor."""
    x, weight, tokens = inputs([3, 0, 2], torch.float32)
    factor = torch.linspace(0.5, 1.5, 5).requires_grad_()
    output = grouped_linear(
        x, weight, tokens, backend, gates_first, Before(lambda rows, p: rows.sin() * p[:, None], factor)
    )
    expected = one_by_one(x.sin() * factor[:, None], weight, [3, 0, 2])
    if gates_first:
        expected = torch.cat([expected[:, 0::2], expected[:, 1::2]], dim=1)
    torch.testing.assert_close(output, expected)
    by = torch.linspace(-1, 1, 8)
    found = torch.autograd.grad((output * by).sum(), [x, weight, factor])
    for one, other in zip(found, torch.autograd.grad((expected * by).sum(), [x, weight, factor]), strict=True):
        torch.testing.assert_close(one, other)


def test_only_the_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights, and rows that are data. Mutation: compute both always."""
    for frozen, product in [("weight", "grad_weight"), ("x", "grad_x")]:
        x, weight, tokens = inputs([2, 3], torch.float32)
        {"x": x, "weight": weight}[frozen].requires_grad_(False)
        refused = module._loop._replace(**{product: lambda *args: pytest.fail("a gradient nobody wants")})
        monkeypatch.setitem(module._PRODUCTS, "loop", refused)
        grouped_linear(x, weight, tokens, "loop").sum().backward()


def test_which_backend_is_preferred() -> None:
    """Torch where it has a good kernel: CPUs in float32, and bfloat16 from Hopper on.

    Mutations: torch always; packages always.
    """
    packages = ("transformer_engine", "grouped_gemm")
    for dtype, capability in [(torch.bfloat16, (9, 0)), (torch.bfloat16, (10, 0)), (torch.float32, None)]:
        assert preference(dtype, capability) == ("torch", *packages)
    for dtype, capability in [(torch.bfloat16, (8, 0)), (torch.float32, (9, 0)), (torch.float16, (9, 0))]:
        assert preference(dtype, capability) == (*packages, "torch")


def test_packages_are_chosen_for_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an Ampere GPU that has both. Mutation: forget the dtypes, the alignment, or that CPUs have none of them."""
    everything = ("torch", "transformer_engine", "grouped_gemm", "loop")
    monkeypatch.setattr(module, "available_backends", lambda: everything)
    monkeypatch.setattr(module, "_capability", lambda device: (8, 0))
    gpu, cpu, bf16 = torch.device("cuda", 0), torch.device("cpu"), torch.bfloat16
    assert choose_backend(bf16, gpu, 16, 8) == "transformer_engine"
    assert choose_backend(bf16, gpu, 16, 8, "grouped_gemm") == "grouped_gemm"
    assert choose_backend(torch.float32, gpu, 16, 8, "grouped_gemm") == "loop"
    assert choose_backend(torch.float64, gpu, 16, 8) == "loop"
    assert choose_backend(bf16, gpu, 16, 7) == "loop"
    assert choose_backend(bf16, cpu, 16, 8) == "loop"
    assert choose_backend(torch.float32, cpu, 16, 8) == "torch"
    assert choose_backend(bf16, cpu, 16, 8, "transformer_engine") == "loop"
    monkeypatch.setattr(module, "available_backends", lambda: ("torch", "grouped_gemm", "loop"))
    assert choose_backend(bf16, gpu, 16, 8) == "grouped_gemm"
    assert choose_backend(torch.float16, gpu, 16, 8) == "torch"


class FakeGroupedLinear(nn.Module):
    """The interface of transformer_engine.pytorch.GroupedLinear, in a loop."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, bias: bool, **options: Any) -> None:
        super().__init__()
        assert not bias
        for number in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=options["params_dtype"], device=options["device"])
            self.register_parameter(f"weight{number}", nn.Parameter(weight))

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        groups = inp.split(m_splits)
        return torch.cat([F.linear(group, getattr(self, f"weight{number}")) for number, group in enumerate(groups)])


def fake_gmm(
    a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_a: bool = False, trans_b: bool = False
) -> torch.Tensor:
    """The interface of grouped_gemm.backend.gmm; what an expert without rows gets is garbage."""
    assert batch_sizes.device.type == "cpu"
    sizes = batch_sizes.tolist()
    if trans_a:
        both = zip(a.split(sizes), b.split(sizes), strict=True)
        return torch.stack([x.t() @ y if len(x) else torch.full((a.size(1), b.size(1)), torch.nan) for x, y in both])
    return torch.cat([x @ (w.t() if trans_b else w) for x, w in zip(a.split(sizes), b, strict=True)])


@pytest.mark.parametrize("backend", ["transformer_engine", "grouped_gemm"])
@pytest.mark.parametrize("gates_first", [False, True])
def test_wiring_of_packages(backend: str, gates_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the packages, as they need a GPU: output and gradients are those of the loop.

    Mutations: matrices not transposed; weights that are copies without a gradient; unwritten gradients let through.
    """
    fakes = {name: ModuleType(name) for name in ("transformer_engine.pytorch", "grouped_gemm.backend")}
    fakes["transformer_engine.pytorch"].GroupedLinear = FakeGroupedLinear  # type: ignore[attr-defined]
    fakes["grouped_gemm.backend"].gmm = fake_gmm  # type: ignore[attr-defined]
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    module._transformer_engine_module.cache_clear()
    results = []
    for chosen in (backend, "loop"):
        monkeypatch.setattr(module, "choose_backend", lambda *args, chosen=chosen: chosen)
        x, weight, tokens = inputs([3, 0, 2], torch.float32)
        factor = torch.linspace(0.5, 1.5, 5).requires_grad_()
        before = Before(lambda rows, p: rows.sin() * p[:, None], factor)
        output = grouped_linear(x, weight, tokens, "auto", gates_first, before)
        (output * torch.linspace(-1, 1, 8)).sum().backward()
        results.append([output, x.grad, weight.grad, factor.grad])
    module._transformer_engine_module.cache_clear()
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
