"""Indices kept on disk: built once by whoever sees the folder, read by everybody else.

No process needs another: each looks for the files, and the first to find none builds them while the others on the same
file system wait for its lock. Each file is renamed into place when it is complete, the description last, so a killed
run leaves nothing that looks finished. Where a folder cannot be locked, several processes build the same files; where
it cannot be written, each keeps its own copy in memory.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_lite.datasets.utils import write_whole

logger = logging.getLogger(__name__)

Arrays = Sequence[NDArray[np.integer]]


def load_or_build(
    folder: str | None,
    base: str,
    names: Sequence[str],
    description: str,
    build: Callable[[], Arrays],
    fits: Callable[[Arrays], bool],
) -> Arrays:
    """The arrays `{folder}/{base}-{name}.npy`, built and written if they are missing or do not fit the data.

    Args:
        folder: where to keep them; None keeps them in memory.
        base: beginning of the file names.
        names: name of each array.
        description: text written beside them.
        build: makes the arrays.
        fits: whether arrays read from disk belong to the data at hand (the data may have been written again since).

    Returns:
        The arrays, memory-mapped when they come from disk.
    """
    if folder is None:
        return build()
    paths = [os.path.join(folder, f"{base}-{name}.npy") for name in names]
    description_path = os.path.join(folder, f"{base}-description.txt")

    def load() -> Arrays | None:
        if not all(os.path.isfile(path) for path in (*paths, description_path)):
            return None
        try:
            arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        except (ValueError, OSError, EOFError) as error:
            logger.warning("The cached indices %s cannot be read (%s); building them again.", paths[0], error)
            return None
        if fits(arrays):
            return arrays
        logger.warning("The cached indices %s are of other data; building them again.", paths[0])
        return None

    arrays = load()
    if arrays is not None:
        return arrays
    try:
        os.makedirs(folder, exist_ok=True)
        with _lock(os.path.join(folder, f"{base}.lock")):
            arrays = load()
            if arrays is not None:
                return arrays
            arrays = build()
            for path, array in zip(paths, arrays, strict=True):
                with write_whole(path) as file:
                    np.save(file, array, allow_pickle=False)
            with write_whole(description_path) as file:
                file.write(description.encode("utf-8"))
        return arrays
    except OSError as error:
        logger.warning(
            "The indices cannot be kept in %s (%s), so every process builds its own; "
            "name a folder you can write to with --data-cache-path.", folder, error,
        )  # fmt: skip
        return arrays if arrays is not None else build()


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold a lock that ends with the process; without effect where the file system has no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
