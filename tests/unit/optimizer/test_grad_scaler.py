"""Loss scales step by step: hysteresis, growth window, floor."""

import torch

from megatron_lite.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler

FINITE, OVERFLOW = torch.tensor(0.0), torch.tensor(1.0)


def history(scaler, steps: str) -> list[float]:
    """The scale after each step; "x" is an overflow, "." a finite step."""
    scales = []
    for step in steps:
        scaler.update(OVERFLOW if step == "x" else FINITE)
        scales.append(scaler.scale.item())
    return scales


def test_constant_scale_never_moves():
    assert history(ConstantGradScaler(8.0), "xx...x") == [8.0] * 6


def test_hysteresis_forgives_the_first_overflows_only():
    """Two overflows lower the scale, in a row or not; from then on each one does, until it has grown again."""
    scaler = DynamicGradScaler(64.0, growth_interval=3, hysteresis=2)
    assert history(scaler, "x.x") == [64.0, 64.0, 32.0]
    assert history(scaler, "x") == [16.0]
    assert history(scaler, "...") == [16.0, 16.0, 32.0]  # grown: the hysteresis is full again
    assert history(scaler, "xx") == [32.0, 16.0]


def test_growth_needs_finite_steps_in_a_row():
    scaler = DynamicGradScaler(2.0, growth_interval=3, hysteresis=10)
    assert history(scaler, "..x...") == [2.0, 2.0, 2.0, 2.0, 2.0, 4.0]


def test_scale_has_a_floor():
    assert history(DynamicGradScaler(4.0, min_scale=3.0, hysteresis=1), "xxx") == [3.0, 3.0, 3.0]


def test_state_dict_is_the_living_state():
    """Loading in place resumes at the same point of the rule."""
    trained, fresh = (DynamicGradScaler(64.0, growth_interval=3, hysteresis=2) for _ in range(2))
    history(trained, "x..")
    for key, value in fresh.state_dict().items():
        value.copy_(trained.state_dict()[key])
    assert history(fresh, ".xx") == history(trained, ".xx") == [128.0, 128.0, 64.0]
