"""Folder names, the tracker, and which checkpoints are deleted."""

from pathlib import Path

import pytest

from megatron_lite.checkpoint import CheckpointError, folders, read_tracker


def make(root: Path, *iterations: int) -> None:
    for iteration in iterations:
        folders.checkpoint_folder(root, iteration).mkdir(parents=True)


def test_names_are_those_of_megatron(tmp_path: Path) -> None:
    assert folders.checkpoint_folder(tmp_path, 100).name == "iter_0000100"
    assert folders.checkpoint_folder(tmp_path, 12_345_678).name == "iter_12345678"
    assert folders.TRACKER == "latest_checkpointed_iteration.txt"


@pytest.mark.parametrize("content", ["100", "100\n", "  100 \n\n"])
def test_tracker_tolerates_whitespace(tmp_path: Path, content: str) -> None:
    (tmp_path / folders.TRACKER).write_text(content)
    assert read_tracker(tmp_path) == 100


def test_no_tracker_is_none(tmp_path: Path) -> None:
    assert read_tracker(tmp_path) is None
    assert read_tracker(tmp_path / "nowhere") is None


@pytest.mark.parametrize("content", [b"", b"release", b"1e2", b"-3", b"10 20", b"\xff\xfe1", b"0" * 100 + b"x"])
def test_garbage_in_the_tracker_is_named_with_what_is_there(tmp_path: Path, content: bytes) -> None:
    make(tmp_path, 10, 20)
    (tmp_path / folders.TRACKER).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"number of an iteration.*Complete checkpoints here: 10, 20"):
        read_tracker(tmp_path)


def test_a_missing_checkpoint_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    assert folders.find_checkpoint(tmp_path, 20).name == "iter_0000020"
    with pytest.raises(CheckpointError, match=r"iteration 30 .*Complete checkpoints here: 10, 20.*--ckpt-step"):
        folders.find_checkpoint(tmp_path, 30)


def test_only_complete_folders_count(tmp_path: Path) -> None:
    make(tmp_path, 10)
    folders.temporary_folder(tmp_path, 20).mkdir()
    folders.replaced_folder(tmp_path, 30).mkdir()
    (tmp_path / "iter_0000040.bak").mkdir()
    assert folders.complete_iterations(tmp_path) == [10]


def test_publish_writes_the_tracker_without_a_newline(tmp_path: Path) -> None:
    (folders.open_temporary_folder(tmp_path, 7) / "data").write_text("x")
    assert (folders.publish(tmp_path, 7) / "data").read_text() == "x"
    assert (tmp_path / folders.TRACKER).read_bytes() == b"7"


def test_opening_clears_what_killed_saves_left(tmp_path: Path) -> None:
    make(tmp_path, 10, 30)
    (folders.temporary_folder(tmp_path, 20) / "deep").mkdir(parents=True)
    folders.replaced_folder(tmp_path, 30).mkdir()  # its successor is in place
    (folders.replaced_folder(tmp_path, 40) / "kept").mkdir(parents=True)  # its successor never came
    assert folders.find_checkpoint(tmp_path, 40) == folders.replaced_folder(tmp_path, 40)
    folders.open_temporary_folder(tmp_path, 50)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".iter_0000050.tmp", "iter_0000010", "iter_0000030", "iter_0000040"]
    assert (tmp_path / "iter_0000040" / "kept").exists()


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "kept"),
    [
        (None, None, [10, 20, 30, 40, 50, 60, 99]),
        (1, None, [60, 99]),
        (3, None, [40, 50, 60, 99]),
        (100, None, [10, 20, 30, 40, 50, 60, 99]),
        (1, 30, [30, 60, 99]),
        (2, 20, [20, 40, 50, 60, 99]),
        (None, 20, [20, 40, 60, 99]),
    ],
)
def test_prune_keeps_the_newest_and_the_milestones_and_never_the_future(
    tmp_path: Path, keep_last: int | None, retain_interval: int | None, kept: list[int]
) -> None:
    make(tmp_path, 10, 20, 30, 40, 50, 60, 99)
    folders.prune(tmp_path, 60, keep_last, retain_interval)
    assert folders.complete_iterations(tmp_path) == kept
