"""The knobs of the optimizer and of the learning rate and weight decay schedules."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.config_field import Validated, knob
from megatron_lite.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
LR_WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
MUON_SCALE_MODES = ("spectral", "unit_rms_norm", "shape_scaling")
MUON_COEFFICIENT_TYPES = ("quintic", "simple", "polar_express")
MOMENT_DTYPES = ("fp32", "bf16")
WEIGHT_DECAY_INCR_STYLES = ("constant", "linear", "cosine")


def moment_dtype(name: str, main_dtype: "torch.dtype") -> "torch.dtype":
    """The dtype that a moment is stored in: "fp32" stands for that of the master weights (float64 under --fp64)."""
    return torch.bfloat16 if name == "bf16" else main_dtype


@dataclass
class OptimizerConfig(Validated):
    """Which optimizer updates the weights, and how gradients are scaled and clipped before. Names are Megatron's."""

    optimizer: str = knob(
        "adam",
        "adam is AdamW (decoupled weight decay); sgd has momentum; muon updates matrices by Muon, the rest by AdamW.",
        choices=("adam", "sgd", "muon"),
    )

    lr: float | None = knob(None, "Peak learning rate, reached at the end of the warm-up.")
    min_lr: float = knob(0.0, "Learning rate at the end of the decay and ever after.")
    decoupled_lr: float | None = knob(None, "Peak learning rate of the embedding and the output layer; default --lr.")
    decoupled_min_lr: float | None = knob(None, "Lowest learning rate of these layers; default --min-lr.")

    weight_decay: float = knob(0.01, "Weight decay of matrices; biases and other vectors have none.")
    apply_wd_to_qk_layernorm: bool = knob(False, "Decay the weights of the query and key norms too.")
    no_weight_decay_cond_type: str | None = knob(
        None, "Older spelling of --apply-wd-to-qk-layernorm.", choices=("apply_wd_to_qk_layernorm",)
    )
    clip_grad: float = knob(1.0, "Scale gradients down to this global L2 norm; 0 switches clipping off.")

    adam_beta1: float = knob(0.9, "Decay of Adam's mean of gradients.")
    adam_beta2: float = knob(0.999, "Decay of Adam's mean of squared gradients.")
    adam_eps: float = knob(1e-8, "Added to Adam's denominator.")
    adam_impl: str = knob("torch", "Whose fused kernel computes AdamW.", choices=("torch", "apex"))
    use_precision_aware_optimizer: bool = knob(
        False, "Let --exp-avg-dtype and --exp-avg-sq-dtype be lower than that of the master weights."
    )
    exp_avg_dtype: str = knob("fp32", "How Adam's mean of gradients is stored.", choices=MOMENT_DTYPES)
    exp_avg_sq_dtype: str = knob("fp32", "How Adam's mean of squared gradients is stored.", choices=MOMENT_DTYPES)
    sgd_momentum: float = knob(0.9, "Momentum of SGD; 0 keeps no buffer.")
    optimizer_cpu_offload: bool = knob(
        False, "Keep moments in the host's memory; they travel through the device for each update."
    )
    optimizer_offload_fraction: float = knob(
        1.0,
        "With --optimizer-cpu-offload: part of a rank's elements whose moments are kept there, by whole parameters.",
    )

    muon_momentum: float = knob(0.9, "Decay of Muon's mean of gradients.")
    muon_nesterov: bool = knob(False, "Muon orthogonalizes the mean mixed once more with the gradient.")
    muon_split_qkv: bool = knob(
        True, "Muon takes the fused query-key-value weight as one matrix, not three.", flag="--muon-no-split-qkv"
    )
    muon_scale_mode: str = knob(
        "spectral", "How the size of Muon's update follows the shape of the matrix.", choices=MUON_SCALE_MODES
    )
    muon_extra_scale_factor: float = knob(1.0, "Further factor on Muon's update; 0.2 resembles AdamW's.")
    muon_coefficient_type: str = knob(
        "quintic", "Polynomials of Muon's Newton-Schulz iteration.", choices=MUON_COEFFICIENT_TYPES
    )
    muon_num_ns_steps: int = knob(5, "Newton-Schulz steps of Muon.")
    muon_fp32_matmul_prec: str = knob(
        "medium",
        "Products of Newton-Schulz for float32 weights: medium in bfloat16, high in TF32 where the device has it.",
        choices=("medium", "high"),
    )
    muon_tp_mode: str = knob(
        "duplicated",
        "duplicated and distributed: Muon orthogonalizes whole matrices, at every layout. blockwise is refused.",
        choices=("blockwise", "duplicated", "distributed"),
    )
    muon_scalar_optimizer: str = knob("adam", "What updates the parameters that Muon does not.", choices=("adam",))

    fp16: bool = knob(False, "Scale the loss; a model that computes in float16 switches this on.", flag=False)
    loss_scale: float | None = knob(None, "Constant loss scale; default: dynamic under --fp16, none otherwise.")
    initial_loss_scale: float = knob(2.0**32, "First value of the dynamic loss scale.")
    min_loss_scale: float = knob(1.0, "Lowest value of the dynamic loss scale.")
    loss_scale_window: float = knob(1000, "Finite steps in a row after which the dynamic loss scale doubles.")
    hysteresis: int = knob(2, "Non-finite steps before the dynamic loss scale is halved.")

    log_num_zeros_in_grad: bool = knob(False, "Count and log the zeros among the gradients.")

    def __post_init__(self) -> None:
        if self.no_weight_decay_cond_type == "apply_wd_to_qk_layernorm":
            self.apply_wd_to_qk_layernorm = True

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer keeps anything for each element of the parameters."""
        return self.optimizer != "sgd" or self.sgd_momentum > 0.0

    @property
    def host_fraction(self) -> float:
        """Of elements, by whole parameters, whose moments the host keeps."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload and self.has_moments else 0.0

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        found = super().violations()
        found += _learning_rate_violations("lr", self.lr, "min_lr", self.min_lr)
        decoupled_min = self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr
        found += _learning_rate_violations("decoupled_lr", self.decoupled_lr, "decoupled_min_lr", decoupled_min)
        for name in ("adam_beta1", "adam_beta2", "sgd_momentum", "muon_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                found.append(f"{name} is {getattr(self, name)}, but it must lie in [0, 1).")
        for name in ("weight_decay", "clip_grad"):
            if getattr(self, name) < 0.0:
                found.append(f"{name} is {getattr(self, name)}, but it must not be negative; 0 switches it off.")
        if self.adam_eps <= 0.0:
            found.append(
                f"adam_eps is {self.adam_eps}, but it must be positive, or gradients of 0 divide by 0; write 1e-8."
            )
        if self.use_precision_aware_optimizer:
            if self.optimizer != "adam":
                found.append(
                    f"use_precision_aware_optimizer is given with --optimizer {self.optimizer}, but only the "
                    "moments of adam are stored in other dtypes; leave it out, or write --optimizer adam."
                )
        else:
            for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
                if getattr(self, name) != "fp32":
                    found.append(
                        f"{name} is {getattr(self, name)}, but without --use-precision-aware-optimizer it must be "
                        "fp32; add that flag."
                    )
        if not 0.0 <= self.optimizer_offload_fraction <= 1.0:
            found.append(
                f"optimizer_offload_fraction is {self.optimizer_offload_fraction}, but it must lie in [0, 1]; write 1 "
                "to keep all moments in the host's memory."
            )
        if self.muon_tp_mode == "blockwise":
            found.append(
                "muon_tp_mode is blockwise, which orthogonalizes each rank's part of a matrix by itself, so that the "
                "result depends on the layout; write duplicated or distributed."
            )
        if self.muon_num_ns_steps < 1:
            found.append(f"muon_num_ns_steps is {self.muon_num_ns_steps}, but it must be at least 1; 5 is usual.")
        if self.muon_extra_scale_factor <= 0.0:
            found.append(
                f"muon_extra_scale_factor is {self.muon_extra_scale_factor}, but it must be positive; write 1.0."
            )
        if self.loss_scale is not None and self.loss_scale <= 0.0:
            found.append(f"loss_scale is {self.loss_scale}, but it must be positive; leave it out for a dynamic scale.")
        if not 0.0 < self.min_loss_scale <= self.initial_loss_scale:
            found.append(
                f"min_loss_scale is {self.min_loss_scale}, but it must be positive and at most initial_loss_scale "
                f"({self.initial_loss_scale})."
            )
        for name in ("loss_scale_window", "hysteresis"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}, but it must be at least 1.")
        return found


def _learning_rate_violations(name: str, lr: float | None, min_name: str, min_lr: float) -> list[str]:
    found = []
    if min_lr < 0.0:
        found.append(f"{min_name} is {min_lr}, but a learning rate must not be negative.")
    if lr is not None and lr < min_lr:
        found.append(
            f"{name} is {lr}, but it must be at least {min_name} ({min_lr}); lower {min_name} or raise {name}."
        )
    return found


@dataclass
class SchedulerConfig(Validated):
    """How learning rate and weight decay change over the run. Names are Megatron's.

    Lengths are given in iterations (with `--train-iters`) or in samples (with `--train-samples`).
    """

    lr_decay_style: str = knob("linear", "Shape of the learning rate after the warm-up.", choices=LR_DECAY_STYLES)
    lr_wsd_decay_style: str = knob("exponential", "Shape of the last phase of WSD.", choices=LR_WSD_DECAY_STYLES)
    lr_decay_iters: int | None = knob(None, "Iterations until the learning rate is lowest; default --train-iters.")
    lr_decay_samples: int | None = knob(None, "Samples until the learning rate is lowest; default --train-samples.")
    lr_wsd_decay_iters: int | None = knob(None, "Iterations of the last phase of WSD.")
    lr_wsd_decay_samples: int | None = knob(None, "Samples of the last phase of WSD.")
    lr_warmup_fraction: float | None = knob(None, "Part of the decay length spent on the linear warm-up.")
    lr_warmup_iters: int = knob(0, "Iterations of the linear warm-up.")
    lr_warmup_samples: int = knob(0, "Samples of the linear warm-up.")
    lr_warmup_init: float = knob(0.0, "Learning rate at which the warm-up starts.")
    override_opt_param_scheduler: bool = knob(
        False,
        "On resume take the schedule from the command line and ignore the checkpoint's.",
        flag=("--override-opt_param-scheduler", "--override-opt-param-scheduler"),
    )
    use_checkpoint_opt_param_scheduler: bool = knob(
        False,
        "On resume take the schedule from the checkpoint and ignore the command line's.",
        flag=("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler"),
    )
    start_weight_decay: float | None = knob(None, "Weight decay at the start, for a style that is not constant.")
    end_weight_decay: float | None = knob(None, "Weight decay at the end, for a style that is not constant.")
    weight_decay_incr_style: str = knob("constant", "Shape of the weight decay.", choices=WEIGHT_DECAY_INCR_STYLES)

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        found = super().violations() + self._length_violations()
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None and self.lr_wsd_decay_samples is None:
            found.append("lr_decay_style is WSD, which needs the length of its last phase; give --lr-wsd-decay-iters.")
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_iters or self.lr_warmup_samples:
                found.append(
                    f"lr_warmup_fraction ({self.lr_warmup_fraction}) and lr_warmup_iters ({self.lr_warmup_iters}) or "
                    f"lr_warmup_samples ({self.lr_warmup_samples}) are given together; keep one of them."
                )
            if not 0.0 <= self.lr_warmup_fraction < 1.0:
                found.append(f"lr_warmup_fraction is {self.lr_warmup_fraction}, but it must lie in [0, 1).")
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            found.append(
                "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler contradict each other; keep one."
            )
        return found + self._weight_decay_violations()

    def _length_violations(self) -> list[str]:
        found = []
        for name in ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init"):
            if getattr(self, name) < 0:
                found.append(f"{name} is {getattr(self, name)}, but it must not be negative; write 0 or leave it out.")
        for name in ("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"):
            length = getattr(self, name)
            if length is not None and length < 1:
                found.append(f"{name} is {length}, but it must be at least 1; raise it or leave it out.")
        return found

    def _weight_decay_violations(self) -> list[str]:
        start, end = self.start_weight_decay, self.end_weight_decay
        if self.weight_decay_incr_style == "constant":
            if start is None and end is None:
                return []
            return [
                f"start_weight_decay ({start}) and end_weight_decay ({end}) need a --weight-decay-incr-style other "
                "than constant; set it, or use --weight-decay alone."
            ]
        if start is None or end is None:
            return [
                f"weight_decay_incr_style is {self.weight_decay_incr_style}, which needs --start-weight-decay and "
                "--end-weight-decay; give both."
            ]
        if not 0.0 <= start <= end:
            return [f"start_weight_decay is {start}, but it must lie between 0 and end_weight_decay ({end})."]
        return []
