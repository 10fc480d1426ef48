"""Learning rate and weight decay curves against numbers worked out by hand, and what a resume takes from where."""

import math

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.num_microbatches_calculator import build_num_microbatches_calculator
from megatron_lite.optimizer.config import OptimizerConfig, SchedulerConfig
from megatron_lite.optimizer.param_scheduler import OptimizerParamScheduler, get_optimizer_param_scheduler


class Groups:
    """Stands for an optimizer: two ordinary groups, one of which does not decay, and a decoupled one."""

    def __init__(self):
        self.param_groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}, {"max_lr": 4.0, "min_lr": 2.0}]


def scheduler(**changes) -> OptimizerParamScheduler:
    arguments = dict(
        init_lr=0.0,
        max_lr=1.0,
        min_lr=0.1,
        lr_warmup_steps=100,
        lr_decay_steps=1100,
        lr_decay_style="linear",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=1100,
        wd_incr_style="constant",
    )
    return OptimizerParamScheduler(Groups(), **{**arguments, **changes})


@pytest.mark.parametrize(
    ("style", "samples", "expected"),
    [
        ("linear", 0, 0.0),
        ("linear", 25, 0.25),
        ("linear", 100, 1.0),
        ("linear", 600, 0.55),
        ("linear", 1100, 0.1),
        ("linear", 1101, 0.1),
        ("constant", 50, 0.5),
        ("constant", 10**9, 1.0),
        ("cosine", 350, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),
        ("cosine", 600, 0.55),
        ("cosine", 1100, 0.1),
        ("inverse-square-root", 100, 1.0),
        ("inverse-square-root", 400, 0.5),
        ("inverse-square-root", 900, 1 / 3),
        ("inverse-square-root", 1101, 0.1),
    ],
)
def test_learning_rate_by_hand(style, samples, expected):
    assert scheduler(lr_decay_style=style).get_lr(samples) == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_inverse_square_root_stays_above_the_minimum_and_needs_no_warmup():
    plain = scheduler(lr_decay_style="inverse-square-root", lr_warmup_steps=0, min_lr=0.25)
    assert [plain.get_lr(samples) for samples in (0, 1, 4, 16, 100)] == [1.0, 1.0, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("style", "quarter", "half"),
    [
        ("linear", 0.75, 0.5),
        ("cosine", 0.5 * (1 + math.sqrt(0.5)), 0.5),
        ("exponential", 2 * 0.5**0.25 - 1, math.sqrt(2) - 1),
        ("minus_sqrt", 0.5, 1 - math.sqrt(0.5)),
    ],
)
def test_warmup_stable_decay(style, quarter, half):
    """The last 200 of 1100 samples decay; before them the rate is flat."""
    wsd = scheduler(lr_decay_style="WSD", wsd_decay_steps=200, lr_wsd_decay_style=style)
    assert [wsd.get_lr(samples) for samples in (100, 500, 900)] == [1.0, 1.0, 1.0]
    assert wsd.get_lr(950) == pytest.approx(0.1 + 0.9 * quarter, rel=1e-14)
    assert wsd.get_lr(1000) == pytest.approx(0.1 + 0.9 * half, rel=1e-14)
    assert wsd.get_lr(1100) == pytest.approx(0.1, rel=1e-14)
    assert wsd.get_lr(1101) == 0.1


def test_warmup_starts_where_it_is_told():
    assert scheduler(init_lr=0.2).get_lr(50) == pytest.approx(0.6)


@pytest.mark.parametrize(("style", "expected"), [("linear", 0.15), ("cosine", 0.1 + 0.2 * 0.5 * (1 - math.sqrt(0.5)))])
def test_weight_decay_by_hand(style, expected):
    grown = scheduler(start_wd=0.1, end_wd=0.3, wd_incr_steps=1000, wd_incr_style=style)
    assert grown.get_wd(0) == pytest.approx(0.1)
    assert grown.get_wd(250) == pytest.approx(expected, rel=1e-14)
    assert grown.get_wd(1000) == pytest.approx(0.3)
    assert grown.get_wd(1001) == 0.3


def test_step_writes_into_each_group():
    found = scheduler()
    found.step(600)
    plain, not_decayed, decoupled = found.optimizer.param_groups
    assert (plain["lr"], plain["weight_decay"]) == (pytest.approx(0.55), 0.01)
    assert (not_decayed["lr"], not_decayed["weight_decay"]) == (pytest.approx(0.55), 0.0)
    assert decoupled["lr"] == pytest.approx(3.0)


def test_the_value_does_not_depend_on_the_path():
    """T54: one jump, many batches and a resume reach the same values, to the bit."""
    jump, walk, resumed = (scheduler(lr_decay_style="cosine") for _ in range(3))
    jump.step(700)
    for batch in (1, 99, 250, 350):
        walk.step(batch)
    resumed.load_state_dict(walk.state_dict())
    values = [[group["lr"] for group in s.optimizer.param_groups] for s in (jump, walk, resumed)]
    assert values[0] == values[1] == values[2]


