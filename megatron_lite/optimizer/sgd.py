"""SGD with momentum by torch's fused kernel, also with momentum that the host keeps."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from megatron_lite.optimizer.host_moments import Moment, in_parts, through_device


def fused_sgd(
    shards: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], on_host: Sequence[bool], **how: Any
) -> None:
    """One step of SGD in place.

    Args:
        shards: of parameters.
        gradients: of their dtype.
        buffers: the momentum of each; none at all without momentum.
        on_host: for each whether the host keeps its momentum.
        how: arguments of torch.optim.sgd.sgd (lr, momentum, found_inf, ...).
    """
    parts = in_parts([shard.numel() for shard in shards], on_host)

    def update(number: int, momenta: list[Tensor]) -> None:
        part = parts[number]
        sgd(
            [shards[i] for i in part],
            [gradients[i] for i in part],
            [*momenta] or [None] * len(part),
            fused=True,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            **how,
        )

    through_device(
        [[Moment(buffers[i], on_host[i]) for i in part if buffers] for part in parts], shards[0].device, update
    )
