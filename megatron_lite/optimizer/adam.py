"""AdamW by a fused kernel, with moments stored in fewer bits than they are computed in, or elsewhere."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_lite.ops import apex
from megatron_lite.optimizer.host_moments import Moment, in_parts, through_device


def fused_adamw(
    shards: list[Tensor],
    gradients: list[Tensor],
    states: Sequence[dict[str, Tensor]],
    on_host: Sequence[bool],
    impl: str = "torch",
    **how: Any,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) in place.

    The fused kernel wants moments on the device and in the dtype of the parameters. Others are copied, some parameters
    at a time, and rounded back to nearest; where a step is skipped that gives the same bits again.

    Args:
        shards: of parameters.
        gradients: of their dtype.
        states: for each `exp_avg`, `exp_avg_sq` and `step`.
        on_host: for each whether the host keeps its moments.
        impl: whose kernel, "torch" or "apex"; where apex's cannot do it, with other dtypes than float32 and with shards
            of 2^31 elements, it is torch's.
        how: lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf.
    """
    kept = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
    converted = [{one.dtype for one in both} != {shard.dtype} for both, shard in zip(kept, shards, strict=True)]
    copied = [any(either) for either in zip(converted, on_host, strict=True)]
    parts = in_parts([shard.numel() for shard in shards], copied)

    def update(number: int, moments: list[Tensor]) -> None:
        part = parts[number]
        steps = [states[i]["step"] for i in part]
        _step(impl, [shards[i] for i in part], [gradients[i] for i in part], moments[::2], moments[1::2], steps, **how)

    through_device(
        [[Moment(one, on_host[i]) for i in part for one in kept[i]] for part in parts], shards[0].device, update
    )


def _step(
    impl: str,
    shards: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    **how: Any,
) -> None:
    exp_avgs = [mean.to(shard.dtype) for mean, shard in zip(means, shards, strict=True)]
    exp_avg_sqs = [square.to(shard.dtype) for square, shard in zip(squares, shards, strict=True)]
    if impl == "apex" and all(shard.dtype == torch.float32 and shard.numel() < 2**31 for shard in shards):
        apex.adamw(shards, gradients, exp_avgs, exp_avg_sqs, steps, **how)
    else:
        adamw(shards, gradients, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False, **how)
    for kept, one in zip(chain(means, squares), chain(exp_avgs, exp_avg_sqs), strict=True):
        if kept is not one:
            kept.copy_(one)
