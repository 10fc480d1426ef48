"""fp8 at every layout: scales are those of the logical tensors, so a layout equals one process to float64's rounding.

The products are emulated in float64. A scale of a part of a tensor rounds other numbers, which shows at 1e-4 or more.
"""

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.ops.fp8_grouped_linear import Fp8GroupedLinear
from megatron_lite.ops.fp8_linear import FORMATS, RECIPES, Fp8Linear, Quantized
from megatron_lite.ops.grouped_linear import grouped_linear
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear, local
from megatron_lite.transformer.fp8 import use_fp8
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.parallel.layouts import Layout, deviations, run_layout
from tests.parallel.test_layout_matrix import GRADIENT_BOUND, WEIGHT_BOUND, expected

COLUMN, ROW = False, True
INPUTS, OUTPUTS, SEQUENCE, BATCH = 64, 32, 16, 3
STEPS = 2
LAYOUTS = [
    Layout(variant="fp8", tp=2, sp=True, swiglu=True, query_groups=4),
    Layout(variant="fp8", cp=2, dp=2, strategy="optim_grads_params", accumulation=2, positions="rope"),
    Layout(variant="fp8", pp=2, schedule="zbv", layers=4, accumulation=2, moe="bias"),
    Layout(variant="fp8", tp=2, accumulation=2, recompute="selective"),
    Layout(variant="fp8_rowwise", tp=2, sp=True, cp=2, accumulation=2, moe="gated", ep=2, etp=1),
    Layout(variant="fp8", dp=4, strategy="optim", moe="bias", ep=2, etp=2, dispatcher="allgather", swiglu=True),
    Layout(variant="fp8", tp=2, accumulation=2, moe="aux", etp=2, recompute="selective"),
]


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: row.name)
def test_layout_equals_one_process(pool, row):
    """Loss, norm, every gradient, and weights after two steps.

    Mutation: leave the micro-batches out of Layout.model, so that the reference takes scales over the whole batch.
    """
    found = deviations(pool.run(run_layout, row, STEPS, world_size=row.world_size)[0], expected(row.model, STEPS))
    assert found["loss"] <= GRADIENT_BOUND, found
    assert found["grad_norm"] <= GRADIENT_BOUND, found
    assert found["gradients"] <= GRADIENT_BOUND, found
    assert found["weights"] <= WEIGHT_BOUND, found


def ramp(size: int, octaves: int) -> Tensor:
    """Powers of two over that many octaves, so that ranks hold numbers of other sizes."""
    return 2.0 ** torch.linspace(-octaves / 2, octaves / 2, size, dtype=torch.float64).round()


class Case(NamedTuple):
    """A layer, and which scale does not know of the other ranks of which group, for a mutation."""

    row_parallel: bool
    recipe: str
    sequence_parallel: bool = True
    broken: tuple[str, str] | None = None


