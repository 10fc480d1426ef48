"""fp8 on a GPU: torch's kernels against the emulation, a step without host waits, and one graph for compiled layers.

pytest -m gpu
"""

import itertools

import pytest
import torch
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.ops.fp8_linear import FORMATS, RECIPES, Fp8Linear, has_fp8_kernels
from megatron_lite.training.step import train_step
from tests.gpu.test_training_step import batch, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8_kernels(), reason="needs a CUDA device that multiplies fp8, and there is none"),
]


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
        found = [train_step(model, optimizer, batches, **groups).loss for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found.append(train_step(model, optimizer, batches, **groups).loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [one.item() for one in found]

    plain = losses()
    found = losses(fp8="hybrid", fp8_recipe=recipe)
    assert found != plain
    assert found == pytest.approx(plain, rel=2e-2)
