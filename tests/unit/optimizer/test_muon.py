"""Muon in one process, float64, against singular value decompositions and the update written out by hand."""

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig
from megatron_lite.optimizer.newton_schulz import COEFFICIENTS, newton_schulz, scale_factor
from megatron_lite.optimizer.param_groups import get_param_groups
from megatron_lite.tensor_parallel.parameters import ParameterSpec
from megatron_lite.transformer.qkv_projection import build_qkv_projection
from megatron_lite.transformer.transformer_config import TransformerConfig

QUINTIC = [  # written down once more: the numbers of the modded-nanogpt runs
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
BLOCKS = (4, 2, 2)
SHAPES = {
    "embedding.word_embeddings.weight": (10, 6),
    "decoder.layers.0.self_attention.linear_qkv.weight": (24, 6),
    "decoder.layers.0.mlp.linear_fc1.weight": (16, 6),
    "decoder.layers.0.mlp.linear_fc1.bias": (16,),
    "decoder.layers.1.mlp.experts.weight2": (3, 6, 4),
    "decoder.layers.1.mlp.experts.bias1": (3, 6),
}
MATRICES = [name for name in SHAPES if name.endswith(("qkv.weight", "fc1.weight", "weight2"))]
SPECS = {name: ParameterSpec(nn.init.zeros_, stacks_experts="experts" in name) for name in SHAPES} | {
    MATRICES[0]: ParameterSpec(nn.init.zeros_, row_blocks=BLOCKS),
    "decoder.layers.1.mlp.experts.bias1": ParameterSpec(nn.init.zeros_, apply_weight_decay=False, stacks_experts=True),
}


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def polynomial(matrix: Tensor, steps: int) -> Tensor:
    """What the iteration does to a matrix, seen in its singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for step in range(steps):
        a, b, c = QUINTIC[step % 5]
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape, steps):
    matrix = random(shape, 1)
    expected = polynomial(matrix, steps)
    torch.testing.assert_close(newton_schulz(matrix, steps), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "near"), [("quintic", 0.15), ("simple", 0.35), ("polar_express", 0.05)])
def test_every_set_of_polynomials_comes_near_the_polar_factor(kind, near):
    """Five steps (eight of Polar Express) of singular values from 1 to 1/20; a wrong digit ends elsewhere."""
    left, _, right = torch.linalg.svd(random((24, 16), 3), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(1.0, 0.05, 16, dtype=torch.float64)) @ right
    steps = 8 if kind == "polar_express" else 5
    found = left.mT @ newton_schulz(matrix, steps, kind) @ right.mT
    assert (found - torch.eye(16, dtype=torch.float64)).abs().max() < near
    assert set(COEFFICIENTS) >= {kind}


def test_stacked_matrices_are_matrices_of_their_own():
    stack = random((3, 5, 4), 2)
    stack[1] = 0.0
    found = newton_schulz(stack, 5)
    for one, matrix in zip(found, stack, strict=True):
        torch.testing.assert_close(one, newton_schulz(matrix, 5), rtol=1e-14, atol=1e-14)
    assert newton_schulz(stack[:0], 5).shape == (0, 5, 4)


def test_precision_of_float32():
    """medium rounds to bfloat16 on the way, high does not on a CPU; both give float32, and leave torch as it was."""
    matrix = random((32, 48), 5, torch.float32)
    exact = newton_schulz(matrix.double(), 5).float()
    before = torch.get_float32_matmul_precision()
    medium, high = newton_schulz(matrix, 5), newton_schulz(matrix, 5, precision="high")
    assert medium.dtype == high.dtype == torch.float32
    assert (high - exact).abs().max() < 1e-5
    assert 1e-4 < (medium - exact).abs().max() < 0.05
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("mode", "wide", "tall"),
    [("spectral", 4.0, 4.0), ("unit_rms_norm", 0.5, 2.0), ("shape_scaling", 1.0, 2.0)],
)
def test_scale_factors(mode, wide, tall):
    assert scale_factor(4, 16, mode) == wide
    assert scale_factor(16, 4, mode) == tall


def build(config: OptimizerConfig, dtype: torch.dtype = torch.float64) -> MegatronOptimizer:
    named = {name: nn.Parameter(random(shape, 7, dtype)) for name, shape in SHAPES.items()}
    return MegatronOptimizer(config, named, SPECS)


def set_gradients(optimizer: MegatronOptimizer, seed: int, factor: float = 1.0) -> dict[str, Tensor]:
    raw = {}
    for number, (name, parameter) in enumerate(optimizer.named_parameters.items()):
        raw[name] = random(tuple(parameter.shape), 100 * seed + number, parameter.dtype)
        parameter.grad = raw[name] * factor
    return raw


def direction(name: str, update: Tensor, config: OptimizerConfig) -> Tensor:
    """The scaled step of a parameter, matrix by matrix."""

    def of_matrix(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        factors = {
            "spectral": max(rows, columns),
            "unit_rms_norm": rows / columns,
            "shape_scaling": max(1, rows / columns),
        }
        scale = config.muon_extra_scale_factor * factors[config.muon_scale_mode] ** 0.5
        return scale * polynomial(matrix, config.muon_num_ns_steps)

    if update.dim() == 3:
        return torch.stack([of_matrix(matrix) for matrix in update])
    if name == MATRICES[0] and config.muon_split_qkv:
        kinds = [[row for row in range(24) if row % 8 in kind] for kind in (range(4), range(4, 6), range(6, 8))]
        result = torch.empty_like(update)
        for rows in kinds:
            result[rows] = of_matrix(update[rows])
        return result
    return of_matrix(update)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"muon_nesterov": True, "muon_scale_mode": "unit_rms_norm", "loss_scale": 1024.0},
        {"muon_split_qkv": False, "muon_scale_mode": "shape_scaling", "muon_extra_scale_factor": 0.2},
    ],
)
def test_steps_equal_the_formula(settings):
    """Four clipped steps: matrices by Muon, each expert's and query, key and value apart; the rest by AdamW."""
    config = OptimizerConfig(optimizer="muon", lr=0.05, weight_decay=0.1, clip_grad=1.0, **settings)
    optimizer = build(config)
    weights = {name: parameter.detach().clone() for name, parameter in optimizer.named_parameters.items()}
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 5):
        raw = set_gradients(optimizer, step, config.loss_scale or 1.0)
        norm = torch.cat([gradient.flatten() for gradient in raw.values()]).norm()
        assert norm > 1.0
        optimizer.step()
        for name, gradient in raw.items():
            gradient = gradient / (norm + 1e-6)
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            if name in MATRICES:
                update = 0.1 * gradient + 0.9 * mean[name] if config.muon_nesterov else mean[name]
                change = direction(name, update, config)
            else:
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
                change = mean[name] / (1 - 0.9**step) / ((square[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            decays = name in MATRICES or "word_embeddings" in name
            weights[name] = weights[name] * (1 - 0.05 * 0.1 * decays) - 0.05 * change
    for name, parameter in optimizer.named_parameters.items():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-11, atol=1e-11, msg=name)


def everything(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in {**optimizer.named_parameters, **optimizer.state_dict()}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(dtype, bad):
    """At a later step too. Mutation: the momentum of a skipped step is kept."""
    optimizer = build(OptimizerConfig(optimizer="muon", lr=0.05), dtype)
    for seed in range(2):
        before = everything(optimizer)
        set_gradients(optimizer, seed)
        optimizer.named_parameters[MATRICES[1]].grad[0, 0] = bad
        assert optimizer.step().found_inf == 1.0
        assert all(torch.equal(value, before[name]) for name, value in everything(optimizer).items())
        set_gradients(optimizer, seed)
        assert optimizer.step().found_inf == 0.0
        assert all(not torch.equal(value, before[name]) for name, value in everything(optimizer).items())


def test_the_state_is_one_momentum_for_each_matrix():
    names = build(OptimizerConfig(optimizer="muon", lr=0.05)).state_dict().keys()
    for name in SHAPES:
        keys = ("momentum_buffer",) if name in MATRICES else ("step", "exp_avg", "exp_avg_sq")
        assert {n for n in names if n.startswith(f"optimizer.state.{name}.")} == {
            f"optimizer.state.{name}.{key}" for key in keys
        }


def test_what_muon_updates():
    """As Megatron-LM: not word embeddings, output layer and vectors; but routers, and learned positions."""
    shapes = SHAPES | {
        "output_layer.weight": (10, 6),
        "embedding.position_embeddings.weight": (8, 6),
        "decoder.layers.1.mlp.router.weight": (3, 6),
        "decoder.layers.1.mlp.shared_experts.gate_weight": (1, 6),
        "mtp.layers.0.eh_proj.weight": (6, 12),
        "decoder.final_layernorm.weight": (6,),
    }
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    groups = get_param_groups(parameters, SPECS, OptimizerConfig(optimizer="muon", lr=1.0, decoupled_lr=0.5))
    by_muon = {name for group in groups if group["optimizer"] == "muon" for name in group["names"]}
    assert by_muon == set(MATRICES) | {
        "embedding.position_embeddings.weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.1.mlp.shared_experts.gate_weight",
        "mtp.layers.0.eh_proj.weight",
    }
    assert all(group["optimizer"] == "adam" for group in groups if not group["default_config"])


@pytest.mark.parametrize(("gate", "blocks"), [(False, (12, 6, 6)), (True, (12, 12, 6, 6))])
def test_the_projection_says_where_queries_keys_and_values_are(gate, blocks):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=6,
        attention_output_gate=gate,
    )
    projection = build_qkv_projection(config, None)
    assert projection.parameter_specs["weight"].row_blocks == blocks
    assert projection.weight.size(0) == 2 * sum(blocks)
    assert projection.parameter_specs["bias"].row_blocks is None


def test_rules():
    config = OptimizerConfig(optimizer="muon", muon_tp_mode="blockwise", muon_num_ns_steps=0, muon_momentum=1.0)
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert "muon_tp_mode is blockwise" in str(caught.value)
    assert "depends on the layout; write duplicated or distributed" in str(caught.value)
    assert "muon_num_ns_steps is 0" in str(caught.value)
    assert "muon_momentum is 1.0" in str(caught.value)
    OptimizerConfig(optimizer="muon", muon_tp_mode="distributed").validate()
