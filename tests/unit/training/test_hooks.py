"""What is profiled, and when: on a GPU that only writes down what it is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lite.training import hooks
from megatron_lite.training_config import ProfilingConfig, TrainingConfig


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What this rank 0 with a GPU tells it."""
    calls: list[Any] = []
    cudart = SimpleNamespace(
        cudaProfilerStart=lambda: calls.append("start"), cudaProfilerStop=lambda: calls.append("stop")
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(hooks, "computes_on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    return calls


def steps(found: list[hooks.Hook], told: list[Any], fails_at: int = 0) -> None:
    """Six iterations; the one that fails ends them after its beginning."""
    for iteration in range(1, 7):
        for hook in found:
            hook.before_step(iteration)
        told.append(iteration)
        if iteration == fails_at:
            break
        for hook in found:
            hook.after_step(iteration)
    for hook in found:
        hook.close()


def build(**options: Any) -> list[hooks.Hook]:
    config = ProfilingConfig(profile_step_start=2, profile_step_end=4, **options)
    return hooks.build_hooks(TrainingConfig(), config, Path("unused"))


def test_the_range_for_nsys_holds_the_work_of_its_iterations(told: list[Any]) -> None:
    """Mutations: no synchronization at either end; the end marked once more when training ends."""
    steps(build(profile=True), told)
    assert told == [1, "synchronize", "start", 2, 3, "synchronize", "stop", 4, 5, 6]


def test_the_range_ends_with_a_run_that_fails_and_waits_for_nothing(told: list[Any]) -> None:
    """Mutation: a synchronization in close(), which after a failed collective never returns."""
    steps(build(profile=True), told, fails_at=3)
    assert told == [1, "synchronize", "start", 2, 3, "stop"]


def test_other_ranks_mark_nothing(told: list[Any]) -> None:
    """Mutation: the end of a range that never began."""
    steps(build(profile=True, profile_ranks=[1], record_memory_history=True), told)
    assert told == [1, 2, 3, 4, 5, 6]


def test_the_history_of_memory_is_bounded_and_ends_with_its_snapshot(told: list[Any]) -> None:
    """Mutations: no bound; recording goes on after the snapshot, or a second one is written."""
    steps(build(record_memory_history=True, memory_snapshot_path="here.pickle"), told)
    begin, *others = told
    assert begin["max_entries"] <= 1_000_000
    assert others == [1, 2, 3, "here.pickle", {"enabled": None}, 4, 5, 6]


def test_a_run_on_cpus_beside_a_gpu_asks_nothing_of_it(
    told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: `torch.cuda.is_available()` for what the run computes on."""
    monkeypatch.setattr(hooks, "computes_on_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = ProfilingConfig(profile=True, profile_step_start=2, profile_step_end=3, record_memory_history=True)
    steps(hooks.build_hooks(TrainingConfig(), config, tmp_path), told)
    assert told == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "profile_rank0.json").exists()