def test_resume_takes_the_schedule_the_flags_choose():
    saved = scheduler(max_lr=2.0, lr_decay_steps=2100, lr_decay_style="cosine")
    saved.step(500)
    state = saved.state_dict()

    from_checkpoint = scheduler(use_checkpoint_opt_param_scheduler=True)
    from_checkpoint.load_state_dict(state)
    assert from_checkpoint.optimizer.param_groups[0]["lr"] == saved.optimizer.param_groups[0]["lr"]

    overridden = scheduler(use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True)
    overridden.load_state_dict(state)
    assert overridden.num_steps == 500
    assert overridden.optimizer.param_groups[0]["lr"] == scheduler().get_lr(500)

    undecided = scheduler(use_checkpoint_opt_param_scheduler=False)
    with pytest.raises(ConfigError, match="3 settings do not fit") as caught:
        undecided.load_state_dict(state)
    assert "--override-opt_param-scheduler" in str(caught.value)
    with pytest.raises(ConfigError, match="contradict"):
        scheduler(use_checkpoint_opt_param_scheduler=True, override_opt_param_scheduler=True)


def test_equal_schedules_resume_without_a_flag():
    saved = scheduler()
    saved.step(123)
    resumed = scheduler(use_checkpoint_opt_param_scheduler=False)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.num_steps == 123


def build(config: SchedulerConfig, **lengths) -> OptimizerParamScheduler:
    return get_optimizer_param_scheduler(
        Groups(), OptimizerConfig(lr=1.0, min_lr=0.1), config, samples_of_iterations=lambda n: 8 * n, **lengths
    )


def test_lengths_in_iterations_are_converted_to_samples():
    found = build(
        SchedulerConfig(lr_decay_style="WSD", lr_decay_iters=90, lr_warmup_iters=5, lr_wsd_decay_iters=10),
        train_iters=100,
    ).schedule
    assert (found.lr_decay_steps, found.lr_warmup_steps, found.wsd_decay_steps) == (720, 40, 80)
    assert found.wd_incr_steps == 800


def test_iterations_of_a_growing_batch_are_converted_by_what_they_consume():
    """Batches of 4 up to sample 8, then of 16. Mutation: one batch size for all; the rate ends before the run does."""
    batches = build_num_microbatches_calculator(None, None, 2, 1, step_batch_size_schedule="0:4 8:16")
    found = get_optimizer_param_scheduler(
        Groups(),
        OptimizerConfig(lr=1.0),
        SchedulerConfig(lr_warmup_iters=2, lr_decay_style="WSD", lr_wsd_decay_iters=3),
        samples_of_iterations=batches.samples,
        train_iters=12,
    ).schedule
    assert (found.lr_warmup_steps, found.lr_decay_steps, found.wsd_decay_steps) == (8, 8 + 10 * 16, 3 * 16)


def test_lengths_in_samples_are_taken_as_they_are():
    found = build(SchedulerConfig(lr_warmup_samples=50), train_samples=1000).schedule
    assert (found.lr_decay_steps, found.lr_warmup_steps, found.wd_incr_steps) == (1000, 50, 1000)


def test_warmup_as_a_fraction_of_the_decay():
    assert build(SchedulerConfig(lr_warmup_fraction=0.1), train_iters=100).schedule.lr_warmup_steps == 80.0


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (SchedulerConfig(), {}),
        (SchedulerConfig(), {"train_iters": 10, "train_samples": 80}),
        (SchedulerConfig(lr_warmup_samples=8), {"train_iters": 10}),
        (SchedulerConfig(lr_decay_iters=8), {"train_samples": 80}),
        (SchedulerConfig(lr_warmup_iters=10), {"train_iters": 10}),
        (SchedulerConfig(lr_decay_style="WSD"), {"train_iters": 10}),
        (SchedulerConfig(lr_warmup_init=2.0), {"train_iters": 10}),
        (SchedulerConfig(weight_decay_incr_style="linear"), {"train_iters": 10}),
    ],
)
def test_contradictions_are_refused(config, lengths):
    with pytest.raises(ConfigError):
        build(config, **lengths)


def test_a_missing_learning_rate_is_refused():
    with pytest.raises(ConfigError, match="--lr"):
        get_optimizer_param_scheduler(
            Groups(), OptimizerConfig(), SchedulerConfig(), samples_of_iterations=lambda n: 8 * n, train_iters=10
        )


def test_configs_report_all_their_violations():
    assert SchedulerConfig().violations() == OptimizerConfig().violations() == []
    broken = SchedulerConfig(
        lr_decay_style="WSD",
        lr_warmup_fraction=1.5,
        lr_warmup_iters=3,
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=True,
        start_weight_decay=0.1,
    )
    assert len(broken.violations()) == 5
    wrong = OptimizerConfig(
        optimizer="soap", lr=0.1, min_lr=0.2, adam_beta1=1.0, clip_grad=-1.0, loss_scale=0.0, hysteresis=0
    )
    assert len(wrong.violations()) == 6
