"""Learning rate and weight decay as functions of the samples consumed so far.

Nothing here remembers a path: the value after n samples is the same whether the run reached n in one go, after a
resume, or with another batch size.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_lite.config_field import Validated
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer.config import (
    LR_DECAY_STYLES,
    LR_WSD_DECAY_STYLES,
    WEIGHT_DECAY_INCR_STYLES,
    OptimizerConfig,
    SchedulerConfig,
)


@dataclass(frozen=True)
class ParamSchedule(Validated):
    """The two curves. All lengths are in samples.

    Attributes:
        init_lr: learning rate at sample 0 of the warm-up.
        max_lr: learning rate at the end of the warm-up.
        min_lr: learning rate from `lr_decay_steps` on.
        lr_warmup_steps: length of the linear warm-up; the value is a fraction if it was given as one.
        lr_decay_steps: sample at which the decay ends, the warm-up included.
        lr_decay_style: constant, linear, cosine, inverse-square-root or WSD (warm-up, stable, decay).
        start_wd: weight decay at sample 0.
        end_wd: weight decay from `wd_incr_steps` on.
        wd_incr_steps: length of the weight decay's change.
        wd_incr_style: constant, linear or cosine.
        wsd_decay_steps: length of WSD's last phase.
        lr_wsd_decay_style: shape of that phase: exponential, linear, cosine or minus_sqrt.
    """

    init_lr: float
    max_lr: float
    min_lr: float
    lr_warmup_steps: float
    lr_decay_steps: float
    lr_decay_style: str
    start_wd: float
    end_wd: float
    wd_incr_steps: int
    wd_incr_style: str
    wsd_decay_steps: int | None = None
    lr_wsd_decay_style: str | None = None

    def violations(self) -> list[str]:
        """Every rule these numbers break, one sentence each."""
        found = []
        if not 0.0 <= self.min_lr <= self.max_lr:
            found.append(f"min_lr is {self.min_lr}, but it must lie between 0 and lr ({self.max_lr}).")
        if self.init_lr > self.max_lr:
            found.append(f"lr_warmup_init is {self.init_lr}, but it must be at most lr ({self.max_lr}).")
        if self.lr_decay_steps <= 0 or self.lr_warmup_steps >= self.lr_decay_steps:
            found.append(
                f"the learning rate warms up for {self.lr_warmup_steps} samples and is lowest after "
                f"{self.lr_decay_steps}; the warm-up must be shorter: lower it, or raise --lr-decay-iters or -samples."
            )
        if self.lr_decay_style not in LR_DECAY_STYLES:
            found.append(f"lr_decay_style is {self.lr_decay_style!r}, but must be one of {', '.join(LR_DECAY_STYLES)}.")
        if self.lr_decay_style == "WSD":
            if not self.wsd_decay_steps:
                found.append("lr_decay_style is WSD, which needs the length of its last phase; give wsd_decay_steps.")
            if self.lr_wsd_decay_style not in LR_WSD_DECAY_STYLES:
                legal = ", ".join(LR_WSD_DECAY_STYLES)
                found.append(f"lr_wsd_decay_style is {self.lr_wsd_decay_style!r}, but must be one of {legal}.")
        if self.wd_incr_style not in WEIGHT_DECAY_INCR_STYLES:
            legal = ", ".join(WEIGHT_DECAY_INCR_STYLES)
            found.append(f"weight_decay_incr_style is {self.wd_incr_style!r}, but must be one of {legal}.")
        if not 0.0 <= self.start_wd <= self.end_wd:
            found.append(f"start_wd is {self.start_wd}, but it must lie between 0 and end_wd ({self.end_wd}).")
        return found

    def get_lr(self, consumed_samples: int, max_lr: float | None = None, min_lr: float | None = None) -> float:
        """Learning rate after `consumed_samples` samples; a parameter group may have its own limits."""
        max_lr = self.max_lr if max_lr is None else max_lr
        min_lr = self.min_lr if min_lr is None else min_lr
        warmup, decay = self.lr_warmup_steps, self.lr_decay_steps
        if warmup > 0 and consumed_samples <= warmup:
            return self.init_lr + (max_lr - self.init_lr) * (consumed_samples / warmup)
        if self.lr_decay_style == "constant":
            return max_lr
        if consumed_samples > decay:
            return min_lr
        if self.lr_decay_style == "inverse-square-root":
            return max(min_lr, max_lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(consumed_samples, 1)))
        return min_lr + self._decay_coefficient(consumed_samples) * (max_lr - min_lr)

    def _decay_coefficient(self, consumed_samples: int) -> float:
        """Position between min_lr (0) and max_lr (1) after the warm-up."""
        ratio = (consumed_samples - self.lr_warmup_steps) / (self.lr_decay_steps - self.lr_warmup_steps)
        if self.lr_decay_style == "linear":
            return 1.0 - ratio
        if self.lr_decay_style == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * ratio))
        assert self.wsd_decay_steps is not None
        ratio = (consumed_samples - (self.lr_decay_steps - self.wsd_decay_steps)) / self.wsd_decay_steps
        if ratio <= 0.0:
            return 1.0
        return {
            "exponential": 2.0 * 0.5**ratio - 1.0,
            "linear": 1.0 - ratio,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * ratio)),
            "minus_sqrt": 1.0 - math.sqrt(ratio),
        }[self.lr_wsd_decay_style or "exponential"]

    def get_wd(self, consumed_samples: int) -> float:
        """Weight decay after `consumed_samples` samples."""
        if self.wd_incr_style == "constant" or consumed_samples > self.wd_incr_steps:
            return self.end_wd
        ratio = consumed_samples / self.wd_incr_steps
        if self.wd_incr_style == "cosine":
            ratio = 0.5 * (1.0 + math.cos(math.pi * (1.0 - ratio)))
        return self.start_wd + ratio * (self.end_wd - self.start_wd)


class HasParamGroups(Protocol):
    """An optimizer whose groups carry `lr` and `weight_decay`; `max_lr`, `min_lr` and `wd_mult` are optional."""

    param_groups: list[dict[str, Any]]


# What a checkpoint holds of the schedule; the rest is always taken from the command line, as in Megatron.
_CHECKPOINTED = (
    "max_lr",
    "min_lr",
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_decay_style",
    "start_wd",
    "end_wd",
    "wd_incr_steps",
    "wd_incr_style",
)


class OptimizerParamScheduler:
    """Writes the schedule's values into the optimizer's parameter groups.

    Args:
        optimizer: its `param_groups` receive `lr` and `weight_decay`.
        init_lr, max_lr, min_lr, lr_warmup_steps, lr_decay_steps, lr_decay_style, start_wd, end_wd, wd_incr_steps,
            wd_incr_style, wsd_decay_steps, lr_wsd_decay_style: see `ParamSchedule`.
        use_checkpoint_opt_param_scheduler: `load_state_dict` takes the checkpoint's schedule.
        override_opt_param_scheduler: `load_state_dict` keeps this schedule. With neither the two must agree.

    Raises:
        ConfigError: the numbers do not make a schedule.
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: float,
        lr_decay_steps: float,
        lr_decay_style: str,
        start_wd: float,
        end_wd: float,
        wd_incr_steps: int,
        wd_incr_style: str,
        use_checkpoint_opt_param_scheduler: bool = True,
        override_opt_param_scheduler: bool = False,
        wsd_decay_steps: int | None = None,
        lr_wsd_decay_style: str | None = None,
    ) -> None:
        if use_checkpoint_opt_param_scheduler and override_opt_param_scheduler:
            raise ConfigError(
                "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler contradict each other; keep one."
            )
        self.optimizer = optimizer
        self.schedule = ParamSchedule(
            init_lr=init_lr,
            max_lr=float(max_lr),
            min_lr=min_lr,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay_steps=lr_decay_steps,
            lr_decay_style=lr_decay_style,
            start_wd=start_wd,
            end_wd=end_wd,
            wd_incr_steps=wd_incr_steps,
            wd_incr_style=wd_incr_style,
            wsd_decay_steps=wsd_decay_steps,
            lr_wsd_decay_style=lr_wsd_decay_style,
        )
        self.schedule.validate()
        self.use_checkpoint_opt_param_scheduler = use_checkpoint_opt_param_scheduler
        self.override_opt_param_scheduler = override_opt_param_scheduler
        self.num_steps = 0
        self.step(0)

    def get_lr(self, consumed_samples: int, param_group: Mapping[str, Any] | None = None) -> float:
        """Learning rate after `consumed_samples` samples, of a group with its own `max_lr` or `min_lr` if given."""
        group = param_group or {}
        return self.schedule.get_lr(consumed_samples, group.get("max_lr"), group.get("min_lr"))

    def get_wd(self, consumed_samples: int) -> float:
        """Weight decay after `consumed_samples` samples."""
        return self.schedule.get_wd(consumed_samples)

    def step(self, increment: int) -> None:
        """Count `increment` more samples and write the values into the parameter groups."""
        self.num_steps += increment
        for group in self.optimizer.param_groups:
            group["lr"] = self.get_lr(self.num_steps, group)
            group["weight_decay"] = self.get_wd(self.num_steps) * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Samples consumed and the schedule, as plain numbers and strings."""
        values = {name: getattr(self.schedule, name) for name in _CHECKPOINTED}
        return {**values, "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue at the checkpoint's position, with the schedule that the two flags choose.

        Raises:
            ConfigError: the checkpoint's schedule differs from this one and neither flag says which to take.
        """
        stored = {name: state_dict[name] for name in _CHECKPOINTED if name in state_dict}
        if not self.override_opt_param_scheduler:
            different = {name: value for name, value in stored.items() if value != getattr(self.schedule, name)}
            if different and not self.use_checkpoint_opt_param_scheduler:
                raise ConfigError.from_violations(
                    [
                        f"{name} is {getattr(self.schedule, name)}, but the checkpoint was trained with {value}; make "
                        "them equal, or pass --override-opt_param-scheduler to take the command line's schedule, or "
                        "--use-checkpoint-opt_param-scheduler to take the checkpoint's."
                        for name, value in different.items()
                    ]
                )
            self.schedule = dataclasses.replace(self.schedule, **different)
        self.num_steps = state_dict["num_steps"]
        self.step(0)