def check_linears(rank: int, world_size: int, cases: list[Case]) -> list[float]:
    """The deviation of each case, at tp 2, and cp over the other ranks."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=world_size // 2)
    return [deviation(*case) for case in cases]


def deviation(row_parallel: bool, recipe: str, sequence_parallel: bool, broken: tuple[str, str] | None = None) -> float:
    """The largest deviation of a layer's output and gradients from one process.

    Where a product sums over a ramp of one operand, the other has the opposite one: all terms count alike, though small
    numbers underflow in fp8. What is left of ramps in the results is divided out.
    """
    cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        fp64=True,
        fp8="hybrid",
        fp8_recipe=recipe,
    )
    octaves = 4 if recipe == "tensorwise" else 24
    inputs, outputs = ramp(INPUTS, octaves), ramp(OUTPUTS, octaves)
    tokens = ramp(SEQUENCE, octaves)[:, None, None]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = draw(SEQUENCE, BATCH, INPUTS) * inputs * tokens
    weight = draw(OUTPUTS, INPUTS) / inputs / outputs[:, None]
    grad = draw(SEQUENCE, BATCH, OUTPUTS) * outputs / tokens

    def of_tokens(tensor: Tensor, features_are_split: bool) -> Tensor:
        part = tensor.chunk(cp, 0)[cp_rank]
        if features_are_split:
            return part.chunk(2, -1)[tp_rank]
        return part.chunk(2, 0)[tp_rank] if sequence_parallel else part

    def own(x: Tensor, weight: Tensor, output: Tensor) -> list[Tensor]:
        """This rank's parts."""
        part = weight.chunk(2, 1 if row_parallel else 0)[tp_rank]
        return [of_tokens(x, row_parallel), part, of_tokens(output, not row_parallel)]

    def compute(function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        """Gradients of x and of the weight, and the output."""
        x = x.clone().requires_grad_()
        output = function(x)
        return [*torch.autograd.grad(output, [x, weight], grad.contiguous()), output.detach()]

    whole = weight.clone().requires_grad_()
    reference = Fp8Linear(FORMATS["hybrid"], recipe)
    wanted = own(*compute(lambda x: reference(x, whole), x, whole, grad))

    layer = (RowParallelLinear if row_parallel else ColumnParallelLinear)(INPUTS, OUTPUTS, config=config, bias=False)
    use_fp8(layer, config, 1, None)
    own_x, own_weight, own_grad = own(x, weight, grad)
    with torch.no_grad():
        local(layer.weight).copy_(own_weight)
    with nullcontext() if broken is None else without_group(*broken):
        found = compute(layer, own_x, layer.weight, own_grad)
    found[1] = local(found[1])
    torch.distributed.all_reduce(found[1], group=parallel_state.get_context_parallel_group())

    size_of_x = (1 / tokens / inputs).expand_as(x)
    sizes = own(size_of_x, outputs[:, None] * inputs, (tokens / outputs).expand_as(grad))
    return max(((a - b) / size).abs().max().item() for a, b, size in zip(found, wanted, sizes, strict=True))


EXPERTS = (5, 0, 7)  # rows of each


def check_experts(rank: int, world_size: int, counts: tuple[int, ...], broken: str | None = None) -> list[float]:
    """The deviations of fc1 and of fc2 of experts whose width two ranks share; `broken` is a group that is forgotten.

    Of one process' sum over a ramp each rank has a part, whose scale alone would round other numbers.
    """
    parallel_state.initialize_model_parallel(expert_tensor_parallel_size=2)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        num_attention_heads=4,
        num_moe_experts=len(counts),
        moe_ffn_hidden_size=OUTPUTS,
        add_bias_linear=False,
        expert_tensor_parallel_size=2,
        fp64=True,
        fp8="hybrid",
    )
    experts = GroupedMLP(len(counts), config)
    use_fp8(experts, config, 1, None)
    found = []
    for name, (outputs, inputs) in zip(("fp8_fc1", "fp8_fc2"), experts.shapes, strict=True):
        fp8 = getattr(experts, name)
        assert fp8 is not None
        if broken is not None:
            fp8 = dataclasses.replace(fp8, **{broken: None})
        found.append(deviation_of_experts(counts, outputs, inputs, fp8, is_fc2=name == "fp8_fc2"))
    return found


