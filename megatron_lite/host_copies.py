"""Copies between the host's memory and a device for which the host does not wait, and streams beside the main one."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on its way to `device`, where work queued later finds it.

    Out of pageable memory the copy would wait for all that the device still has to do: it is pinned first.
    """
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def beside(device: torch.device, copy: Callable[[], None], which: str) -> torch.cuda.Event | None:
    """Copy behind all that is queued so far, beside all that follows; returns the end of it. On a CPU at once.

    Args:
        device: of the copies' one end.
        copy: queues them.
        which: name of the stream; what bears the same name is done in turn.
    """
    if device.type != "cuda":
        copy()
        return None
    stream = side_stream(device, which)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        copy()
        return stream.record_event()


@functools.cache
def side_stream(device: torch.device, which: str) -> torch.cuda.Stream:
    """The stream of that name, made once."""
    return torch.cuda.Stream(device)
