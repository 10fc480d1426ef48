"""fp8 in grouped products: exact on rounded numbers, whatever multiplies them, and torch's kernel as it is called."""

import math

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import grouped_linear as grouped_linear_module
from megatron_lite.ops.fp8_grouped_linear import (
    Fp8GroupedLinear,
    has_grouped_fp8_kernels,
    quantize_rows,
    scaled_grouped_mm,
)
from megatron_lite.ops.fp8_linear import E4M3
from megatron_lite.ops.grouped_linear import Before, Products, grouped_linear

COUNTS = [[3, 5, 1], [0, 4, 0, 6], [0, 0, 7], [0, 0, 0]]
INPUTS, OUTPUTS = 48, 32
OCTAVES = 24  # more than e4m3 has, so that a scale along another dimension loses other numbers


def ramp(size: int) -> Tensor:
    return 2.0 ** torch.linspace(-OCTAVES / 2, OCTAVES / 2, size, dtype=torch.float64).round()


def operands(counts: list[int], dtype: torch.dtype = torch.float64, ramps: bool = True) -> list[Tensor]:
    """x [m, in], weight [E, out, in], the output's gradient [m, out].

    With ramps there are numbers of all sizes in each row, and neighbouring rows and experts are of other sizes.
    """
    generator = torch.Generator().manual_seed(sum(counts))
    shapes = (sum(counts), INPUTS), (len(counts), OUTPUTS, INPUTS), (sum(counts), OUTPUTS)
    x, weight, grad = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if ramps:
        of_rows, of_experts = (0.5 ** (torch.arange(one.size(0)) % 4)[:, None] for one in (x, weight))
        x, grad = x * ramp(INPUTS) * of_rows, grad * ramp(OUTPUTS) * of_rows
        weight = weight / ramp(INPUTS) / ramp(OUTPUTS)[:, None] * of_experts[..., None]
    return [x.to(dtype), weight.to(dtype), grad.to(dtype)]


def run(operands: list[Tensor], counts: list[int], backend: str = "auto", **options) -> list[Tensor]:
    """Output and gradients of x and weight."""
    x, weight, grad = operands
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = grouped_linear(x, weight, torch.tensor(counts), backend, **options)
    return [output.detach(), *torch.autograd.grad(output, [x, weight], grad)]


def rounded(tensor: Tensor, along: int) -> Tensor:
    """What is left of float64 numbers that a product sums along a dimension of, written down once more."""
    if tensor.numel() == 0:
        return tensor
    scale = 2.0 ** torch.floor(torch.log2(448.0 / tensor.abs().amax(along, keepdim=True)))
    return (tensor.float() * scale.float()).clamp(-448, 448).to(E4M3).double() / scale


