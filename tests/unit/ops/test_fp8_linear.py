"""fp8: scales, saturation, what is no number, and the three products against exact arithmetic on rounded numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops.fp8_linear import (
    E4M3,
    FORMATS,
    RECIPES,
    Fp8Linear,
    Quantized,
    encode_scale,
    has_fp8_kernels,
    multiply,
    quantize,
    scaled_mm,
)

E5M2 = torch.float8_e5m2
ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # largest relative error of a number that does not underflow


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(function, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of x and weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = function(x, weight)
    return [output.detach(), *torch.autograd.grad(output, [x, weight], grad)]


def rounded(tensor: Tensor, dtype: torch.dtype, along: int, recipe: str) -> Tensor:
    """What is left of a float64 matrix that a product sums along a dimension of, written down once more."""
    largest = tensor.abs().amax() if recipe == "tensorwise" else tensor.abs().amax(along, keepdim=True)
    scale = (torch.finfo(dtype).max / largest.float()).double()
    if recipe == "rowwise":
        scale = 2.0 ** torch.floor(torch.log2(scale))
    return (tensor.float() * scale.float()).clamp(-57344, 57344).to(dtype).double() / scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales(dtype):
    """Mutations: the largest number instead of the largest magnitude; rounding a row's scale up or to the nearest."""
    tensor = torch.tensor([[1.0, -3.0, 0.0], [0.5, 0.25, -0.125]])
    largest = torch.finfo(dtype).max
    assert encode_scale(tensor, dtype, None).item() == pytest.approx(largest / 3)
    of_rows = {E4M3: [128.0, 512.0], E5M2: [16384.0, 65536.0]}[dtype]  # 448 / 3 = 149, 57344 / 3 = 19115
    assert encode_scale(tensor, dtype, 1).tolist() == [[of_rows[0]], [of_rows[1]]]
    assert encode_scale(tensor, dtype, 0).tolist() == [[2 ** math.floor(math.log2(largest / x)) for x in (1, 3, 0.125)]]
    whole = quantize(tensor, dtype, encode_scale(tensor, dtype, None))
    assert whole.data.double().abs().max() == largest


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-25, 1e-7, 1.0, 1e30])
def test_numbers_of_any_size_keep_their_digits(dtype, size):
    """Gradients divided by the tokens of a large batch are tiny. Mutation: SMALLEST_AMAX = 1e-12."""
    tensor = draw(8, 32, dtype=torch.float32).clamp(min=0.1) * size
    for along in (None, 0, 1):
        found = quantize(tensor, dtype, encode_scale(tensor, dtype, along))
        error = (found.data.double() / found.encode.double() / tensor.double() - 1.0).abs().max()
        assert 1e-3 < error <= ROUNDING[dtype]


def test_too_large_numbers_saturate():
    """Mutation: no clamp, which makes e5m2 infinite."""
    for dtype in (E4M3, E5M2):
        data = quantize(torch.tensor([[1e6, -1e6]]), dtype, torch.tensor(1.0)).data.double()
        assert data.tolist() == [[torch.finfo(dtype).max, -torch.finfo(dtype).max]]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMATS)
def test_products_are_exact_on_rounded_numbers(recipe, form):
    """Against float64 arithmetic on what is left of each operand.

    Mutations: e4m3 for the gradients of hybrid; no scale in the gradient of the weight; scales along the other
    dimension; the weight of one scale used for its gradient.
    """
    x, weight, grad = draw(5, 3, 48), draw(32, 48, seed=1) * 0.02, draw(5, 3, 32, seed=2) * 1e-6
    x[..., 5] *= 30.0
    weight[3] *= 20.0
    grad[2] *= 50.0
    gradient = {"e4m3": E4M3, "hybrid": E5M2}[form]
    tokens, of_tokens = x.flatten(0, 1), grad.flatten(0, 1)
    wanted = [
        rounded(tokens, E4M3, 1, recipe) @ rounded(weight, E4M3, 1, recipe).t(),
        rounded(of_tokens, gradient, 1, recipe) @ rounded(weight, E4M3, 0, recipe),
        rounded(of_tokens, gradient, 0, recipe).t() @ rounded(tokens, E4M3, 0, recipe),
    ]
    found = run(Fp8Linear(FORMATS[form], recipe), x, weight, grad)
    for ours, reference in zip(found, wanted, strict=True):
        error = (ours - reference.view_as(ours)).norm() / reference.norm()
        assert error < 1e-6  # scales are float32 numbers
        assert error < 1e-14 or recipe == "tensorwise"  # and powers of two here


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_close_to_those_of_a_linear_layer(recipe, form, dtype):
    """Within the rounding of the operands, in the dtype of the input, and not nearer than fp8 can be."""
    x, weight, grad = draw(9, 2, 64), draw(48, 64, seed=1) * 0.02, draw(9, 2, 48, seed=2) * 1e-6
    wanted = run(F.linear, x, weight, grad)
    found = run(Fp8Linear(FORMATS[form], recipe), *(one.to(dtype) for one in (x, weight, grad)))
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert 1e-2 < (ours - reference).norm() / reference.norm() < ROUNDING[FORMATS[form]]


