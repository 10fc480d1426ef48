"""OpenMP threads of a rank: all cores are shared out, unless a user said how many threads there shall be."""

import os
import subprocess
import sys

import pytest

from megatron_lite.training import initialize


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="the launcher's environment is not shown")
@pytest.mark.parametrize(("wish", "threads"), [(None, 4), ("1", None), ("2", None)])
def test_threads_of_a_rank(monkeypatch: pytest.MonkeyPatch, wish: str | None, threads: int | None) -> None:
    """Two ranks on eight cores. Mutation: take every 1 for torchrun's default."""
    of_launcher = {"PATH": os.environ["PATH"], **({"OMP_NUM_THREADS": wish} if wish else {})}
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "print(flush=True); input()"],
        env=of_launcher,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()  # now it is what was asked for, and no copy of this process
        chosen: list[int] = []
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.setattr(initialize.torch, "set_num_threads", chosen.append)
        monkeypatch.setenv("OMP_NUM_THREADS", wish or "1")  # as torchrun does
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        initialize._share_cores()
        launcher.communicate(b"\n")
    assert chosen == ([] if threads is None else [threads])
