"""GroupedMLP in one process: equal to MLPs one by one, recomputed or not, with or without tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.ops import grouped_linear as grouped_linear_module
from megatron_lite.optimizer import OptimizerConfig
from megatron_lite.optimizer.param_groups import has_weight_decay
from megatron_lite.tensor_parallel import initialize_parameters, named_parameter_specs
from megatron_lite.transformer.mlp import MLP
from megatron_lite.transformer.moe.experts import GroupedMLP, grouped_backend
from megatron_lite.transformer.transformer_config import TransformerConfig

HIDDEN, WIDTH, EXPERTS = 8, 12, 3
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "swiglu": {"swiglu": True},
    "geglu": {"geglu": True},
    "gelu": {},
    "relu2": {"squared_relu": True, "add_bias_linear": False},
}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    parallel_state.shutdown()


def config_of(**changes: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS}
    return TransformerConfig(**{**sizes, "moe_ffn_hidden_size": WIDTH, "fp64": True, **changes})


def experts_of(config: TransformerConfig) -> GroupedMLP:
    """Experts whose biases are not zero."""
    experts = GroupedMLP(EXPERTS, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return experts


def one_by_one(experts: GroupedMLP, rows: Tensor, probs: Tensor, counts: list[int]) -> Tensor:
    """Each group through an MLP of the same weights, then times its probabilities."""
    outputs = []
    ends = torch.tensor(counts).cumsum(0).tolist()
    for expert, (count, end) in enumerate(zip(counts, ends, strict=True)):
        mlp = MLP(experts.config, ffn_hidden_size=WIDTH)
        weights = {"linear_fc1.weight": experts.weight1[expert], "linear_fc2.weight": experts.weight2[expert]}
        if experts.bias1 is not None and experts.bias2 is not None:
            weights |= {"linear_fc1.bias": experts.bias1[expert], "linear_fc2.bias": experts.bias2[expert]}
        group = slice(end - count, end)
        output = torch.func.functional_call(mlp, weights, (rows[group].unsqueeze(1),)).squeeze(1)
        outputs.append(output * probs[group, None])
    return torch.cat(outputs)


def rows_of(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(sum(counts), HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    return rows.requires_grad_(), torch.rand(sum(counts), generator=generator).to(dtype).requires_grad_()


def gradients(output: Tensor, experts: GroupedMLP, *inputs: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, HIDDEN, dtype=output.dtype)
    found = torch.autograd.grad((output * weight).sum(), [*inputs, *experts.parameters()])
    return list(found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", [[2, 3, 4], [0, 5, 0], [0, 0, 0], [200, 0, 100]])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_one_mlp_after_the_other(activation: str, counts: list[int], recompute: bool) -> None:
    """Many rows reorder the weight of a gated fc1, few read its output as it is.

    Mutations: probabilities left out, or after the bias; gates and ups in halves; biases of the next expert.
    """
    modules = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]} if recompute else {}
    experts = experts_of(config_of(**ACTIVATIONS[activation], **modules))
    rows, probs = rows_of(counts)
    output = experts.forward_dispatched(rows, probs, torch.tensor(counts))
    expected = one_by_one(experts, rows, probs, counts)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        gradients(output, experts, rows, probs), gradients(expected, experts, rows, probs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
def test_low_precision_and_probabilities_in_float32(dtype: torch.dtype, grouped: bool) -> None:
    """Output and gradients, the biases' summed over many rows: to the rounding of one number.

    Mutations: probabilities cast to bfloat16; gradients of biases summed in it.
    """
    counts = [700, 0, 5]
    settings: dict[str, Any] = {"swiglu": True, "moe_ffn_hidden_size": 16}
    experts = experts_of(config_of(fp64=False, bf16=dtype == torch.bfloat16, moe_grouped_gemm=grouped, **settings))
    exact = experts_of(config_of(**settings))
    with torch.no_grad():  # numbers that bfloat16 has, so that only what is computed is rounded
        for mine, theirs in zip(experts.parameters(), exact.parameters(), strict=True):
            theirs.copy_(mine.bfloat16())
            mine.copy_(mine.bfloat16())
    assert experts.weight1.dtype == torch.float32
    rows, probs = rows_of(counts)
    rows = rows.detach().bfloat16().double().requires_grad_()
    # All almost half way between two numbers of bfloat16: their rounding would not average out.
    probs = torch.full((sum(counts),), 154.48 / 256).double().requires_grad_()
    inputs = [rows.detach().to(dtype).requires_grad_(), probs.detach().float().requires_grad_()]
    output = experts.forward_dispatched(*inputs, torch.tensor(counts))
    assert output.dtype == dtype
    expected = exact.forward_dispatched(rows, probs, torch.tensor(counts))
    found, wanted = gradients(output, experts, *inputs), gradients(expected, exact, rows, probs)
    assert found[1].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip([output, *found], [expected, *wanted], strict=True):
        assert (one.double() - other).norm() < tolerance * other.norm()
    ratio = (output.double() * expected).sum() / expected.square().sum()
    assert abs(ratio - 1) < tolerance / 20


def test_without_the_flag_experts_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the backend "auto" always."""
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **kwargs: pytest.fail("a grouped product"))
    experts = experts_of(config_of(fp64=False, moe_ffn_hidden_size=16))
    rows, probs = rows_of([3, 0, 5], torch.float32)
    experts.forward_dispatched(rows, probs, torch.tensor([3, 0, 5])).sum().backward()


