"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): steps along orthogonalized momentum.

With gradient G, momentum M and weight W [m, n], learning rate lr and weight decay wd,

    M <- mu M + (1 - mu) G
    U  = M, or with Nesterov (1 - mu) G + mu M
    W <- (1 - lr wd) W - lr s(m, n) NewtonSchulz(U)

Momentum as a mean, decoupled weight decay and the factor s are as in Megatron-LM; s = 0.2 sqrt(max(m, n)), which is
spectral with an extra factor of 0.2, is that of Liu et al., 2025, arXiv:2502.16982.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.optimizer.config import OptimizerConfig
from megatron_lite.optimizer.host_moments import Moment, through_device
from megatron_lite.optimizer.newton_schulz import orthogonalized
from megatron_lite.optimizer.whole_matrices import Split, in_rounds, work_on_whole
from megatron_lite.tensor_parallel.parameters import local


@dataclass(frozen=True)
class Matrix:
    """What an update of a parameter reads and writes.

    Attributes:
        parameter: [m, n] or stacked [..., m, n]; a DTensor or a plain tensor.
        gradient: this rank's shard; overwritten.
        momentum: this rank's shard.
        splits: how it is split, from `matrix_splits`.
        row_blocks: see ParameterSpec.
        on_host: whether the host keeps the momentum.
    """

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    splits: tuple[Split, ...] = ()
    row_blocks: tuple[int, ...] | None = None
    on_host: bool = False


def muon(
    matrices: Mapping[str, Matrix],
    config: OptimizerConfig,
    *,
    lr: float,
    weight_decay: float,
    divisor: Tensor | None,
    found_inf: Tensor,
) -> None:
    """One step for matrices by name, a few at a time, so that few of them are in memory whole.

    Args:
        matrices: ranks that share shards give the same names in the same order.
        config: Muon's constants.
        lr: learning rate.
        weight_decay: decoupled.
        divisor: of the gradients, a scalar on the device, or None.
        found_inf: 1, a scalar on the device, changes nothing.

    Collectives: those of `work_on_whole`.
    """
    skip = found_inf > 0
    splits = {name: matrix.splits for name, matrix in matrices.items()}
    sizes = {name: matrix.parameter.numel() for name, matrix in matrices.items()}
    rounds = list(in_rounds(splits, sizes))

    def step(number: int, momenta: list[Tensor]) -> None:
        updates = {
            name: _update(matrices[name].gradient, momentum, config, divisor, skip)
            for name, momentum in zip(rounds[number], momenta, strict=True)
        }
        done = work_on_whole(
            updates, splits, lambda name, whole: orthogonalized(whole, config, matrices[name].row_blocks)
        )
        for name, update in done.items():
            weight = local(matrices[name].parameter)
            moved = weight * (1.0 - lr * weight_decay) - lr * update
            weight.copy_(torch.where(skip, weight, moved))

    kept = [[Moment(matrices[name].momentum, matrices[name].on_host) for name in names] for names in rounds]
    through_device(kept, found_inf.device, step)


def _update(
    gradient: Tensor, momentum: Tensor, config: OptimizerConfig, divisor: Tensor | None, skip: Tensor
) -> Tensor:
    """Bring the momentum up to date; what will be orthogonalized."""
    gradient = gradient if divisor is None else gradient.div_(divisor)
    new = momentum.lerp(gradient, 1.0 - config.muon_momentum)
    momentum.copy_(torch.where(skip, momentum, new))
    return gradient.lerp(new, config.muon_momentum) if config.muon_nesterov else new
