"""Saving while training goes on: what is saved is the state at the call, and failures are told without stopping."""

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import BackgroundSaver, CheckpointError, folders, read_tracker, save_checkpoint
from tests.unit.checkpoint.test_checkpointing import CONFIG, die_at, load, save
from tests.unit.checkpoint.tiny import TinyModel, TinyOptimizer, equal, fill, snapshot


def start(root: Path, iteration: int, begin: float, saver: BackgroundSaver) -> dict[str, torch.Tensor]:
    """Begin a save of a state that is overwritten at once; returns what it was."""
    model = TinyModel(begin)
    optimizer = TinyOptimizer(model, begin)
    extra = {"consumed": 8 * iteration}
    before = snapshot(model, optimizer)
    save_checkpoint(root, iteration, model, optimizer, extra, config_dict=CONFIG, background=saver)
    fill(model.state_dict(), -1.0)
    fill(optimizer.state, -2.0)
    extra["consumed"] = -1
    return before


def settle(saver: BackgroundSaver, ask: str) -> None:
    """Hear how the save under way ends, by asking again and again or by waiting."""
    while saver.is_busy:
        getattr(saver, ask)()


class PausedSaver(BackgroundSaver):
    """Writes when it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def start(self, write: Callable[[], None]) -> None:
        def when_told() -> None:
            assert self.go_on.wait(60)
            write()

        super().start(when_told)


def test_the_memory_of_copies_is_used_again() -> None:
    """Where a tensor has another shape than in the save before, all of it goes, before there is other memory.

    Mutations: the copy of the first save; a view; memory that does not fit; the old memory kept.
    """
    saver = BackgroundSaver()
    tensors = {
        "a": torch.arange(6.0),
        "b": torch.ones((), dtype=torch.bfloat16),
        "c": torch.zeros(3, dtype=torch.uint8),
    }
    first = saver.copies(tensors)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    tensors["a"] += 1
    second = saver.copies({name: tensors[name] for name in ("a", "c")})
    assert second.keys() == {"a", "c"}
    assert torch.equal(second["a"], torch.arange(6.0) + 1)
    assert second["a"].data_ptr() == places["a"] != tensors["a"].data_ptr()
    tensors["c"] = torch.ones(4, dtype=torch.uint8)
    old = weakref.ref(first["a"])
    del first, second
    third = saver.copies(tensors)
    assert all(torch.equal(one, tensors[name]) for name, one in third.items())
    assert old() is None
    saver.close()


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    """The thread writes after the state has changed. Mutations: no copy of tensors, or of what is not tensors."""
    saver = PausedSaver()
    wanted = start(tmp_path, 10, 0.3, saver)
    saver.poll()
    assert saver.is_busy
    assert read_tracker(tmp_path) is None
    saver.go_on.set()
    saver.finish()
    assert not saver.is_busy
    state, model, optimizer = load(tmp_path)
    assert state is not None
    assert state.extra == {"consumed": 80}
    assert equal(snapshot(model, optimizer), wanted)
    saver.close()


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    """At most one is under way. Mutation: the first forgotten."""
    saver = PausedSaver()
    start(tmp_path, 10, 0.3, saver)
    with pytest.raises(AssertionError, match="finish the save before"):
        start(tmp_path, 20, 0.4, saver)
    saver.go_on.set()
    saver.finish()
    wanted = start(tmp_path, 20, 0.4, saver)
    saver.close()
    assert read_tracker(tmp_path) == 20
    _, model, optimizer = load(tmp_path)
    assert equal(snapshot(model, optimizer), wanted)


@pytest.mark.parametrize("ask", ["poll", "finish"])
@pytest.mark.parametrize("step", ["fsync", "rename", "replace"])
def test_a_failure_is_told_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, ask: str
) -> None:
    """The disk is full for a while. Mutation: an error of the thread that nobody hears."""
    old = snapshot(*save(tmp_path, 10, 0.1))
    saver = BackgroundSaver()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    start(tmp_path, 20, 0.7, saver)
    with pytest.raises(CheckpointError, match=r"iteration 20 .*failed[\s\S]*No space left[\s\S]*untouched: 10"):
        settle(saver, ask)
    assert not saver.is_busy
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["iter_0000010", folders.TRACKER]
    _, model, optimizer = load(tmp_path)
    assert equal(snapshot(model, optimizer), old)
    wanted = start(tmp_path, 20, 0.8, saver)
    saver.finish()
    _, model, optimizer = load(tmp_path)
    assert equal(snapshot(model, optimizer), wanted)
    saver.close()


def test_a_kill_at_any_step_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    """As of a save in the foreground (test_checkpointing.py), every step of the thread on the disk."""
    deaths = 0
    for step in range(1, 200):
        root = tmp_path / str(step)
        old = snapshot(*save(root, 10, 0.1))

        def save_and_wait(root: Path = root) -> None:
            saver = BackgroundSaver()
            start(root, 20, 0.7, saver)
            saver.finish()

        alive = die_at(step, save_and_wait)
        _, model, optimizer = load(root)
        new_model = TinyModel(0.7)
        new = snapshot(new_model, TinyOptimizer(new_model, 0.7))
        assert equal(snapshot(model, optimizer), new if read_tracker(root) == 20 else old), step
        if alive:
            assert read_tracker(root) == 20
            break
        deaths += 1
    assert deaths >= 10