def test_the_bias_is_added_after_the_product_and_gets_its_gradient():
    x, weight, bias = draw(4, 2, 16), draw(32, 16, seed=1), draw(32, seed=2).requires_grad_()
    layer = Fp8Linear(E5M2, "rowwise")
    output = layer(x, weight, bias)
    assert torch.equal(output, layer(x, weight) + bias)
    factor = draw(4, 2, 32, seed=3)
    (found,) = torch.autograd.grad(output, [bias], factor)
    torch.testing.assert_close(found, factor.sum((0, 1)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_stay_zeros(recipe):
    """Mutation: no smallest amax, which makes 0 / 0 of a tensor, or row, of zeros."""
    x, weight, grad = draw(4, 2, 16), draw(32, 16, seed=1), draw(4, 2, 32, seed=2)
    for place in range(3):
        operands = [x.clone(), weight.clone(), grad.clone()]
        operands[place].zero_()
        found = run(Fp8Linear(E5M2, recipe), *operands)
        assert all(torch.isfinite(one).all() for one in found)
        assert sum(not one.any() for one in found) == 2  # the two products it takes part in


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)])
def test_no_tokens(recipe, shape):
    """Mutations: the largest of no numbers, or a view whose size is to be found out, which raise."""
    weight = draw(32, 16)
    output, of_x, of_weight = run(Fp8Linear(E5M2, recipe), draw(*shape, 16), weight, draw(*shape, 32))
    assert (output.shape, of_x.shape) == ((*shape, 32), (*shape, 16))
    assert of_weight.shape == weight.shape
    assert not of_weight.any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_seen(recipe, value):
    """A broken step must show. Mutation: nan_to_num before the cast, or infinity saturated."""
    x, weight, grad = draw(4, 2, 16), draw(32, 16, seed=1), draw(4, 2, 32, seed=2)
    for place, concerned in ((0, (0, 2)), (1, (0, 1)), (2, (1, 2))):
        operands = [x.clone(), weight.clone(), grad.clone()]
        operands[place][0, 1] = value
        found = run(Fp8Linear(E5M2, recipe), *operands)
        for number, one in enumerate(found):
            assert torch.isnan(one).any() == (number in concerned), (place, number)
    x[0, 1, 3] = value
    output = run(Fp8Linear(E5M2, recipe), x, weight, grad)[0]
    assert torch.isnan(output[0, 1]).all()
    assert torch.isnan(output[1:]).all() == (recipe == "tensorwise")


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_that_nobody_wants_are_not_computed(recipe):
    x, weight = draw(4, 2, 16), draw(32, 16, seed=1)
    layer, grad = Fp8Linear(E4M3, recipe), draw(4, 2, 32, seed=2)
    both = run(layer, x, weight, grad)
    for number, wanted in enumerate((x, weight)):
        wanted.requires_grad_()
        (alone,) = torch.autograd.grad(layer(x, weight), [wanted], grad)
        assert torch.equal(alone, both[number + 1])
        wanted.requires_grad_(False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiles_as_one_graph(recipe):
    """Mutation: a scale read on the host (`.item()`)."""
    layer = Fp8Linear(E5M2, recipe)
    operands = [one.bfloat16() for one in (draw(4, 2, 16), draw(32, 16, seed=1), draw(4, 2, 32, seed=2))]
    compiled = torch.compile(lambda x, weight: layer(x, weight), fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(compiled, *operands), run(layer, *operands), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("along", [None, 1])
@pytest.mark.parametrize("tokens", [32, 50])
def test_the_call_of_torchs_kernel(along, tokens):
    """On a CPU, where torch has a slow form of it: operands as it wants them, filled up to multiples of 16.

    Mutations: no padding; data that keep the strides of a transposed operand.
    """
    a, b = draw(tokens, 32, dtype=torch.float32).t(), draw(48, tokens, seed=1, dtype=torch.float32)
    gradient, inputs = (quantize(one, dtype, encode_scale(one, dtype, along)) for one, dtype in ((a, E5M2), (b, E4M3)))
    assert gradient.data.is_contiguous()
    found = scaled_mm(gradient, inputs, torch.bfloat16, fast=False)
    wanted = multiply(gradient, inputs, torch.float32, kernels=False)
    torch.testing.assert_close(found.float(), wanted, rtol=2.0**-8, atol=1e-3)


def test_transposed():
    data = draw(16, 32, dtype=torch.float32)
    found = quantize(data, E4M3, encode_scale(data, E4M3, 0)).transposed()
    assert isinstance(found, Quantized)
    assert found.data.is_contiguous()
    assert (found.data.shape, found.encode.shape) == ((32, 16), (32, 1))


def test_without_a_gpu_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, there in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert has_fp8_kernels() == there
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not has_fp8_kernels()
