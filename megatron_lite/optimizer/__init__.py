"""Optimizer: parameter groups, gradient scaling and clipping, fused updates, learning rate schedules."""

from typing import TYPE_CHECKING

from megatron_lite.lazy import names_from

if TYPE_CHECKING:
    from megatron_lite.optimizer.clip_grads import counts_here, global_grad_statistics
    from megatron_lite.optimizer.config import OptimizerConfig, SchedulerConfig
    from megatron_lite.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
    from megatron_lite.optimizer.optimizer import MegatronOptimizer, StepResult, get_megatron_optimizer
    from megatron_lite.optimizer.param_groups import get_param_groups
    from megatron_lite.optimizer.param_scheduler import OptimizerParamScheduler, get_optimizer_param_scheduler

__all__ = [
    "ConstantGradScaler",
    "DynamicGradScaler",
    "MegatronOptimizer",
    "OptimizerConfig",
    "OptimizerParamScheduler",
    "SchedulerConfig",
    "StepResult",
    "counts_here",
    "get_megatron_optimizer",
    "get_optimizer_param_scheduler",
    "get_param_groups",
    "global_grad_statistics",
]

_HOMES = {
    "ConstantGradScaler": "grad_scaler",
    "DynamicGradScaler": "grad_scaler",
    "MegatronOptimizer": "optimizer",
    "OptimizerConfig": "config",
    "OptimizerParamScheduler": "param_scheduler",
    "SchedulerConfig": "config",
    "StepResult": "optimizer",
    "counts_here": "clip_grads",
    "get_megatron_optimizer": "optimizer",
    "get_optimizer_param_scheduler": "param_scheduler",
    "get_param_groups": "param_groups",
    "global_grad_statistics": "clip_grads",
}
__getattr__ = names_from(__name__, _HOMES)
