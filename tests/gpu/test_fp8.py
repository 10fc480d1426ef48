"""fp8 on a GPU: torch's kernels against the emulation, a step without host waits, and one graph for compiled layers.

pytest -m gpu
"""

import itertools

import pytest
import torch
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.ops.fp8_grouped_linear import Fp8GroupedLinear, has_grouped_fp8_kernels
from megatron_lite.ops.fp8_linear import FORMATS, RECIPES, Fp8Linear, has_fp8_kernels
from megatron_lite.ops.grouped_linear import grouped_linear
from megatron_lite.training.step import train_step
from tests.gpu.test_experts import model_with_experts
from tests.gpu.test_training_step import batch, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8_kernels(), reason="needs a CUDA device that multiplies fp8, and there is none"),
]


needs_grouped_kernels = pytest.mark.skipif(
    not has_grouped_fp8_kernels(), reason="needs a GPU with torch's grouped product in fp8 (Hopper), and there is none"
)


@pytest.fixture
def groups():
    """A world of one process on NCCL."""
    parallel_state.initialize_model_parallel()
    yield {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    parallel_state.shutdown()


def run(layer, operands: list[Tensor]) -> list[Tensor]:
    """Output and gradients of x and weight."""
    x, weight, grad = operands
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = layer(x, weight)
    return [output.detach(), *torch.autograd.grad(output, [x, weight], grad)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [64, 50])
@pytest.mark.parametrize(("form", "recipe"), itertools.product(FORMATS, RECIPES))
def test_kernels_equal_the_emulation(form, recipe, tokens, compiled):
    """To bfloat16's rounding, and what forward's faster sums lose; any number of tokens.

    Mutations: an encoding scale in the place of a decoding one; operands without padding where there are 50 x 3 tokens.
    """
    torch.manual_seed(0)
    x, weight, grad = torch.randn(tokens, 3, 256), torch.randn(512, 256) * 0.02, torch.randn(tokens, 3, 512) * 1e-6
    x[..., 7] *= 20.0
    operands = [one.cuda().bfloat16() for one in (x, weight, grad)]
    emulated = Fp8Linear(FORMATS[form], recipe)
    layer = Fp8Linear(FORMATS[form], recipe, kernels=True)
    function = torch.compile(lambda x, weight: layer(x, weight), fullgraph=True) if compiled else layer
    for found, wanted in zip(run(function, operands), run(emulated, operands), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - wanted).float().norm() / wanted.float().norm() < 1e-2


@needs_grouped_kernels
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("counts", [[300, 0, 20, 707], [16, 32, 0, 128], [1, 0, 0, 0], [0, 3, 1, 5], [0, 0, 0, 0]])
def test_the_grouped_kernel_equals_the_emulation(counts, compiled):
    """To bfloat16's rounding, and what forward's faster sums lose; any number of rows of an expert, and of experts.

    Numbers of a row, and of a matrix's, grow over eight octaves, so that each scale counts. Mutations: an encoding
    scale in the place of a decoding one; scales of one expert for another (`matrices.encode[:1].expand_as(...)`).
    """
    torch.manual_seed(0)
    rows, size_in, size_out = sum(counts), 256, 512
    x, grad = torch.randn(rows, size_in), torch.randn(rows, size_out) * 1e-6
    weight = torch.randn(len(counts), size_out, size_in) * 0.02
    x[:, 7] *= 20.0
    weight *= 2.0 ** torch.linspace(-4, 4, len(counts))[:, None, None]
    weight[:, 3] *= 20.0
    x *= 2.0 ** torch.linspace(-4, 4, rows)[:, None]
    operands = [one.cuda().bfloat16() for one in (x, weight, grad)]
    tokens = torch.tensor(counts, device="cuda")
    fp8 = Fp8GroupedLinear(kernels=True)
    if compiled:
        torch.compiler.reset()  # what other cases compiled counts towards torch's limit
        fp8 = fp8.compiled()
    found = run(lambda x, weight: grouped_linear(x, weight, tokens, fp8=fp8), operands)
    wanted = run(lambda x, weight: grouped_linear(x, weight, tokens, "loop", fp8=Fp8GroupedLinear()), operands)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert one.shape == other.shape
        # Every row by itself: they are of different sizes.
        of_rows = [each.float().flatten(0, -2) for each in (one, other)]
        errors = (of_rows[0] - of_rows[1]).norm(dim=-1)
        assert (errors <= 1e-2 * of_rows[1].norm(dim=-1) + 1e-12).all()


@needs_grouped_kernels
def test_the_grouped_kernel_multiplies_two_of_three_products_and_waits_for_nothing(monkeypatch):
    """Mutations: the counts read on the host, which raises; the emulation on a GPU that has the kernel."""
    real, calls = torch._scaled_grouped_mm, []
    monkeypatch.setattr(torch, "_scaled_grouped_mm", lambda *one, **more: calls.append(1) or real(*one, **more))
    operands = [torch.randn(size, device="cuda").bfloat16() for size in ((37, 64), (3, 32, 64), (37, 32))]
    tokens, fp8 = torch.tensor([20, 0, 17], device="cuda"), Fp8GroupedLinear(kernels=True)

    def step() -> None:
        run(lambda x, weight: grouped_linear(x, weight, tokens, fp8=fp8), operands)

    step()  # fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 4


def losses_of(model, optimizer, batches, groups) -> list[float]:
    """Of four steps, the last of which may not wait for the device."""
    found = [train_step(model, optimizer, batches, **groups).loss for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.append(train_step(model, optimizer, batches, **groups).loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [one.item() for one in found]


@needs_grouped_kernels
@pytest.mark.parametrize("modules", [None, ["moe_act"]])
def test_a_step_with_experts_without_host_waits_near_bf16(groups, modules):
    """Mutation: a scale, or the counts, read with `.item()` raises."""
    device = torch.device("cuda", torch.cuda.current_device())
    batches = [batch(1, device), batch(2, device)]
    recompute = {} if modules is None else {"recompute_granularity": "selective", "recompute_modules": modules}

    def losses(**settings) -> list[float]:
        model, optimizer = model_with_experts(device, bf16=True, **recompute, **settings)
        return losses_of(model, optimizer, batches, groups)

    plain, found = losses(), losses(fp8="hybrid")
    assert found != plain
    assert found == pytest.approx(plain, rel=2e-2)


def test_numbers_that_are_none_are_seen():
    for recipe, place in itertools.product(RECIPES, range(3)):
        operands = [torch.randn(size, device="cuda").bfloat16() for size in ((32, 2, 64), (128, 64), (32, 2, 128))]
        operands[place].view(-1)[5] = torch.inf
        found = run(Fp8Linear(FORMATS["hybrid"], recipe, kernels=True), operands)
        assert sum(torch.isnan(one).any().item() for one in found) == 2


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compile_layers", [False, True])
def test_a_step_without_host_waits_near_bf16(groups, recipe, compile_layers):
    """Mutation: a scale read with `.item()` raises."""
    device = torch.device("cuda", torch.cuda.current_device())
    batches = [batch(1, device), batch(2, device)]

    def losses(**settings) -> list[float]:
        model, optimizer = small_model(device, compile_layers, bf16=True, **settings)
        return losses_of(model, optimizer, batches, groups)

    plain = losses()
    found = losses(fp8="hybrid", fp8_recipe=recipe)
    assert found != plain
    assert found == pytest.approx(plain, rel=2e-2)
