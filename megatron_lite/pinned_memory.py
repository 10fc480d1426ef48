"""Memory of the host, pinned for a GPU, of as many bytes as are needed.

torch's allocator of pinned memory rounds each request up to a power of two (600 MiB take 1,024), and hands a block that
was freed out again only after the device has made all copies with it, so that a host that runs ahead of the device
takes more and more. Here are two ways around that:

- `host_tensors`, for what stays: all tensors lie in one mapping, which is page-locked as a whole, to the byte.
- `HostBytes`, for what comes and goes: pieces that are powers of two anyway, used again in the order of a stream.

Without a GPU both give plain memory, in the same way.
"""

import functools
import mmap
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel.parameters import local

# Bytes; enough for the widest loads of any kernel.
ALIGNMENT = 256


@torch.no_grad()
def host_tensors(like: Mapping[str, tuple[Tensor, torch.dtype]], pinned: bool) -> dict[str, Tensor]:
    """Return zeros in the host's memory, laid out like tensors (a DTensor's shard alone is here), in one mapping.

    Each has a storage of its own, which ends where the tensor does. The mapping goes with the last of them, as soon as
    the device is done with all that is queued.

    Args:
        like: name -> the tensor to be like, and the dtype to have.
        pinned: for a GPU, the current one.

    Raises:
        ConfigError: there is not so much memory, or CUDA cannot pin it.
    """
    begins, end = {}, 0
    for name, (tensor, dtype) in like.items():
        begins[name] = end
        end += -(-local(tensor).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    mapping = _mapping(end, pinned) if end else None
    made = {}
    for name, (tensor, dtype) in like.items():
        made[name] = torch.empty_like(tensor.detach(), dtype=dtype, device="cpu")
        shard = local(made[name])
        if mapping is not None and shard.numel() > 0:
            flat = torch.frombuffer(mapping, dtype=dtype, count=shard.numel(), offset=begins[name])
            shard.set_(flat.untyped_storage(), 0, shard.size(), shard.stride())  # type: ignore[call-overload]
    return made


class HostBytes:
    """Room for bytes on their way to the host and back. When nobody holds it, the next one takes it.

    It does so at once, even while copies are queued; therefore all of a device's copies to and from such rooms belong
    on one stream, whose order puts new bytes after old ones.

    Args:
        count: how many, 1 or more.
        device: where they come from and go to.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        free = _free_pieces(device)
        self._pieces = [free[size].pop() if free[size] else _piece(size, device) for size in piece_sizes(count)]
        weakref.finalize(self, _give_back, free, self._pieces).atexit = False

    def copy_from(self, whole: Tensor) -> None:
        """Begin to copy all bytes here; `whole` is uint8 [count]."""
        for here, there in self._pairs(whole):
            here.copy_(there, non_blocking=True)

    def copy_to(self, whole: Tensor) -> None:
        """Begin to copy all bytes back."""
        for here, there in self._pairs(whole):
            there.copy_(here, non_blocking=True)

    def _pairs(self, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        begin = 0
        for piece in self._pieces:
            there = whole[begin : begin + len(piece)]
            yield piece[: len(there)], there
            begin += len(piece)


def piece_sizes(count: int) -> list[int]:
    """Return powers of two, the largest first, at most eight of them, that make `count` or less than 1/128 more."""
    unit = 1 << max(count.bit_length() - 8, 0)
    enough = -(-count // unit) * unit
    return [1 << bit for bit in reversed(range(enough.bit_length())) if enough >> bit & 1]


def _mapping(size: int, pinned: bool) -> mmap.mmap:
    """Zeros, page-locked for as long as they are there if `pinned`."""
    try:
        # Shared with forked processes, such as data workers: of private memory a page that is written to after the
        # fork may move, away from where the device copies to.
        mapping = _Mapping(-1, size)
        if pinned:
            address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            mapping.pinned_at = address
    except (OSError, torch.cuda.CudaError) as error:
        raise ConfigError(
            f"{size / 2**30:.2f} GiB of the host's memory cannot be {'pinned' if pinned else 'allocated'} ({error}), "
            "but this rank's offloaded moments, or its copy for a save in the background, need them; all ranks of a "
            "node share its memory. --dry-run counts it. Write a lower --optimizer-offload-fraction, leave out "
            "--async-save, or take nodes with more memory."
        ) from error
    return mapping


class _Mapping(mmap.mmap):
    """Memory that is unpinned before it is unmapped, which a finalizer of weakref would be too late for."""

    pinned_at: int | None = None

    def __del__(self) -> None:
        if self.pinned_at is not None and not sys.is_finalizing():
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.pinned_at))


@functools.cache
def _free_pieces(device: torch.device) -> dict[int, list[Tensor]]:
    """Pieces that nobody holds, by size."""
    return defaultdict(list)


def _piece(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _give_back(free: dict[int, list[Tensor]], pieces: list[Tensor]) -> None:
    for piece in pieces:
        free[len(piece)].append(piece)
