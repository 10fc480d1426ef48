"""One process: the fused step against the textbook in float64, skipping, and state that loads in place."""

import pytest
import torch
from torch import nn

from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig

SHAPES = {"linear.weight": (5, 3), "linear.bias": (5,), "norm.weight": (3,)}


def build(config: OptimizerConfig, dtype=torch.float64) -> MegatronOptimizer:
    generator = torch.Generator().manual_seed(7)
    named = {n: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for n, shape in SHAPES.items()}
    return MegatronOptimizer(config, named)


def set_gradients(optimizer: MegatronOptimizer, seed: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    raw = {}
    for name, parameter in optimizer.named_parameters.items():
        raw[name] = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = raw[name] * factor
    return raw


def clipped(raw: dict[str, torch.Tensor], limit: float) -> dict[str, torch.Tensor]:
    norm = torch.cat([gradient.flatten() for gradient in raw.values()]).norm()
    return {name: gradient * min(1.0, limit / (norm + 1e-6)) for name, gradient in raw.items()}


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_adam_equals_the_textbook(loss_scale):
    """Five clipped steps of AdamW written out by hand agree to 1e-13; only the matrix decays."""
    config = OptimizerConfig(lr=0.05, weight_decay=0.1, clip_grad=1.0, adam_beta2=0.95, loss_scale=loss_scale)
    optimizer = build(config)
    weights = {name: parameter.detach().clone() for name, parameter in optimizer.named_parameters.items()}
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 6):
        raw = set_gradients(optimizer, step, loss_scale or 1.0)
        result = optimizer.step()
        assert result.grad_norm.item() == pytest.approx(
            torch.cat([gradient.flatten() for gradient in raw.values()]).norm().item(), rel=1e-14
        )
        for name, gradient in clipped(raw, 1.0).items():
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            update = mean[name] / (1 - 0.9**step) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.1 if name == "linear.weight" else 0.0
            weights[name] = weights[name] * (1 - 0.05 * decay) - 0.05 * update
    for name, parameter in optimizer.named_parameters.items():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_the_textbook(momentum):
    optimizer = build(OptimizerConfig(optimizer="sgd", lr=0.05, weight_decay=0.1, clip_grad=0.5, sgd_momentum=momentum))
    weights = {name: parameter.detach().clone() for name, parameter in optimizer.named_parameters.items()}
    buffer = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 5):
        raw = set_gradients(optimizer, step)
        optimizer.step()
        for name, gradient in clipped(raw, 0.5).items():
            decay = 0.1 if name == "linear.weight" else 0.0
            buffer[name] = momentum * buffer[name] + gradient + decay * weights[name]
            weights[name] = weights[name] - 0.05 * buffer[name]
    for name, parameter in optimizer.named_parameters.items():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-13, atol=1e-13)


def snapshot(optimizer: MegatronOptimizer) -> dict[str, torch.Tensor]:
    weights = {name: parameter.detach().clone() for name, parameter in optimizer.named_parameters.items()}
    return {
        **weights,
        **{name: value.clone() for name, value in optimizer.state_dict().items() if "scaler" not in name},
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_a_non_finite_gradient_changes_nothing(name, dtype, first):
    """Weights, moments and step counters stay, at the very first step too; the next finite step goes on as if never."""
    config = OptimizerConfig(optimizer=name, lr=0.05)
    optimizer, undisturbed = build(config, dtype), build(config, dtype)
    for each in (optimizer, undisturbed):
        if not first:
            set_gradients(each, 1)
            assert each.step().found_inf == 0.0
    before = snapshot(optimizer)
    for bad in (float("nan"), float("inf")):
        set_gradients(optimizer, 2)
        optimizer.named_parameters["linear.bias"].grad[3] = bad
        assert optimizer.step().found_inf == 1.0
        assert_same(snapshot(optimizer), before)
    for each in (optimizer, undisturbed):
        set_gradients(each, 3)
        each.step()
    assert_same(snapshot(optimizer), snapshot(undisturbed))


def test_dynamic_scale_follows_the_steps():
    optimizer = build(OptimizerConfig(lr=0.1, fp16=True, initial_loss_scale=256.0, hysteresis=1, loss_scale_window=2))
    assert optimizer.scale_loss(torch.tensor(3.0)) == 768.0
    set_gradients(optimizer, 1, float("inf"))
    optimizer.step()
    assert optimizer.get_loss_scale() == 128.0
    for _ in range(2):
        set_gradients(optimizer, 1, 128.0)
        optimizer.step()
    assert optimizer.get_loss_scale() == 256.0


def test_clipping_off_leaves_gradients_alone():
    optimizer = build(OptimizerConfig(optimizer="sgd", lr=1.0, weight_decay=0.0, clip_grad=0.0, sgd_momentum=0.0))
    before = snapshot(optimizer)
    raw = set_gradients(optimizer, 1, 100.0)
    optimizer.step()
    for name, parameter in optimizer.named_parameters.items():
        torch.testing.assert_close(parameter.detach(), before[name] - 100.0 * raw[name], rtol=1e-15, atol=1e-13)


def test_a_parameter_without_gradient_is_left_out():
    optimizer = build(OptimizerConfig(lr=0.1, log_num_zeros_in_grad=True))
    before = snapshot(optimizer)
    set_gradients(optimizer, 1)
    optimizer.named_parameters["linear.weight"].grad = None
    optimizer.named_parameters["linear.bias"].grad[:2] = 0.0
    assert optimizer.step().num_zeros == 2
    after = snapshot(optimizer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "linear.weight" not in name}


def test_zero_grad():
    optimizer = build(OptimizerConfig(lr=0.1))
    set_gradients(optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad.count_nonzero() == 0 for parameter in optimizer.named_parameters.values())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in optimizer.named_parameters.values())


def test_state_loads_in_place_and_by_copy():
    config = OptimizerConfig(lr=0.1, fp16=True, initial_loss_scale=4.0)
    trained, fresh = build(config), build(config)
    set_gradients(trained, 1, 4.0)
    trained.step()
    living = fresh.state_dict()
    fresh.load_state_dict(trained.state_dict())
    for key, value in trained.state_dict().items():
        assert torch.equal(living[key], value), key
    with pytest.raises(ConfigError, match="1 entries are missing"):
        fresh.load_state_dict({k: v for k, v in living.items() if k != "optimizer.state.linear.bias.exp_avg"})


def test_sgd_without_momentum_has_no_state():
    assert build(OptimizerConfig(optimizer="sgd", lr=0.1, sgd_momentum=0.0)).state_dict() == {}