def by_hand(operands: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The three products of each expert, the gradient of the weight of numbers as they came, the others rounded."""
    x, weight, grad = operands
    results = []
    for matrix, rows, of_rows in zip(weight, x.split(counts), grad.split(counts), strict=True):
        output = rounded(rows, 1) @ rounded(matrix, 1).t()
        results.append([output, rounded(of_rows, 1) @ rounded(matrix, 0), of_rows.t() @ rows])
    outputs, grads, grads_of_weights = zip(*results, strict=True)
    return [torch.cat(outputs), torch.cat(grads), torch.stack(grads_of_weights)]


def deviation(found: Tensor, wanted: Tensor, size: Tensor) -> float:
    """The largest, with what is left of the ramps divided out."""
    return ((found - wanted) / size).abs().max().item() if found.numel() else 0.0


@pytest.mark.parametrize("counts", COUNTS)
def test_products_are_exact_on_rounded_numbers(counts: list[int]) -> None:
    """Mutations: a scale along the other dimension of x, of the gradient or of the weight in either product; the
    weight's gradient of rounded numbers; scales that are no powers of two; e5m2 for gradients.
    """
    given = operands(counts)
    sizes = [1 / ramp(OUTPUTS), 1 / ramp(INPUTS), ramp(OUTPUTS)[:, None] * ramp(INPUTS)]
    found, wanted = run(given, counts, fp8=Fp8GroupedLinear()), by_hand(given, counts)
    for one, other, size in zip(found, wanted, sizes, strict=True):
        assert one.shape == other.shape
        assert deviation(one, other, size) < 1e-12
    plain = run(given, counts)
    assert torch.equal(found[2], plain[2])
    if sum(counts):
        assert all(deviation(found[i], plain[i], sizes[i]) > 1e-3 for i in (0, 1))


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("gates_first", [False, True])
def test_with_what_happens_before_and_after_the_product(backend: str, gates_first: bool) -> None:
    """What is made of x before is made again in backward, and rounded after. Mutation: round x before that."""
    counts = [3, 0, 2]
    x, weight, grad = (one.float() for one in operands(counts, ramps=False))
    factor = torch.linspace(0.5, 1.5, 5).requires_grad_()
    x.requires_grad_()
    weight.requires_grad_()
    before = Before(lambda rows, p: rows.sin() * p[:, None], factor)
    output = grouped_linear(x, weight, torch.tensor(counts), backend, gates_first, before, Fp8GroupedLinear())
    found = [output, *torch.autograd.grad(output, [x, factor, weight], grad)]

    order = [*range(0, OUTPUTS, 2), *range(1, OUTPUTS, 2)] if gates_first else list(range(OUTPUTS))
    rows = before.function(x.double(), factor.double())
    with torch.no_grad():
        wanted, of_rows, of_weight = by_hand([rows, weight.double()[:, order], grad.double()], counts)
    found[3] = found[3][:, order]
    for one, other in zip(found, [wanted, *torch.autograd.grad(rows, [x, factor], of_rows), of_weight], strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_multiply_the_same_numbers(backend: str, dtype: torch.dtype, counts: list[int]) -> None:
    """Mutation: numbers divided by their scales before they have been rounded."""
    given = operands(counts, dtype)
    wanted = by_hand([one.double() for one in given], counts)
    sizes = [1 / ramp(OUTPUTS), 1 / ramp(INPUTS), ramp(OUTPUTS)[:, None] * ramp(INPUTS)]
    for one, other, size in zip(run(given, counts, backend, fp8=Fp8GroupedLinear()), wanted, sizes, strict=True):
        assert one.dtype == dtype
        assert deviation(one.double(), other, size) < (1e-4 if dtype == torch.float32 else 0.3)


def test_zeros_and_numbers_that_are_none() -> None:
    """Zeros stay zeros; a row that is broken shows, in its own row and in its expert. Mutation: infinity saturated."""
    counts = [3, 0, 5]
    x, weight, grad = operands(counts)
    assert all(torch.isfinite(one).all() for one in run([x * 0, weight, grad], counts, fp8=Fp8GroupedLinear()))
    assert all(torch.isfinite(one).all() for one in run([x, weight * 0, grad], counts, fp8=Fp8GroupedLinear()))
    for value in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[1, 7] = value
        output = run([broken, weight, grad], counts, fp8=Fp8GroupedLinear())[0]
        assert torch.isnan(output).any(1).tolist() == [False, True] + [False] * 6
        broken = grad.clone()
        broken[4, 9] = value
        _, of_x, of_weight = run([x, weight, broken], counts, fp8=Fp8GroupedLinear())
        assert torch.isnan(of_x).any(1).tolist() == [False] * 4 + [True] + [False] * 3
        assert (~torch.isfinite(of_weight)).any(2).any(1).tolist() == [False, False, True]
        broken = weight.clone()
        broken[2, 0, 0] = value
        output, of_x, _ = run([x, broken, grad], counts, fp8=Fp8GroupedLinear())
        assert torch.isnan(output[3:, 0]).all()
        assert torch.isnan(of_x[3:, 0]).all()
        assert torch.isfinite(output[:3]).all()


def fake_kernel(mat_a, mat_b, scale_a, scale_b, offs, out_dtype, use_fast_accum):
    """torch's kernel in a loop, with the demands that its form for the meta device checks, and those of CUDA's."""
    meta = [one.to("meta") for one in (mat_a, mat_b, scale_a, scale_b, offs)]
    shape = torch._scaled_grouped_mm(*meta, out_dtype=out_dtype, use_fast_accum=use_fast_accum).shape
    assert all(size % 16 == 0 for size in (mat_a.size(1), *mat_b.shape[1:]))
    assert offs.size(0) == mat_b.size(0)
    a, b = mat_a.double() * scale_a.double()[:, None], mat_b.double() * scale_b.double()[:, None, :]
    starts = [0, *offs.tolist()[:-1]]
    output = torch.cat([a[i:j] @ matrix for i, j, matrix in zip(starts, offs.tolist(), b, strict=True)])
    assert output.shape == shape
    return output.to(out_dtype)


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 1, 0], [17, 16, 2]])
def test_the_call_of_torchs_kernel(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in, as it needs a GPU: layouts and scales as it wants them, results those of the emulation.

    Mutations: scales not inverted, or swapped; a weight that keeps the strides of its transpose; ends as int64.
    """
    x, weight, grad = operands(counts, torch.bfloat16)
    tokens, real = torch.tensor(counts), torch._scaled_grouped_mm

    def stand_in(*arguments, **options):
        return (real if arguments[0].is_meta else fake_kernel)(*arguments, **options)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", stand_in)
    wanted = run([x, weight, grad], counts, "loop", fp8=Fp8GroupedLinear())
    for given, matrices, other, size in (
        (x, weight, wanted[0], ramp(OUTPUTS)),
        (grad, weight.transpose(1, 2), wanted[1], ramp(INPUTS)),
    ):
        quantized = quantize_rows(given, None), quantize_rows(matrices, None)
        found = scaled_grouped_mm(*quantized, tokens, fast=True)
        torch.testing.assert_close(found.double() * size, other.double() * size, rtol=2.0**-7, atol=0.1)


def test_what_the_kernel_multiplies_and_what_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: two of three products, forward with fast sums, and nothing is read on the host.

    Mutations: the kernel for rows or sizes that it does not take, for other dtypes, or where it is not asked for.
    """
    real, calls = torch._scaled_grouped_mm, []

    def counted(*arguments, **options):
        calls.append(options["use_fast_accum"])
        return real(*arguments, **options)

    def backend(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        calls.append("backend")
        return x.new_empty(x.size(0), weight.size(1))

    monkeypatch.setattr(torch, "_scaled_grouped_mm", counted)
    backends = Products(backend, backend, backend)

    def step(
        rows: int = 9, size: int = 48, dtype: torch.dtype = torch.bfloat16, kernels: bool = True, device: str = "meta"
    ) -> list[bool | str]:
        calls.clear()
        x, grad = (torch.zeros(rows, one, device=device, dtype=dtype) for one in (32, size))
        weight, counts = torch.zeros(2, size, 32, device=device, dtype=dtype), torch.tensor([rows, 0], device=device)
        products = Fp8GroupedLinear(kernels)(backends)
        assert products.grad_weight is backend
        assert products.forward(x, weight, counts).shape == grad.shape
        assert products.grad_x(grad, weight, counts).shape == x.shape
        return list(calls)

    assert step() == [True, False]
    assert step(rows=1) == [True, False]
    left = ["backend", "backend"]
    assert step(rows=0) == left
    assert step(size=40) == left
    assert step(dtype=torch.float32) == left
    assert step(kernels=False) == left
    assert step(device="cpu") == left


def test_a_package_without_products_of_its_own_leaves_them_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's layer is one with its gradients. Mutation: ask it regardless, without fp8."""
    given, counts = operands([3, 0, 5]), [3, 0, 5]
    wanted = run(given, counts, fp8=Fp8GroupedLinear())
    monkeypatch.setattr(
        grouped_linear_module, "choose_backend", lambda *asked: "loop" if asked[4] == "torch" else "transformer_engine"
    )
    for one, other in zip(run(given, counts, fp8=Fp8GroupedLinear()), wanted, strict=True):
        assert torch.equal(one, other)


def test_compiled_it_is_the_same_for_any_number_of_rows() -> None:
    """Mutations: a number read on the host, as `int(amax)`, breaks the graph; static shapes compile again."""
    plain, compiled = Fp8GroupedLinear(), Fp8GroupedLinear().compiled("aot_eager")
    torch._dynamo.reset()
    for counts in ([20, 0, 31], [7, 9, 4]):
        given = operands(counts, torch.bfloat16)
        for one, other in zip(run(given, counts, fp8=compiled), run(given, counts, fp8=plain), strict=True):
            assert torch.equal(one, other)
    with torch._dynamo.config.patch(error_on_recompile=True):
        given = operands([0, 2, 30], torch.bfloat16)
        for one, other in zip(run(given, [0, 2, 30], fp8=compiled), run(given, [0, 2, 30], fp8=plain), strict=True):
            assert torch.equal(one, other)


def test_hopper_alone_has_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, there in (((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert has_grouped_fp8_kernels() == there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_grouped_fp8_kernels()
