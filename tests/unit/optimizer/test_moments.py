"""Adam's moments in bfloat16: rounded after each step, a few converted at a time, and loaded from any dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.checkpoint import load_checkpoint, save_checkpoint
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, adam, host_moments

SHAPES = {"linear.weight": (64, 48), "linear.bias": (64,), "norm.weight": (48,)}


def config(mean: str = "fp32", square: str = "fp32", **settings: Any) -> OptimizerConfig:
    aware = {"use_precision_aware_optimizer": True, "exp_avg_dtype": mean, "exp_avg_sq_dtype": square}
    return OptimizerConfig(
        **{"lr": 0.05, "clip_grad": 0.0, "weight_decay": 0.0, "adam_beta2": 0.9, **aware, **settings}
    )


class Model(nn.Module):
    """Its parameters carry the names of SHAPES."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in SHAPES.items():
            module, _, kind = name.partition(".")
            if not hasattr(self, module):
                self.add_module(module, nn.Module())
            parameter = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
            self.get_submodule(module).register_parameter(kind, parameter)


def build(settings: OptimizerConfig, dtype: torch.dtype = torch.float32) -> MegatronOptimizer:
    return MegatronOptimizer(settings, dict(Model(dtype).named_parameters()))


def step(optimizer: MegatronOptimizer, seed: int, factor: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, parameter in optimizer.named_parameters.items():
        gradients[name] = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = gradients[name] * factor
    optimizer.step()
    return gradients


@pytest.mark.parametrize(("mean", "square"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_moments_are_rounded_to_nearest_after_each_step(mean: str, square: str) -> None:
    """In float64, so that one rounding is all there is. Mutations: computing with the rounded moments; no rounding."""
    optimizer = build(config(mean, square), torch.float64)
    dtypes = [torch.bfloat16 if kind == "bf16" else torch.float64 for kind in (mean, square)]
    weights = {name: parameter.detach().clone() for name, parameter in optimizer.named_parameters.items()}
    stored = {name: [torch.zeros_like(weight, dtype=dtype) for dtype in dtypes] for name, weight in weights.items()}
    for number in range(1, 5):
        for name, gradient in step(optimizer, number).items():
            first = 0.9 * stored[name][0].double() + 0.1 * gradient
            second = 0.9 * stored[name][1].double() + 0.1 * gradient**2
            weights[name] -= 0.05 * first / (1 - 0.9**number) / ((second / (1 - 0.9**number)).sqrt() + 1e-8)
            stored[name] = [first.to(dtypes[0]), second.to(dtypes[1])]
    for name, state in optimizer.state.items():
        assert [state["exp_avg"].dtype, state["exp_avg_sq"].dtype] == dtypes
        assert torch.equal(state["exp_avg"].bfloat16(), stored[name][0].bfloat16())
        assert torch.equal(state["exp_avg_sq"].bfloat16(), stored[name][1].bfloat16())
        torch.testing.assert_close(optimizer.named_parameters[name].detach(), weights[name], rtol=1e-12, atol=1e-12)


def test_few_moments_are_whole_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the limit, or one parameter, and to the same bits; all in one call where nothing is converted."""
    calls: list[int] = []
    original = adam.adamw

    def counting(params: list[Tensor], *others: Any, **how: Any) -> None:
        calls.append(sum(parameter.numel() for parameter in params))
        original(params, *others, **how)

    monkeypatch.setattr(adam, "adamw", counting)
    whole, parts, plain = build(config("bf16", "bf16")), build(config("bf16", "bf16")), build(config())
    step(whole, 1)
    assert sorted(calls) == [112, 3072]  # the two groups: with weight decay and without
    calls.clear()
    monkeypatch.setattr(host_moments, "AT_A_TIME", 100)
    step(parts, 1)
    assert sorted(calls) == [48, 64, 3072]
    calls.clear()
    step(plain, 1)
    assert sorted(calls) == [112, 3072]
    for name, parameter in whole.named_parameters.items():
        assert torch.equal(parts.named_parameters[name], parameter)
        assert all(torch.equal(parts.state[name][key], value) for key, value in whole.state[name].items())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_skipped_step_changes_no_bit(factor: float) -> None:
    optimizer = build(config("bf16", "bf16", clip_grad=1.0))
    step(optimizer, 1)

    def bits() -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in {**optimizer.named_parameters, **optimizer.state_dict()}.items()}

    before = bits()
    step(optimizer, 2, factor)
    assert all(torch.equal(value, before[name]) for name, value in bits().items())


@pytest.mark.parametrize(("source", "target"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("through", ["checkpoint", "memory"])
def test_moments_load_from_another_dtype(through: str, source: str, target: str, tmp_path: Path) -> None:
    """Stored in the dtype they have, and converted where the run asks for another one."""
    saved_model, loaded_model = Model(), Model()
    saved = MegatronOptimizer(config(source, source), dict(saved_model.named_parameters()))
    loaded = MegatronOptimizer(config(target, target), dict(loaded_model.named_parameters()))
    step(saved, 1)
    if through == "memory":
        loaded.load_state_dict(saved.state_dict())
    else:
        save_checkpoint(tmp_path, 1, saved_model, saved, {}, config_dict={})
        assert load_checkpoint(tmp_path, loaded_model, loaded) is not None
    for name, state in saved.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            dtype = torch.bfloat16 if target == "bf16" else torch.float32
            assert loaded.state[name][key].dtype == dtype
            assert torch.equal(loaded.state[name][key], state[key].to(dtype))


def test_rules() -> None:
    found = OptimizerConfig(exp_avg_dtype="bf16", exp_avg_sq_dtype="fp8").violations()
    assert found == [
        "exp_avg_sq_dtype is 'fp8', but must be one of: fp32, bf16.",
        "exp_avg_dtype is bf16, but without --use-precision-aware-optimizer it must be fp32; add that flag.",
        "exp_avg_sq_dtype is fp8, but without --use-precision-aware-optimizer it must be fp32; add that flag.",
    ]
    with pytest.raises(ConfigError, match="only the moments of adam are stored in other dtypes"):
        OptimizerConfig(optimizer="muon", use_precision_aware_optimizer=True).validate()
