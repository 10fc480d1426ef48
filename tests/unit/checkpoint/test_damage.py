"""Damaged checkpoints: what is found, what is said, and which checkpoint is loaded instead."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from megatron_lite.checkpoint import CheckpointError, DamagedCheckpointError, folders, load_checkpoint
from megatron_lite.checkpoint.checksums import CHECKSUMS, read_checksums
from tests.unit.checkpoint.test_checkpointing import load, save
from tests.unit.checkpoint.tiny import equal, snapshot

DATA = "__0_0.distcp"


def flip(path: Path, position: int = -40) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    """The second half is lost."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """As after a crash of a file system that writes names before content."""
    path.write_bytes(b"")


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "data missing": (DATA, Path.unlink, "__0_0.distcp is missing"),
    "data truncated": (DATA, truncate, "ends at byte .*: truncated"),
    "data empty": (DATA, empty, "ends at byte 0"),
    "metadata missing": (".metadata", Path.unlink, r"\.metadata is missing"),
    "metadata truncated": (".metadata", truncate, r"\.metadata is damaged"),
    "common missing": ("common.json", Path.unlink, "common.json is missing"),
    "common truncated": ("common.json", truncate, "common.json is damaged"),
    "all missing": ("", shutil.rmtree, "There is no checkpoint of iteration 20"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checkpoint_before_is_loaded_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Unless that is not wanted. Mutations: fall back whatever is wanted; to the oldest; without a word."""
    file, damage, message = DAMAGES[name]
    save(tmp_path, 5, 0.05)
    old = snapshot(*save(tmp_path, 10, 0.1))
    save(tmp_path, 20, 0.2)
    damage(tmp_path / "iter_0000020" / file)
    state, model, optimizer = load(tmp_path)
    assert state is not None
    assert state.iteration == 10
    assert equal(snapshot(model, optimizer), old)
    output = capsys.readouterr().out
    assert re.search(rf"WARNING: [\s\S]*{message}", output)
    assert "The checkpoint of iteration 10 is loaded instead; the iterations since are trained again." in output
    for options in ({"fallback": False}, {"ckpt_step": 20}):
        with pytest.raises(DamagedCheckpointError, match=message):
            load(tmp_path, **options)


@pytest.mark.parametrize("file", [DATA, ".metadata", "common.json", CHECKSUMS])
def test_a_flipped_bit_is_found_by_verifying(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    """Without it a bit of a tensor would be loaded. Mutation: only lengths compared."""
    old = snapshot(*save(tmp_path, 10, 0.1))
    new = snapshot(*save(tmp_path, 20, 0.2))
    state, model, optimizer = load(tmp_path, verify=True)
    assert equal(snapshot(model, optimizer), new)
    assert " verified the checksums of 3 files, " in capsys.readouterr().out
    # In the data a byte of a tensor, which begin at multiples of 64; in JSON a digit.
    content = (tmp_path / "iter_0000020" / file).read_bytes()
    flip(tmp_path / "iter_0000020" / file, content.index(b"1") if file.endswith("json") else len(content) // 2)
    with pytest.raises(DamagedCheckpointError):
        load(tmp_path, verify=True, fallback=False)
    state, model, optimizer = load(tmp_path, verify=True)
    assert state is not None
    assert state.iteration == 10
    assert equal(snapshot(model, optimizer), old)


def test_what_a_changed_file_is_told(tmp_path: Path) -> None:
    save(tmp_path, 20, 0.2)
    path = tmp_path / "iter_0000020" / DATA
    flip(path)
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp has changed since it was saved: its SHA-256 is"):
        load(tmp_path, verify=True)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DamagedCheckpointError, match=r"has [\d,]+ bytes, but was saved with [\d,]+\."):
        load(tmp_path, verify=True)


def test_checksums_name_no_file_outside(tmp_path: Path) -> None:
    """A crafted list must not have other files read."""
    save(tmp_path, 20, 0.2)
    folder = tmp_path / "iter_0000020"
    for name in ("../secret", "/etc/passwd", "..", "a/b"):
        (folder / CHECKSUMS).write_text(f'{{"{name}": [1, "00"]}}')
        with pytest.raises(DamagedCheckpointError, match="is not a file of its folder"):
            read_checksums(folder)


@pytest.mark.parametrize("content", [b"", b"2", b"\0\0\0\0", b"latest", b"20\n30"])
def test_a_tracker_that_says_nothing_or_a_missing_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """Half written by someone else: the newest checkpoint is loaded. Mutation: a run that starts anew."""
    save(tmp_path, 10, 0.1)
    newest = snapshot(*save(tmp_path, 20, 0.2))
    (tmp_path / folders.TRACKER).write_bytes(content)
    if content == b"2":  # no checkpoint before it
        with pytest.raises(
            DamagedCheckpointError, match=r"no checkpoint of iteration 2 .* Complete checkpoints here: 10"
        ):
            load(tmp_path)
        return
    state, model, optimizer = load(tmp_path)
    assert state is not None
    assert equal(snapshot(model, optimizer), newest)
    assert "The newest checkpoint is loaded." in capsys.readouterr().out
    with pytest.raises(DamagedCheckpointError, match="should hold the number of an iteration"):
        load(tmp_path, fallback=False)


def test_another_model_is_no_damage(tmp_path: Path) -> None:
    """An earlier checkpoint would not fit either. Mutation: fall back for any error."""
    save(tmp_path, 10, 0.1)
    save(tmp_path, 20, 0.2)
    with pytest.raises(CheckpointError, match="iter_0000020 does not fit this run"):
        load_checkpoint(tmp_path, nn.Linear(2, 2))


def test_damage_everywhere_is_told_of_the_oldest(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save(tmp_path, iteration, 0.1)
        truncate(tmp_path / f"iter_{iteration:07d}" / DATA)
    with pytest.raises(DamagedCheckpointError, match="iter_0000010"):
        load(tmp_path)