def deviation_of_experts(
    counts: tuple[int, ...], outputs: int, inputs: int, fp8: Fp8GroupedLinear, is_fc2: bool
) -> float:
    """The largest deviation of output and gradients of one product of experts from one process."""
    group = parallel_state.get_expert_tensor_parallel_group()
    generator = torch.Generator().manual_seed(0)
    of_inputs, of_outputs = ramp(inputs, 24), ramp(outputs, 24)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, grad = draw(sum(counts), inputs) * of_inputs, draw(sum(counts), outputs) * of_outputs
    weight = draw(len(counts), outputs, inputs) / of_inputs / of_outputs[:, None]

    def own(tensor: Tensor, dim: int, is_split: bool = True) -> Tensor:
        return tensor.chunk(2, dim)[group.rank()] if is_split else tensor

    def compute(x: Tensor, weight: Tensor, grad: Tensor, fp8: Fp8GroupedLinear) -> list[Tensor]:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = grouped_linear(x, weight, torch.tensor(counts), fp8=fp8)
        return [output.detach(), *torch.autograd.grad(output, [x, weight], grad.contiguous())]

    output, of_x, of_weight = compute(x, weight, grad, Fp8GroupedLinear())
    wanted = [own(output, 1, not is_fc2), own(of_x, 1, is_fc2), own(of_weight, 2 if is_fc2 else 1)]
    found = compute(own(x, 1, is_fc2), own(weight, 2 if is_fc2 else 1), own(grad, 1, not is_fc2), fp8)
    torch.distributed.all_reduce(found[0 if is_fc2 else 1], group=group)
    matrix = own((of_outputs[:, None] * of_inputs)[None], 2 if is_fc2 else 1)
    sizes = [own(1 / of_outputs[None], 1, not is_fc2), own(1 / of_inputs[None], 1, is_fc2), matrix]
    assert [one.shape for one in found] == [one.shape for one in wanted]
    return max(((a - b) / size).abs().sum().item() for a, b, size in zip(found, wanted, sizes, strict=True))


def without_group(tensor: str, group: str) -> AbstractContextManager[object]:
    """The scale of the input, the weight or the gradient does not know of the other ranks of a group."""
    name = f"quantize_{tensor}"
    original = getattr(Fp8Linear, name)

    def broken(self: Fp8Linear, tensor: Tensor, dim: int) -> Quantized:
        return original(dataclasses.replace(self, **{group: None}), tensor, dim)

    return mock.patch.object(Fp8Linear, name, broken)


@pytest.mark.parametrize("cp", [1, 2])
def test_linear_layers_equal_one_process(pool, cp):
    """Mutations: those below, or the gradient of the weight by inputs of this rank's part of the sequence alone."""
    cases = [Case(*one) for one in itertools.product([COLUMN, ROW], RECIPES, [False, True])]
    for found in pool.run(check_linears, cases, world_size=2 * cp):
        assert max(found) < 1e-11, dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("counts", [EXPERTS, (0, 0, 0)])
def test_experts_that_share_a_width_equal_one_process(pool, counts):
    """Mutations: those below, or no collective where there are no rows, on one of the ranks."""
    for found in pool.run(check_experts, counts, world_size=2):
        assert max(found) < 1e-9, found


def test_a_scale_of_a_part_of_an_expert_shows(pool):
    """fc1 sums over parts in the gradient of its input, fc2 in its output; each knows of the ranks it needs."""
    for broken, shows in (("column_group", [True, False]), ("row_group", [False, True])):
        for found in pool.run(check_experts, EXPERTS, broken, world_size=2):
            assert [one > 1e-2 for one in found] == shows, (broken, found)


def test_a_scale_of_a_part_of_a_tensor_shows(pool):
    """Each group that a scale is the largest of, left out, makes the test above fail."""
    groups = [
        (COLUMN, "input", "context_group"),
        (COLUMN, "input", "sequence_group"),
        (COLUMN, "weight", "column_group"),
        (COLUMN, "gradient", "context_group"),
        (COLUMN, "gradient", "column_group"),
        (ROW, "input", "context_group"),
        (ROW, "input", "row_group"),
        (ROW, "weight", "row_group"),
        (ROW, "gradient", "context_group"),
    ]
    cases = [
        Case(row_parallel, recipe, broken=(tensor, group))
        for recipe in RECIPES
        for row_parallel, tensor, group in groups
    ]
    of_ranks = pool.run(check_linears, cases, world_size=4)
    for case, found in zip(cases, zip(*of_ranks, strict=True), strict=True):
        assert max(found) > 1e-4, case