def get_optimizer_param_scheduler(
    optimizer: HasParamGroups,
    optimizer_config: OptimizerConfig,
    config: SchedulerConfig,
    *,
    samples_of_iterations: Callable[[int], int],
    train_iters: int | None = None,
    train_samples: int | None = None,
) -> OptimizerParamScheduler:
    """The scheduler that the flags describe.

    Args:
        optimizer: its `param_groups` receive the values.
        optimizer_config: peak and lowest learning rate, weight decay.
        config: shapes and lengths.
        samples_of_iterations: samples that so many iterations from the start consume.
        train_iters: length of the run in iterations, or
        train_samples: in samples; one of the two.

    Raises:
        ConfigError: the lengths are missing, mixed or contradictory.
    """
    if optimizer_config.lr is None:
        raise ConfigError("lr is not set, but training needs a learning rate; give --lr.")
    if (train_iters is None) == (train_samples is None):
        raise ConfigError(
            f"train_iters is {train_iters} and train_samples is {train_samples}; give exactly one of the two."
        )
    if train_iters is not None:
        samples_of, names = samples_of_iterations, ("lr_decay_samples", "lr_wsd_decay_samples", "lr_warmup_samples")
        length, decay, wsd_decay, warmup = (
            train_iters,
            config.lr_decay_iters,
            config.lr_wsd_decay_iters,
            config.lr_warmup_iters,
        )
    else:
        assert train_samples is not None
        samples_of, names = int, ("lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters")
        length, decay, wsd_decay, warmup = (
            train_samples,
            config.lr_decay_samples,
            config.lr_wsd_decay_samples,
            config.lr_warmup_samples,
        )
    wrong_unit = [f"{name} ({getattr(config, name)})" for name in names if getattr(config, name)]
    if wrong_unit:
        kind = "iterations" if train_iters is not None else "samples"
        raise ConfigError(f"the run is measured in {kind}, so give {', '.join(wrong_unit)} in {kind} too.")

    decay = length if decay is None else decay
    decay_steps = samples_of(decay)
    fraction = config.lr_warmup_fraction
    constant = config.weight_decay_incr_style == "constant"
    start_wd = optimizer_config.weight_decay if constant else config.start_weight_decay
    end_wd = optimizer_config.weight_decay if constant else config.end_weight_decay
    if start_wd is None or end_wd is None:
        raise ConfigError(
            f"weight_decay_incr_style is {config.weight_decay_incr_style}, which needs --start-weight-decay and "
            "--end-weight-decay; give both."
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=optimizer_config.lr,
        min_lr=optimizer_config.min_lr,
        lr_warmup_steps=samples_of(warmup) if fraction is None else fraction * decay_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=start_wd,
        end_wd=end_wd,
        wd_incr_steps=samples_of(length),
        wd_incr_style=config.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=config.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=config.override_opt_param_scheduler,
        wsd_decay_steps=None if wsd_decay is None else decay_steps - samples_of(decay - wsd_decay),
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
