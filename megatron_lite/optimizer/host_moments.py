"""Moments that live in the host's memory and travel through the device for the update: --optimizer-cpu-offload.

    copies to the device   | part 0 | part 1 | part 2 | part 3 |
    update                          | part 0 | part 1 | part 2 | part 3 |
    copies to the host                       | part 0 | part 1 | part 2 | part 3 |

On a GPU the copies of each direction have a stream of their own, and the host's memory is pinned. The device's stream
waits for copies, the host never. Three parts at most are on the device; before the memory of one is used again, its
copy to the host is done. Behind the last part the device's stream has waited for all copies: what is queued there
later, such as the next step, finds them made, and a host that wants to read moments waits for the device. On a CPU the
same parts are copied, so that it can be tested.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.host_copies import beside

# Elements of the parameters that make a part.
AT_A_TIME = 2**24


class Moment(NamedTuple):
    """A shard's moment where it is kept, and whether that is the host's memory, from which the device gets copies."""

    kept: Tensor
    on_host: bool


def names_on_host(elements: Mapping[str, int], fraction: float) -> set[str]:
    """Whose moments the host keeps: the first parameters that have `fraction` of all elements, the last one whole.

    So it is that fraction or more, by less than one parameter.

    Args:
        elements: name -> elements of this rank's shard, in the order of the model.
        fraction: in [0, 1].
    """
    wanted = fraction * sum(elements.values())
    chosen: set[str] = set()
    covered = 0
    for name, count in elements.items():
        if covered >= wanted:
            break
        chosen.add(name)
        covered += count
    return chosen


def in_parts(elements: Sequence[int], copied: Sequence[bool]) -> list[list[int]]:
    """Places in lists of parameters: all at once if no moment is copied, else as many as make `AT_A_TIME` elements.

    Args:
        elements: of each parameter's shard.
        copied: whether its moments are computed on as copies, in another dtype or on another device.
    """
    parts: list[list[int]] = []
    together = 0
    for place, (count, is_copied) in enumerate(zip(elements, copied, strict=True)):
        if not parts or (is_copied and together + count > AT_A_TIME):
            parts.append([])
            together = 0
        parts[-1].append(place)
        together += count
    return parts


def through_device(
    parts: Sequence[Sequence[Moment]], device: torch.device, update: Callable[[int, list[Tensor]], None]
) -> None:
    """Call update(number of the part, its moments on the device) for each part; what that leaves in them is kept.

    Moments that are not the host's are handed over as they are.
    """
    arriving = deque([_Visit(part, device) for part in parts[:1]])
    leaving: deque[_Visit] = deque()
    for number in range(len(parts)):
        if len(leaving) == 2:
            leaving.popleft().wait()
        arriving.extend(_Visit(part, device) for part in parts[number + 1 : number + 2])
        here = arriving.popleft()
        here.wait()
        update(number, here.moments)
        here.leave()
        leaving.append(here)
    for one in leaving:
        one.wait()


def wait_for_moments(device: torch.device) -> None:
    """Let the host wait until it may read and write the moments it keeps."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Visit:
    """The moments of one part on the device; copies of the host's are on their way."""

    def __init__(self, part: Sequence[Moment], device: torch.device) -> None:
        # Memory of the device's own stream, on which it is free for others when the visit is over.
        self.moments = [torch.empty_like(kept, device=device) if on_host else kept for kept, on_host in part]
        self._device = device
        self._travelling = [(kept, here) for (kept, on_host), here in zip(part, self.moments, strict=True) if on_host]
        self._copied = self._copy([(here, kept) for kept, here in self._travelling], "moments to the device")

    def leave(self) -> None:
        """Begin to copy what is the host's back to it."""
        self._copied = self._copy(self._travelling, "moments to the host")

    def wait(self) -> None:
        """What the device does from here on finds all copies made."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def _copy(self, targets_and_sources: Sequence[tuple[Tensor, Tensor]], which: str) -> torch.cuda.Event | None:
        def copy() -> None:
            for target, source in targets_and_sources:
                target.copy_(source, non_blocking=True)

        return beside(self._device, copy, which) if targets_and_sources else None
