"""AdamW by torch's fused kernel, also with moments that are stored in fewer bits than they are computed in."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

# Elements whose moments are in full precision at a time.
_AT_A_TIME = 2**24


def fused_adamw(shards: list[Tensor], gradients: list[Tensor], states: Sequence[dict[str, Tensor]], **how: Any) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) in place.

    The fused kernel wants moments in the dtype of the parameters. Others are converted, some parameters at a time, and
    rounded back to nearest; where a step is skipped that gives the same bits again.

    Args:
        shards: of parameters.
        gradients: of their dtype.
        states: for each `exp_avg`, `exp_avg_sq` and `step`.
        how: arguments of torch.optim.adamw.adamw (lr, beta1, found_inf, ...).
    """
    for part in _parts(shards, states):
        _step([shards[i] for i in part], [gradients[i] for i in part], [states[i] for i in part], **how)


def _step(shards: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]], **how: Any) -> None:
    stored = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
    moments = [[one.to(shard.dtype) for one, shard in zip(kept, shards, strict=True)] for kept in stored]
    means, squares = moments
    adamw(
        shards,
        gradients,
        means,
        squares,
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        maximize=False,
        **how,
    )
    for kept, computed in zip(chain(*stored), chain(*moments), strict=True):
        if kept is not computed:
            kept.copy_(computed)


def _parts(shards: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> Iterator[list[int]]:
    """Places in the lists: all at once if nothing is converted, else as many as make `_AT_A_TIME` elements."""
    part: list[int] = []
    elements = 0
    for place, (shard, state) in enumerate(zip(shards, states, strict=True)):
        converted = {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} != {shard.dtype}
        if part and converted and elements + shard.numel() > _AT_A_TIME:
            yield part
            part, elements = [], 0
        part.append(place)
        elements += shard.numel()
    if part:
        yield part
