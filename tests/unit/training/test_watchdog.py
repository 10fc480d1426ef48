"""A rank whose torchrun has died ends. (What a rank does that hangs is tested where ranks hang, in tests/e2e.)"""

import os
import threading

import pytest

from megatron_lite import launcher
from megatron_lite.training import watchdog


@pytest.mark.parametrize("dies", [True, False])
def test_a_rank_ends_with_its_torchrun(monkeypatch, capfd, dies):
    """The parent is another one at the third look. Mutations: no look at the parent; a look without torchrun."""
    ended = threading.Event()
    parents = iter([*[1234] * 2, *([1 if dies else 1234] * 1000)])

    def end(status: int) -> None:
        assert status == watchdog.STATUS
        ended.set()

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(launcher, "_PARENT", 1234)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", end)
    watch = watchdog.Watchdog(60.0, interval_s=0.005)
    assert ended.wait(5.0 if dies else 0.1) == dies
    watch.close()
    assert ("torchrun, which started this rank, is gone" in capfd.readouterr().err) == dies


def test_a_process_without_torchrun_may_outlive_its_parent(monkeypatch):
    """As under nohup."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    parents = iter(range(1000))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("it ended"))
    watch = watchdog.Watchdog(60.0, interval_s=0.005)
    watch._closed.wait(0.1)
    assert watch._thread.is_alive()
    watch.close()
