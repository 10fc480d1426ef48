"""What this framework uses of NVIDIA's apex, computed by torch, on any device."""

import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


def fused_layer_norm_affine(input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float) -> Tensor:
    """Its kernel takes one dtype."""
    calls.append("layer_norm")
    assert input.dtype == weight.dtype == bias.dtype
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def fused_rms_norm_affine(input: Tensor, weight: Tensor, normalized_shape: Any, eps: float) -> Tensor:
    """Its kernel takes one dtype."""
    calls.append("rms_norm")
    assert input.dtype == weight.dtype
    return F.rms_norm(input, normalized_shape, weight, eps)


def multi_tensor_applier(op: Any, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *args: Any) -> None:
    """Adds the size of a kernel's chunk to the arguments."""
    op(2048 * 32, noop_flag, tensor_lists, *args)


def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    """Reads its scalars by pointer, so their dtypes are fixed; leaves the gradients scaled."""
    calls.append("adamw")
    assert (mode, bias_correction) == (1, 1)
    assert (noop_flag.dtype, step.dtype, lr.dtype, inv_scale.dtype) == (torch.int32,) * 2 + (torch.float32,) * 2
    assert all(one.dtype == torch.float32 and one.is_contiguous() for several in tensor_lists for one in several)
    assert all(one.numel() for several in tensor_lists for one in several), "it forgets what stands before an empty one"
    if noop_flag.item() == 1:
        return
    for gradient, parameter, mean, square in zip(*tensor_lists, strict=True):
        gradient.mul_(inv_scale)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2 ** step.item())).sqrt_().add_(epsilon)
        update = mean / (1 - beta1 ** step.item()) / denominator + weight_decay * parameter
        parameter.sub_(lr * update)


calls: list[str] = []
"""What was called since the stand-in was installed."""


def installed() -> Any:
    """Context in which the package is this stand-in."""
    norms, multi, amp = (ModuleType(name) for name in ("norms", "multi", "amp_C"))
    norms.fused_layer_norm_affine = fused_layer_norm_affine  # type: ignore[attr-defined]
    norms.fused_rms_norm_affine = fused_rms_norm_affine  # type: ignore[attr-defined]
    multi.multi_tensor_applier = multi_tensor_applier  # type: ignore[attr-defined]
    amp.multi_tensor_adam_capturable = multi_tensor_adam_capturable  # type: ignore[attr-defined]
    calls.clear()
    modules = {
        "apex": ModuleType("apex"),
        "apex.normalization": ModuleType("apex.normalization"),
        "apex.normalization.fused_layer_norm": norms,
        "apex.multi_tensor_apply": multi,
        "amp_C": amp,
    }
    return mock.patch.dict(sys.modules, modules)