def test_which_products_are_asked_for() -> None:
    """No package if none is wanted, nor where gradients are computed in two passes. Mutation: either forgotten."""
    stages = {"pipeline_model_parallel_size": 2, "num_layers": 4, "pipeline_schedule": "zbv"}
    asked = [
        grouped_backend(config_of(moe_grouped_gemm=True, **changes))
        for changes in ({}, {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}, stages)
    ]
    assert asked == ["auto", "torch", "auto", "torch"]
    assert grouped_backend(config_of(transformer_impl="local")) == "loop"


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("width", [64, 4])
def test_what_is_kept_for_backward(activation: str, grouped: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per row: 3 numbers per unit of width with swiglu, else 2, and the narrower of what a probability can weigh.

    Recomputed 2 or 1. No copy of a weight, no biases of rows. And no product is computed twice. Mutations: keep the
    reordered weight; keep what goes into fc2 all the same; weigh the output always.
    """
    kept: dict[bool, int] = {}
    products: dict[bool, int] = {}
    counts = [20, 0, 31]
    original = grouped_linear_module._PRODUCTS["torch" if grouped else "loop"]
    for recompute in (False, True):
        modules = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]} if recompute else {}
        config = config_of(
            fp64=False, moe_grouped_gemm=grouped, moe_ffn_hidden_size=width, **ACTIVATIONS[activation], **modules
        )
        experts = GroupedMLP(EXPERTS, config)
        sizes: dict[int, int] = {}
        finished = []

        def pack(tensor: Tensor, seen: dict[int, int] = sizes) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        def counted(product: Any, done: list[int] = finished) -> Any:
            return lambda *args: done.append(1) or product(*args)

        monkeypatch.setitem(
            grouped_linear_module._PRODUCTS,
            "torch" if grouped else "loop",
            type(original)(*(counted(one) for one in original)),
        )
        rows, probs = rows_of(counts, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = experts.forward_dispatched(rows, probs, torch.tensor(counts))
        for given in (rows, probs, *experts.parameters()):
            sizes.pop(given.untyped_storage().data_ptr(), None)
        output.sum().backward()
        of_rows = [size for size in sizes.values() if size % 51 == 0]
        kept[recompute] = sum(of_rows) // 51
        biases = EXPERTS * 2 * width
        assert all(size <= biases for size in sizes.values() if size not in of_rows), sizes
        products[recompute] = len(finished)
    first = (2 if activation == "swiglu" else 1) * width
    assert kept == {False: first + width + min(width, HIDDEN), True: first}
    assert products == {False: 6, True: 6}


def test_standalone_experts_dispatch_by_themselves() -> None:
    """[s, b, h] with k choices per token equals the weighted sum over experts. Mutation: combine forgets one choice."""
    experts = experts_of(config_of(swiglu=True))
    hidden = torch.randn(3, 2, HIDDEN, dtype=torch.float64)
    scores = torch.rand(3, 2, 2, dtype=torch.float64)
    indices = torch.tensor([[[0, 1], [1, 2]], [[2, 0], [1, 0]], [[1, 2], [1, 0]]])
    output = experts(hidden, scores, indices)
    assert output.shape == hidden.shape
    one = torch.ones(1, dtype=torch.float64)
    for s in range(3):
        for b in range(2):
            expected = torch.zeros(1, HIDDEN, dtype=torch.float64)
            for score, expert in zip(scores[s, b], indices[s, b].tolist(), strict=True):
                counts = [int(expert == other) for other in range(EXPERTS)]
                expected += score * one_by_one(experts, hidden[s, b][None], one, counts)
            torch.testing.assert_close(output[s, b][None], expected)


def test_standalone_experts_keep_the_shape_of_few_tokens() -> None:
    """One token [h], and none [0, h]. Mutation: flatten(0, -2) instead of reshape."""
    experts = experts_of(config_of(swiglu=True))
    for shape in [(), (0,)]:
        hidden = torch.randn(*shape, HIDDEN, dtype=torch.float64)
        scores = torch.rand(*shape, 2, dtype=torch.float64)
        indices = torch.tensor([0, 2]).expand(*shape, 2)
        assert experts(hidden, scores, indices).shape == hidden.shape


def test_declarations_and_initial_values() -> None:
    """Each expert has values of its own, drawn as one matrix. Mutation: draw the stacked tensor in one go."""
    models, drawn = {}, set()

    def normal(tensor: Tensor) -> Tensor:
        drawn.add(tensor.shape)
        return torch.nn.init.normal_(tensor, std=0.02)

    for count in (2, EXPERTS):
        config = config_of(num_moe_experts=count, init_method=normal, output_layer_init_method=normal)
        models[count] = torch.nn.ModuleDict({"experts": GroupedMLP(count, config)})
        initialize_parameters(models[count], seed=1)
    assert drawn == {(WIDTH, HIDDEN), (HIDDEN, WIDTH)}, "fans in and out are those of one expert"
    few, many = models[2]["experts"].weight1, models[EXPERTS]["experts"].weight1
    assert torch.equal(few, many[:2])
    assert len(many.unique()) == many.numel()
    assert 0.015 < many.std() < 0.025
    specs = named_parameter_specs(models[2])
    assert all(spec.is_expert and spec.stacks_experts and not spec.partial_over_tp for spec in specs.values())
    decays = {
        name: has_weight_decay(name, parameter, specs[name], OptimizerConfig())
        for name, parameter in models[2].named_parameters()
    }
    assert decays == {f"experts.{name}": "weight" in name for name in ("weight1", "weight2", "bias1", "bias2")}


def test_with_groups_of_one_rank_the_experts_are_dtensors_with_the_same_values() -> None:
    torch.manual_seed(3)
    plain = GroupedMLP(EXPERTS, config_of(swiglu=True))
    parallel_state.initialize_model_parallel()
    torch.manual_seed(3)
    parallel = GroupedMLP(EXPERTS, config_of(swiglu=True))
    assert parallel.weight2.device_mesh.mesh_dim_names == ("ep", "etp")  # type: ignore[attr-defined]
    for name, parameter in parallel.named_parameters():
        assert torch.equal(parameter.full_tensor(), plain.get_parameter(name))  # type: ignore[attr-defined]


def test_a_number_of_experts_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_local_experts is 2 on each of 1 .* num_moe_experts is 3"):
        GroupedMLP(2, config_of())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("width", [64, 4])
def test_a_compiled_activation(activation: str, width: int) -> None:
    """Other numbers of rows neither change the results nor compile again. Mutations: without the weighting; static."""
    config = config_of(moe_ffn_hidden_size=width, **ACTIVATIONS[activation])
    plain, compiled = GroupedMLP(EXPERTS, config), GroupedMLP(EXPERTS, config)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_rows(backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ([20, 0, 31], [7, 9, 4], [0, 2, 30]):
            rows, probs = rows_of(counts)
            outputs = [experts.forward_dispatched(rows, probs, torch.tensor(counts)) for experts in (plain, compiled)]
            torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
            wanted, found = (
                gradients(output, experts, rows, probs)
                for output, experts in zip(outputs, (plain, compiled), strict=True)
            )
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
