"""Copies from the host's memory to a device for which the host does not wait."""

import torch
from torch import Tensor


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on its way to `device`, where work queued later finds it.

    Out of pageable memory the copy would wait for all that the device still has to do: it is pinned first.
    """
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
