"""Norms and AdamW by the kernels of NVIDIA's apex (--norm-impl apex, --adam-impl apex).

Each stands where torch's function of the same arguments does, so weights and moments are stored and saved as ever.
"""

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in the dtype of x: [..., h] -> [..., h]."""
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    return norms.fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x: [..., h] -> [..., h]."""
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    return norms.fused_rms_norm_affine(x, weight, x.shape[-1:], eps)  # type: ignore[no-any-return]


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor,
) -> None:
    """One step of AdamW in place; no number is read on the host.

    Args:
        parameters: contiguous, float32, on a GPU, of less than 2^31 elements; gradients and moments too. What gradients
            hold behind it is undefined.
        gradients: of the parameters.
        exp_avgs: means of gradients.
        exp_avg_sqs: means of squared gradients.
        steps: float32 scalars, equal in all: the kernel counts once.
        lr: learning rate.
        beta1: decay of `exp_avgs`.
        beta2: decay of `exp_avg_sqs`.
        eps: added to the denominator.
        weight_decay: decoupled.
        grad_scale: what gradients are divided by first, float32 scalar.
        found_inf: where it is 1 nothing changes, `steps` included; float32 scalar.
    """
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel = importlib.import_module("amp_C").multi_tensor_adam_capturable
    torch._foreach_add_(steps, 1.0 - found_inf)
    factor = torch.ones_like(found_inf) if grad_scale is None else grad_scale.reciprocal()
    decoupled, corrects_bias = 1, 1
    how: list[Any] = [torch.full_like(found_inf, lr), beta1, beta2, eps, steps[0].to(torch.int32)]
    # Empty shards confuse it: what stands before one at the end of the list would not be updated.
    filled = [shard.numel() > 0 for shard in parameters]
    tensors = [list(itertools.compress(one, filled)) for one in (gradients, parameters, exp_avgs, exp_avg_sqs)]
    if any(filled):
        apply(kernel, found_inf.to(torch.int32), tensors, *how, decoupled, corrects_bias, weight_decay, factor)
