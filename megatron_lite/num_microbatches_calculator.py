"""How large the global batch is after so many samples, and how many micro-batches that makes per rank.

`BatchSizeSchedule` is the arithmetic, a pure function of consumed samples. `NumMicroBatchesCalculator` divides it over
the data parallel ranks, and the module-level functions are Megatron's names for the one calculator of a run.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.errors import ConfigError

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class BatchSizeSchedule:
    """Global batch size as a step function of the samples consumed so far.

    Attributes:
        steps: pairs (first sample at which the size holds, global batch size in samples), starting at sample 0.
    """

    steps: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        thresholds = [threshold for threshold, _ in self.steps]
        if not thresholds or thresholds[0] != 0:
            raise ConfigError(
                f"the batch size schedule {self.steps} must say which size holds at sample 0; "
                "let its first entry be 0:SIZE."
            )
        if any(later <= earlier for earlier, later in itertools.pairwise(thresholds)):
            raise ConfigError(f"the thresholds of a batch size schedule must grow, but they are {thresholds}.")
        if any(size < 1 for _, size in self.steps):
            raise ConfigError(f"every global batch size must be at least 1, but the schedule is {self.steps}.")

    @classmethod
    def constant(cls, global_batch_size: int) -> "BatchSizeSchedule":
        """The same size from the first sample to the last."""
        return cls(((0, global_batch_size),))

    @classmethod
    def rampup(cls, rampup_batch_size: Sequence[int], global_batch_size: int) -> "BatchSizeSchedule":
        """`--rampup-batch-size START INCREMENT SAMPLES`: equal increments, equally spaced over SAMPLES samples."""
        if len(rampup_batch_size) != 3:
            raise ConfigError(
                f"rampup_batch_size is {list(rampup_batch_size)}, but takes three numbers: "
                "the start size, the increment and the number of samples of the ramp-up."
            )
        start, increment, samples = (int(value) for value in rampup_batch_size)
        growth = global_batch_size - start
        if start < 1 or increment < 1 or samples < 0 or growth < 0 or growth % increment:
            raise ConfigError(
                f"rampup_batch_size {start} {increment} {samples} does not reach global_batch_size {global_batch_size} "
                f"in whole increments; global_batch_size - {start} must be a non-negative multiple of {increment}."
            )
        increments = growth // increment
        steps = {0: start}
        for number in range(1, increments + 1):
            # A ramp shorter than its number of increments skips sizes: the last one at a threshold holds.
            steps[-(-number * samples // increments)] = start + number * increment
        return cls(tuple(steps.items()))

    @classmethod
    def parse(cls, text: str, seq_length: int | None = None) -> "BatchSizeSchedule":
        """`--step-batch-size-schedule "0:768 250B:1536"`: thresholds are samples; tokens if `seq_length` is given."""
        steps = []
        for entry in text.replace(",", " ").split():
            threshold, colon, size = entry.partition(":")
            if not colon:
                raise ConfigError(f"{entry!r} in step_batch_size_schedule {text!r} must read THRESHOLD:BATCH_SIZE.")
            samples = _parse_number(threshold, entry)
            steps.append((samples if seq_length is None else samples // seq_length, _parse_number(size, entry)))
        return cls(tuple(sorted(steps)))

    def global_batch_size(self, consumed_samples: int) -> int:
        """Size in samples of the batch that begins after `consumed_samples` samples."""
        return [size for threshold, size in self.steps if threshold <= consumed_samples][-1]


def _parse_number(text: str, entry: str) -> int:
    """`1536`, `2.5K`, `250B` -> int."""
    text = text.strip().upper()
    multiplier = _SUFFIXES.get(text[-1:], 1)
    try:
        return int(float(text[:-1] if multiplier > 1 else text) * multiplier)
    except ValueError:
        raise ConfigError(
            f"{text!r} in the batch size schedule entry {entry!r} is not a number; "
            f"write digits with one of the suffixes {', '.join(_SUFFIXES)} or none."
        ) from None


class NumMicroBatchesCalculator:
    """Divides the global batch over micro-batches and data parallel ranks.

    Args:
        schedule: global batch size by consumed samples.
        micro_batch_size: samples in one forward of one rank.
        data_parallel_size: ranks among which the global batch is divided.
        decrease_batch_size_if_needed: round the global batch down to a multiple of micro_batch_size *
            data_parallel_size instead of refusing it.
    """

    def __init__(
        self,
        schedule: BatchSizeSchedule,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool = False,
    ) -> None:
        self.schedule = schedule
        self.micro_batch_size = micro_batch_size
        self.data_parallel_size = data_parallel_size
        self.decrease_batch_size_if_needed = decrease_batch_size_if_needed
        # A later size may not fit this number of ranks yet (a run that will grow), so only the current one is checked.
        self.update(0, consistency_check=len(schedule.steps) == 1)

    def running_global_batch_size(self, consumed_samples: int) -> int:
        """The part of the global batch that whole micro-batches on all ranks make up, in samples."""
        chunk = self.micro_batch_size * self.data_parallel_size
        return self.schedule.global_batch_size(consumed_samples) // chunk * chunk

    def update(self, consumed_samples: int, consistency_check: bool = True) -> None:
        """Move to the batch that begins after `consumed_samples` samples.

        Raises:
            ConfigError: the global batch there is not a multiple of micro_batch_size * data_parallel_size.
        """
        chunk = self.micro_batch_size * self.data_parallel_size
        self.current_global_batch_size = self.schedule.global_batch_size(consumed_samples)
        self.current_running_global_batch_size = self.running_global_batch_size(consumed_samples)
        self.num_micro_batches = self.current_running_global_batch_size // chunk
        if not consistency_check:
            return
        exact = self.current_running_global_batch_size == self.current_global_batch_size
        if self.num_micro_batches < 1 or not (exact or self.decrease_batch_size_if_needed):
            below = self.current_running_global_batch_size
            nearest = f"{below} or {below + chunk}" if below else f"{chunk}"
            raise ConfigError(
                f"global_batch_size is {self.current_global_batch_size} after {consumed_samples} samples, but it must "
                f"be a multiple of micro_batch_size ({self.micro_batch_size}) x data parallel size "
                f"({self.data_parallel_size}) = {chunk}; use {nearest}."
            )

    def get(self) -> int:
        """Micro-batches of each rank in the current global batch."""
        return self.num_micro_batches

    def iterations(self, train_samples: int) -> int:
        """Whole iterations that `train_samples` samples allow, from the first sample on."""
        consumed = count = 0
        ends = [threshold for threshold, _ in self.schedule.steps[1:]] + [train_samples]
        for end in ends:
            size = self.running_global_batch_size(consumed)
            end = min(end, train_samples)
            if size < 1 or consumed >= end:
                continue
            # A size holds for each batch that begins before the next threshold, the last must fit in whole.
            steps = min(-(-(end - consumed) // size), (train_samples - consumed) // size)
            consumed, count = consumed + steps * size, count + steps
        return count

    def samples(self, iterations: int) -> int:
        """Samples that the first `iterations` iterations consume."""
        consumed = 0
        for end in [*(threshold for threshold, _ in self.schedule.steps[1:]), math.inf]:
            size = self.running_global_batch_size(consumed)
            if size < 1 or consumed >= end:
                continue
            steps = max(0, min(iterations, math.inf if end == math.inf else -(-(int(end) - consumed) // size)))
            consumed, iterations = consumed + int(steps) * size, iterations - int(steps)
        return consumed


_GLOBAL_NUM_MICROBATCHES_CALCULATOR: NumMicroBatchesCalculator | None = None


def get_num_microbatches_calculator() -> NumMicroBatchesCalculator:
    """The calculator of this run; asserts that `init_num_microbatches_calculator` was called."""
    assert _GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None, "num microbatches calculator is not initialized"
    return _GLOBAL_NUM_MICROBATCHES_CALCULATOR


def get_num_microbatches() -> int:
    """Micro-batches of each rank in the current global batch."""
    return get_num_microbatches_calculator().num_micro_batches


def get_current_global_batch_size() -> int:
    """Global batch size the schedule asks for now, in samples."""
    return get_num_microbatches_calculator().current_global_batch_size


def get_current_running_global_batch_size() -> int:
    """Global batch size really run now: the same, or rounded down under `decrease_batch_size_if_needed`."""
    return get_num_microbatches_calculator().current_running_global_batch_size


def get_micro_batch_size() -> int:
    """Samples in one forward of one rank."""
    return get_num_microbatches_calculator().micro_batch_size


def update_num_microbatches(consumed_samples: int, consistency_check: bool = True, verbose: bool = False) -> None:
    """Move the calculator of this run to `consumed_samples`; `verbose` is Megatron's and has no effect."""
    get_num_microbatches_calculator().update(consumed_samples, consistency_check)


