"""Small things every dataset needs: the split names, the reading of `--data-path`, whole-or-nothing file writing."""

import contextlib
import enum
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from megatron_lite.errors import ConfigError

Blend = tuple[list[str], list[float] | None]
"""Dataset prefixes and, unless the sizes of the datasets shall decide, their weights."""


class Split(enum.Enum):
    """The three parts a corpus is divided into; the value is the position in every list of splits."""

    train = 0
    valid = 1
    test = 2


def available_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, in float64."""
    array = np.array(weights, dtype=np.float64)
    return (array / np.sum(array)).tolist()


def get_blend_from_list(blend: Sequence[str] | None) -> Blend | None:
    """Read the words of `--data-path`: prefixes, or weights and prefixes in turn.

    `["30", "a", "70", "b"]` gives `(["a", "b"], [30.0, 70.0])` and `["a", "b"]` gives `(["a", "b"], None)`. The name
    of a file of a pair stands for the pair, and both of them, as a pattern of the shell gives them, for one pair.

    Raises:
        ConfigError: some words in the places of weights are numbers and some are not.
    """
    if blend is None:
        return None
    words = [word.strip() for word in blend]
    if not words:
        raise ConfigError("The list of datasets is empty; name at least one prefix of a .bin/.idx pair.")
    places_of_weights, places_of_prefixes = words[0::2], words[1::2]
    weights = [_as_number(word) for word in places_of_weights]
    if len(words) % 2 == 1 or all(weight is None for weight in weights):
        files_of: dict[str, str] = {}
        twice = [word for word in words if files_of.setdefault(_as_prefix(word), word) != word]
        return [_as_prefix(word) for word in words if word not in twice], None
    for word, weight in zip(places_of_weights, weights, strict=True):
        if weight is None:
            raise ConfigError(
                f"{word!r} stands where a weight is expected in {' '.join(words)!r}; "
                "write either prefixes alone or a weight before each prefix."
            )
    return list(map(_as_prefix, places_of_prefixes)), [weight for weight in weights if weight is not None]


def _as_prefix(word: str) -> str:
    """The prefix of a pair that is named by itself or by one of its files."""
    is_file = word.endswith((".bin", ".idx")) and not os.path.isfile(f"{word}.idx")
    return os.path.splitext(word)[0] if is_file else word


def _as_number(word: str) -> float | None:
    """The finite number that a word spells, None for any other word."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def parse_and_normalize_split(split: str) -> list[float]:
    """The shares of train, valid and test in a text such as "969, 30, 1", as fractions that add up to 1.

    Raises:
        ConfigError: the text holds no number, more than three, a negative one, or only zeros.
    """
    try:
        shares = [float(number) for number in re.findall(r"-?[.0-9]+", split)]
    except ValueError as error:
        raise ConfigError(f"The split {split!r} is not a list of numbers; write it like '969,30,1'.") from error
    if not 1 <= len(shares) <= len(Split) or sum(shares) <= 0.0 or min(shares) < 0.0:
        raise ConfigError(
            f"The split {split!r} must give one to {len(Split)} shares (train, valid, test), none negative, not all "
            "zero; write it like '969,30,1'."
        )
    return normalize(shares + [0.0] * (len(Split) - len(shares)))


def convert_split_vector_to_split_matrix(shares: Sequence[float]) -> list[tuple[float, float] | None]:
    """The begin and end of each split as fractions of the corpus, None for an empty split.

    `[0.99, 0.01, 0.0]` gives `[(0, 0.99), (0.99, 1.0), None]`.
    """
    bounds = itertools.pairwise(itertools.accumulate(shares, initial=0))
    return [(begin, end) if begin < end else None for begin, end in bounds]


@contextlib.contextmanager
def write_whole(path: str) -> Iterator[BinaryIO]:
    """Write a file that readers see whole or not at all: a temporary name beside it, synced, then renamed."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
