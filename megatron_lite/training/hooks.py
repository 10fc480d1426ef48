"""Optional behaviour around each step: profiling, memory snapshots, garbage collection.

A hook has three methods, called by the loop at named points; one that does not care inherits the empty ones.
"""

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.process_groups import computes_on_gpu
from megatron_lite.training_config import ProfilingConfig, TrainingConfig

# Events of the allocator that a memory snapshot holds, the last ones, of some KB each. A step of a large model
# has tens of thousands; without a bound they pile up as long as they are recorded.
_MEMORY_EVENTS = 100_000


class Hook:
    """What the training loop calls."""

    def before_step(self, iteration: int) -> None:
        """Before iteration `iteration` (1 for the first)."""

    def after_step(self, iteration: int) -> None:
        """After iteration `iteration`, before evaluation and checkpoint."""

    def around_evaluation(self) -> None:
        """Before and after each evaluation."""

    def close(self) -> None:
        """After the last step, also when training ends by an error."""


class ManualGarbageCollection(Hook):
    """Collects garbage on every rank at the same steps, so that no rank makes the others wait at a random one."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        gc.disable()
        gc.collect()

    def after_step(self, iteration: int) -> None:
        """Collect every `--manual-gc-interval` steps."""
        if self.config.manual_gc_interval and iteration % self.config.manual_gc_interval == 0:
            gc.collect()

    def around_evaluation(self) -> None:
        """Collect before and after evaluation, unless told not to."""
        if self.config.manual_gc_eval:
            gc.collect()

    def close(self) -> None:
        """Back to Python's own schedule."""
        gc.enable()


class Profiler(Hook):
    """torch.profiler over a range of iterations, one trace a rank in `folder`; on CUDA optionally a range for nsys."""

    def __init__(self, config: ProfilingConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.rank = dist.get_rank()
        self._profile: Any = None
        self._in_range = False
        self._started = self.rank not in (config.profile_ranks or [0])

    def before_step(self, iteration: int) -> None:
        """Start at `--profile-step-start`, when the GPU has done all that was queued before."""
        if iteration != self.config.profile_step_start or self.rank not in (self.config.profile_ranks or [0]):
            return
        self._started = True
        on_gpu = computes_on_gpu()
        if on_gpu:
            torch.cuda.synchronize()
        if on_gpu and not self.config.use_pytorch_profiler:
            torch.cuda.cudart().cudaProfilerStart()
            self._in_range = True
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            record_shapes=self.config.pytorch_profiler_collect_shapes,
            with_stack=self.config.pytorch_profiler_collect_callstack,
        )
        self._profile.__enter__()

    def after_step(self, iteration: int) -> None:
        """Stop before `--profile-step-end`, when the GPU has done the last profiled iteration."""
        if iteration == self.config.profile_step_end - 1:
            if self._in_range:
                torch.cuda.synchronize()  # not in close(): after an error it may never return
            self.close()

    def close(self) -> None:
        """Write the trace, or end the range for nsys, if there is one; say so if there never was."""
        if not self._started:
            print(f"nothing was profiled: no iteration {self.config.profile_step_start} was run", flush=True)
            self._started = True
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"profile_rank{self.rank}.json"
            self._profile.export_chrome_trace(str(path))
            print(f"profile of rank {self.rank}: {path} (open it in chrome://tracing or Perfetto)", flush=True)
            self._profile = None
        if self._in_range:
            torch.cuda.cudart().cudaProfilerStop()
            self._in_range = False


class MemorySnapshot(Hook):
    """Records CUDA allocations, the last of them, and writes torch's snapshot file when the profiled iterations end.

    Each profiled rank (`--profile-ranks`, else 0) writes a file of its own: all but rank 0 with their number added.
    """

    def __init__(self, config: ProfilingConfig) -> None:
        path, rank = Path(config.memory_snapshot_path), dist.get_rank()
        self.config = config
        self._path = path if rank == 0 else path.with_stem(f"{path.stem}_rank{rank}")
        self._written = False
        torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)

    def after_step(self, iteration: int) -> None:
        """Write after the last profiled iteration."""
        if iteration == self.config.profile_step_end - 1:
            self.close()

    def close(self) -> None:
        """Write the snapshot once, and record no more."""
        if not self._written:
            self._written = True
            torch.cuda.memory._dump_snapshot(str(self._path))
            torch.cuda.memory._record_memory_history(enabled=None)


def build_hooks(training: TrainingConfig, profiling: ProfilingConfig, folder: Path) -> list[Hook]:
    """The hooks that the configuration asks for, in the order they run."""
    hooks: list[Hook] = []
    if training.manual_gc:
        hooks.append(ManualGarbageCollection(training))
    if profiling.profile:
        hooks.append(Profiler(profiling, folder))
    profiled = dist.get_rank() in (profiling.profile_ranks or [0])
    if profiling.record_memory_history and profiled and computes_on_gpu():
        hooks.append(MemorySnapshot(profiling))
    return hooks
