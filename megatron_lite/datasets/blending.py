"""Which dataset of a blend each sample comes from: always the one that lags furthest behind its share.

At step i the lag of dataset d is `weight_d * max(i, 1) - count_d` in float64, and the first of the largest wins. This
is Megatron's rule, rounding included. It is sequential, so it is solved for many stretches of steps at once: each
stretch starts from guessed counts, and those that the end of the stretch before contradicts run again from the right
ones. When nothing contradicts, the result is that of the one-step-at-a-time loop, whatever the guesses were.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STEPS_PER_BLOCK = 1 << 22
"""Steps solved together; bounds the memory and how far a wrong guess reaches."""


def build_blending_indices(weights: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Blend `size` samples by normalized weights.

    Returns:
        [size] int16, the dataset of each sample, and [size] int64, the sample of that dataset.
    """
    return _blend(np.asarray(weights, np.float64), size, None)


def build_exhaustive_blending_indices(sizes: Sequence[int]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Blend all samples of datasets of these sizes, in proportion to the sizes; see build_blending_indices."""
    limits = np.asarray(sizes, np.int64)
    return _blend(limits / np.float64(limits.sum()), int(limits.sum()), limits)


def _blend(
    weights: NDArray[np.float64], size: int, limits: NDArray[np.int64] | None
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    dataset_index = np.empty(size, np.int16)
    counts = np.zeros(len(weights), np.int64)
    for begin in range(0, size, STEPS_PER_BLOCK):
        end = min(begin + STEPS_PER_BLOCK, size)
        dataset_index[begin:end] = _solve_block(weights, begin, end, counts, limits)
        counts += np.bincount(dataset_index[begin:end], minlength=len(weights))
    return dataset_index, _occurrence(dataset_index, len(weights))


def _occurrence(dataset_index: NDArray[np.int16], num_datasets: int) -> NDArray[np.int64]:
    """How often the entry at each position occurred before, [size]."""
    occurrence = np.empty(len(dataset_index), np.int64)
    for dataset in range(num_datasets):
        positions = np.flatnonzero(dataset_index == dataset)
        occurrence[positions] = np.arange(len(positions))
    return occurrence


def _solve_block(
    weights: NDArray[np.float64],
    begin: int,
    end: int,
    counts: NDArray[np.int64],
    limits: NDArray[np.int64] | None,
) -> NDArray[np.int16]:
    """The choices of steps begin to end, given the counts at begin, [end - begin]."""
    num_steps = end - begin
    stretch = max(1, round((num_steps / 8) ** 0.5))
    starts = np.arange(begin, end, stretch)
    guesses = _guess_counts(weights, starts, counts, limits)
    choices = np.zeros((stretch, len(starts)), np.int16)
    ends = np.zeros_like(guesses)
    wrong = np.arange(len(starts))
    while len(wrong):
        choices[:, wrong], ends[:, wrong] = _run_stretches(weights, starts[wrong], guesses[:, wrong], stretch, limits)
        contradicted = (ends[:, :-1] != guesses[:, 1:]).any(axis=0)
        wrong = np.flatnonzero(contradicted) + 1
        guesses[:, wrong] = ends[:, wrong - 1]
    return choices.T.reshape(-1)[:num_steps]


def _run_stretches(
    weights: NDArray[np.float64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    stretch: int,
    limits: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The rule from each start, side by side: choices [stretch, starts] and the counts after it [datasets, starts]."""
    taken = counts.astype(np.float64)
    choices = np.empty((stretch, len(starts)), np.int16)
    columns = np.arange(len(starts))
    for step in range(stretch):
        largest = np.full(len(starts), -np.inf)
        choice = np.zeros(len(starts), np.int16)
        position = np.maximum(starts + step, 1).astype(np.float64)
        for dataset, weight in enumerate(weights):
            lag = weight * position
            lag -= taken[dataset]
            larger = lag > largest
            if limits is not None:
                larger &= taken[dataset] < limits[dataset]
            choice[larger] = dataset
            np.copyto(largest, lag, where=larger)
        taken[choice, columns] += 1.0
        choices[step] = choice
    return choices, taken.astype(np.int64)


def _guess_counts(
    weights: NDArray[np.float64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    limits: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """Counts that add up to each start and are as close to the shares as integers can be, [datasets, starts]."""
    share = weights[:, None] * starts
    guesses = np.floor(share).astype(np.int64)
    missing = starts - guesses.sum(axis=0)
    rank = np.argsort(np.argsort(guesses - share, axis=0, kind="stable"), axis=0)
    guesses += rank < missing
    if limits is not None:
        np.minimum(guesses, limits[:, None], out=guesses)
    guesses[:, 0] = counts
    return guesses
