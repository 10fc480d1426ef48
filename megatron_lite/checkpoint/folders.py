"""Checkpoint folders on disk, and the order of steps that keeps the last complete one loadable.

    <root>/iter_0000100/                        a complete checkpoint: the name exists only once the data is durable
    <root>/.iter_0000100.tmp/                   one being written, or being deleted
    <root>/.iter_0000100.replaced/              the old one, while another save of the same iteration takes its place
    <root>/latest_checkpointed_iteration.txt    the tracker: the iteration to resume from

Everything that changes the root is done by one process. A process killed between any two of these steps leaves the
checkpoint that the tracker names complete.
"""

import os
import re
import shutil
from pathlib import Path

from megatron_lite.checkpoint.errors import DamagedCheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_COMPLETE = re.compile(r"iter_(\d{7,})")
_REPLACED = re.compile(r"\.iter_(\d{7,})\.replaced")
_TEMPORARY = re.compile(r"\.iter_(\d{7,})\.tmp")


def checkpoint_folder(root: str | os.PathLike[str], iteration: int) -> Path:
    """The folder of a complete checkpoint."""
    return Path(root) / f"iter_{iteration:07d}"


def temporary_folder(root: str | os.PathLike[str], iteration: int) -> Path:
    """The folder a checkpoint is written to, or deleted under."""
    return Path(root) / f".iter_{iteration:07d}.tmp"


def replaced_folder(root: str | os.PathLike[str], iteration: int) -> Path:
    """The name of an older checkpoint of the same iteration, until the new one is in place."""
    return Path(root) / f".iter_{iteration:07d}.replaced"


def read_tracker(root: str | os.PathLike[str]) -> int | None:
    """The iteration that the tracker names, None without a tracker.

    Raises:
        DamagedCheckpointError: the tracker holds something that is not an iteration.
    """
    path = Path(root) / TRACKER
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    text = content.decode("ascii", errors="replace").strip()
    if not re.fullmatch(r"[0-9]+", text):
        raise DamagedCheckpointError(
            f"{path} should hold the number of an iteration, but holds {content[:40]!r}. "
            f"{_what_is_there(root)} Write one of these numbers into the file, or choose with --ckpt-step."
        )
    return int(text)


def complete_iterations(root: str | os.PathLike[str]) -> list[int]:
    """The iterations with a complete checkpoint under this root, ascending."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match.group(1)) for name in names if (match := _COMPLETE.fullmatch(name)))


def find_checkpoint(root: str | os.PathLike[str], iteration: int) -> Path:
    """The folder of an existing checkpoint; also one that a killed save had moved aside.

    Raises:
        DamagedCheckpointError: there is none; the message lists those that are there.
    """
    for folder in (checkpoint_folder(root, iteration), replaced_folder(root, iteration)):
        if folder.is_dir():
            return folder
    raise DamagedCheckpointError(
        f"There is no checkpoint of iteration {iteration} in {root}: {checkpoint_folder(root, iteration).name} is "
        f"missing. {_what_is_there(root)} Choose one with --ckpt-step."
    )


def open_temporary_folder(root: str | os.PathLike[str], iteration: int) -> Path:
    """Clear what killed saves have left behind and make an empty folder to write this checkpoint to."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(root):
        if match := _REPLACED.fullmatch(name):
            _settle_replaced(root, int(match.group(1)))
        elif _TEMPORARY.fullmatch(name):
            shutil.rmtree(root / name)
    folder = temporary_folder(root, iteration)
    folder.mkdir()
    return folder


def publish(root: str | os.PathLike[str], iteration: int) -> Path:
    """Give the temporary folder its name, then move the tracker. All data files must be durable already.

    Returns:
        The folder of the now complete checkpoint.
    """
    root = Path(root)
    temporary, final = temporary_folder(root, iteration), checkpoint_folder(root, iteration)
    sync_folder(temporary)
    if final.exists():
        os.rename(final, replaced_folder(root, iteration))
    os.rename(temporary, final)
    sync_folder(root)
    write_durably(root / TRACKER, str(iteration).encode())
    _settle_replaced(root, iteration)
    return final


def discard_temporary_folder(root: str | os.PathLike[str], iteration: int) -> None:
    """Remove what a failed save has written, as far as that is possible."""
    shutil.rmtree(temporary_folder(root, iteration), ignore_errors=True)


def prune(
    root: str | os.PathLike[str], iteration: int, keep_last: int | None = None, retain_interval: int | None = None
) -> list[int]:
    """Delete checkpoints older than `iteration`; those of later iterations are left alone.

    Args:
        iteration: the checkpoint just saved, always kept.
        keep_last: how many of the newest to keep, this one included. None keeps all, unless there is a retain_interval.
        retain_interval: iterations that are multiples of it are kept for good; alone, it keeps one other checkpoint.

    Returns:
        The iterations deleted.
    """
    if keep_last is None and retain_interval is None:
        return []
    newest = max(1, keep_last or 1)
    earlier = [other for other in complete_iterations(root) if other < iteration]
    candidates = earlier[: max(0, len(earlier) - (newest - 1))]
    doomed = [other for other in candidates if not (retain_interval and other % retain_interval == 0)]
    for other in doomed:
        # Renamed first, so that a half deleted checkpoint never bears the name of a complete one.
        temporary = temporary_folder(root, other)
        os.rename(checkpoint_folder(root, other), temporary)
        shutil.rmtree(temporary)
    return doomed


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file in one step: after a crash it holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle_replaced(root: Path, iteration: int) -> None:
    """Delete the checkpoint that was moved aside if its successor is in place, else move it back."""
    replaced = replaced_folder(root, iteration)
    if not replaced.exists():
        return
    if checkpoint_folder(root, iteration).exists():
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, checkpoint_folder(root, iteration))


def _what_is_there(root: str | os.PathLike[str]) -> str:
    iterations = complete_iterations(root)
    if not iterations:
        return "There are no complete checkpoints in this folder."
    return f"Complete checkpoints here: {', '.join(map(str, iterations))}."
