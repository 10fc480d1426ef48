"""`checksums.json`: the length and SHA-256 of every file of a checkpoint, to tell damage from data."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_lite.checkpoint.errors import DamagedCheckpointError

CHECKSUMS = "checksums.json"
Checksums = dict[str, tuple[int, str]]
"""Name of a file -> its bytes, and SHA-256 in hexadecimal."""


def checksums_of(folder: Path, names: Iterable[str]) -> Checksums:
    """Of some files of a folder, each read once."""
    found = {}
    for name in names:
        path = folder / name
        with open(path, "rb") as file:
            found[name] = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    return found


def as_json(checksums: Mapping[str, tuple[int, str]]) -> str:
    """The content of the file."""
    return json.dumps({name: list(checksums[name]) for name in sorted(checksums)}, indent=1)


def read_checksums(folder: Path) -> Checksums:
    """What the checkpoint says of its files.

    Raises:
        DamagedCheckpointError: the file is missing or damaged.
    """
    path = folder / CHECKSUMS
    try:
        stored = json.loads(path.read_text())
        checksums = {str(name): (int(size), str(digest)) for name, (size, digest) in stored.items()}
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing, so the other files cannot be verified.") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    outside = [name for name in checksums if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise DamagedCheckpointError(f"{path} is damaged: {outside[0]!r} is not a file of its folder.")
    return checksums


def verify_files(folder: Path, checksums: Mapping[str, tuple[int, str]]) -> None:
    """Compare files with what they were when they were saved.

    Raises:
        DamagedCheckpointError: naming the first file that is missing, of another length or changed.
    """
    for name, (size, digest) in checksums.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing.")
        if path.stat().st_size != size:
            raise DamagedCheckpointError(f"{path} has {path.stat().st_size:,} bytes, but was saved with {size:,}.")
        found = checksums_of(folder, [name])[name][1]
        if found != digest:
            raise DamagedCheckpointError(
                f"{path} has changed since it was saved: its SHA-256 is {found[:16]}..., not {digest[:16]}...: bytes "
                "were damaged on the disk or on their way."
            )
