"""Saving while training goes on: the state is copied to host memory, and a thread writes the copy.

    tensors = saver.copies(tensors)   training waits for this alone; the save before is finished by then
    saver.start(write)
    saver.poll()                      between steps: has it finished, and how?
    saver.finish()                    before the next save and at the end: waits

All ranks call the same in the same order. The thread has a process group of its own, so its messages do not meet those
of training. That a checkpoint is complete is agreed among the ranks in the thread, before any of them says so.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.checkpoint.agreement import world
from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.pinned_memory import host_tensors
from megatron_lite.process_groups import computes_on_gpu


class BackgroundSaver:
    """At most one save under way.

    Attributes:
        group: the thread's process group; None for a single process.
    """

    def __init__(self) -> None:
        """Make the thread and its group. Collective over the world."""
        self.group: ProcessGroup | None = dist.new_group(backend="gloo") if world()[1] > 1 else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, split over ranks as the tensors are, good until the next ones are asked for.

        The memory is kept for the next save. In a run on a GPU it is pinned, and all copies travel at once.

        Raises:
            ConfigError: there is no memory for them.
        """
        with_gpu = computes_on_gpu()
        if any(not _fits(self._buffers.get(name), tensor) for name, tensor in tensors.items()):
            self._buffers = {}  # before memory is taken for others
            like = {name: (tensor, tensor.dtype) for name, tensor in tensors.items()}
            self._buffers = host_tensors(like, pinned=with_gpu)
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if with_gpu:
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in tensors}

    def start(self, write: Callable[[], None]) -> None:
        """Run `write` in the thread; what it raises, `poll` or `finish` raises."""
        assert self._pending is None, "finish the save before first"
        self._pending = self._thread.submit(write)

    @property
    def is_busy(self) -> bool:
        """Whether there is a save whose end nobody has asked for."""
        return self._pending is not None

    def poll(self) -> None:
        """Return at once. Raises what a save that has ended raised.

        Raises:
            CheckpointError: the save failed.
        """
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Let the thread and its group go; a save under way is finished, but nobody hears how."""
        self._thread.shutdown(wait=True)
        self.group = None


def _fits(buffer: Tensor | None, tensor: Tensor) -> bool:
    return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
