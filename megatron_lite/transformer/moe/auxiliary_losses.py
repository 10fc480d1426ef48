"""Losses beside the main one: tied to an activation, so that they need not travel to the model's output."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_scale: Tensor | None = None
_steps = 0
_step = torch.zeros((), dtype=torch.int64, device="cpu")


def begin_step(scale: Tensor | None) -> None:
    """Begin a step, whose attached losses all get the gradient `scale`.

    To be called before the first micro-batch of a step: counts that run over the micro-batches of one step (those of
    global_aux_loss) begin anew with it.

    Args:
        scale: 0-dim, on the device of the losses: the loss scale / (micro-batches of the step x data parallel size).
            None stands for one.
    """
    global _scale, _steps, _step
    _scale = scale
    _steps += 1
    _step = torch.full((), _steps, dtype=torch.int64, device="cpu" if scale is None else scale.device)


def current_step() -> Tensor:
    """How often `begin_step` was called, 0-dim int64: tells one step from the next without a wait for the device."""
    return _step


class _Attach(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.shape, ctx.dtype, ctx.device = loss.shape, loss.dtype, loss.device
        # A copy (of a few numbers a token): a view would be refused where a pipeline splits the backward pass.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # Read now: where stages are pipelined, the loss was computed long before (a compiled layer reads it there).
        scale = torch.ones((), device=ctx.device) if _scale is None else _scale
        return grad, scale.to(dtype=ctx.dtype, device=ctx.device).expand(ctx.shape)


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """Forward: x, unchanged. Backward: the gradient of x passes through and `loss` gets the gradient of `begin_step`.

    Args:
        x: an activation that the main loss depends on, of any shape.
        loss: this rank's share of an auxiliary loss, 0-dim.
    """
    return _Attach.apply(x, loss)  # type: ignore[no-any-return]