def build_num_microbatches_calculator(
    rampup_batch_size: Sequence[int] | None,
    global_batch_size: int | None,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
    step_batch_size_schedule: str | None = None,
    seq_length: int | None = None,
) -> NumMicroBatchesCalculator:
    """A calculator from Megatron's arguments; without any global batch size there is one micro-batch.

    Raises:
        ConfigError: both schedules are given, or the numbers do not fit each other.
    """
    if step_batch_size_schedule is not None:
        if rampup_batch_size is not None or decrease_batch_size_if_needed:
            other = "rampup_batch_size" if rampup_batch_size is not None else "decrease_batch_size_if_needed"
            raise ConfigError(f"step_batch_size_schedule and {other} are given together; keep one of them.")
        schedule = BatchSizeSchedule.parse(step_batch_size_schedule, seq_length)
    else:
        size = micro_batch_size * data_parallel_size if global_batch_size is None else global_batch_size
        if rampup_batch_size is None:
            schedule = BatchSizeSchedule.constant(size)
        else:
            schedule = BatchSizeSchedule.rampup(rampup_batch_size, size)
    return NumMicroBatchesCalculator(schedule, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed)


def init_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: Sequence[int] | None = None,
    global_batch_size: int | None = None,
    micro_batch_size: int = 1,
    data_parallel_size: int = 1,
    decrease_batch_size_if_needed: bool = False,
    step_batch_size_schedule: str | None = None,
    seq_length: int | None = None,
) -> None:
    """Create the calculator of this run, which must not have one (Megatron's signature; `rank` has no effect)."""
    assert _GLOBAL_NUM_MICROBATCHES_CALCULATOR is None, "num microbatches calculator is already initialized"
    reconfigure_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
        step_batch_size_schedule,
        seq_length,
    )


def reconfigure_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: Sequence[int] | None = None,
    global_batch_size: int | None = None,
    micro_batch_size: int = 1,
    data_parallel_size: int = 1,
    decrease_batch_size_if_needed: bool = False,
    step_batch_size_schedule: str | None = None,
    seq_length: int | None = None,
) -> None:
    """Replace the calculator of this run, whether or not there is one."""
    global _GLOBAL_NUM_MICROBATCHES_CALCULATOR
    _GLOBAL_NUM_MICROBATCHES_CALCULATOR = build_num_microbatches_calculator(
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
        step_batch_size_schedule,
        seq_length,
    )


def destroy_num_microbatches_calculator() -> None:
    """Forget the calculator of this run."""
    global _GLOBAL_NUM_MICROBATCHES_CALCULATOR
    _GLOBAL_NUM_MICROBATCHES_CALCULATOR = None


unset_num_microbatches_calculator = destroy_num_microbatches_calculator
