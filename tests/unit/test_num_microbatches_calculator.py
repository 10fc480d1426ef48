"""Global batch size schedules against sizes worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite import num_microbatches_calculator as calculator
from megatron_lite.errors import ConfigError
from megatron_lite.num_microbatches_calculator import BatchSizeSchedule, NumMicroBatchesCalculator


@pytest.fixture(autouse=True)
def _no_calculator_left():
    yield
    calculator.destroy_num_microbatches_calculator()


def test_constant_batch_is_divided_over_ranks_and_micro_batches():
    found = NumMicroBatchesCalculator(BatchSizeSchedule.constant(48), micro_batch_size=4, data_parallel_size=3)
    assert found.get() == 4
    found.update(10**9)
    assert (found.get(), found.current_global_batch_size) == (4, 48)


def test_rampup_grows_in_equal_steps():
    """16 to 48 by 8 over 100 samples: a step every 25 samples."""
    schedule = BatchSizeSchedule.rampup([16, 8, 100], 48)
    sizes = {samples: schedule.global_batch_size(samples) for samples in (0, 24, 25, 49, 50, 75, 99, 100, 10**6)}
    assert sizes == {0: 16, 24: 16, 25: 24, 49: 24, 50: 32, 75: 40, 99: 40, 100: 48, 10**6: 48}


@given(
    start=st.integers(1, 64),
    increment=st.integers(1, 16),
    count=st.integers(0, 12),
    samples=st.integers(0, 5000),
    consumed=st.integers(0, 6000),
)
def test_rampup_equals_its_formula(start, increment, count, samples, consumed):
    """floor(consumed / (samples / increments)) increments, all of them once the ramp is over, in exact arithmetic."""
    schedule = BatchSizeSchedule.rampup([start, increment, samples], start + count * increment)
    done = count if consumed >= samples else consumed * count // samples
    assert schedule.global_batch_size(consumed) == start + done * increment


def test_step_schedule_reads_suffixes_and_tokens():
    in_samples = BatchSizeSchedule.parse("0:256 1K:512 2.5k:1024")
    assert [in_samples.global_batch_size(n) for n in (0, 999, 1000, 2499, 2500)] == [256, 256, 512, 512, 1024]
    in_tokens = BatchSizeSchedule.parse("0:768, 250B:1536", seq_length=4096)
    boundary = 250_000_000_000 // 4096
    assert [in_tokens.global_batch_size(n) for n in (boundary - 1, boundary)] == [768, 1536]


@pytest.mark.parametrize(
    "build",
    [
        lambda: BatchSizeSchedule.parse("256"),
        lambda: BatchSizeSchedule.parse("0:many"),
        lambda: BatchSizeSchedule.parse("10:256"),
        lambda: BatchSizeSchedule.parse("0:256 0:512"),
        lambda: BatchSizeSchedule.parse("0:0"),
        lambda: BatchSizeSchedule.rampup([16, 7, 100], 48),
        lambda: BatchSizeSchedule.rampup([64, 8, 100], 48),
        lambda: BatchSizeSchedule.rampup([16, 8], 48),
    ],
)
def test_impossible_schedules_are_refused(build):
    with pytest.raises(ConfigError):
        build()


def test_indivisible_batch_names_the_nearest_legal_ones():
    with pytest.raises(ConfigError, match="use 48 or 60"):
        NumMicroBatchesCalculator(BatchSizeSchedule.constant(50), micro_batch_size=4, data_parallel_size=3)
    rounded = NumMicroBatchesCalculator(BatchSizeSchedule.constant(50), 4, 3, decrease_batch_size_if_needed=True)
    assert (rounded.get(), rounded.current_global_batch_size, rounded.current_running_global_batch_size) == (4, 50, 48)


def test_a_step_too_small_for_this_world_is_refused_only_when_reached():
    """A run that grew its world after the first step of the schedule resumes beyond it."""
    found = NumMicroBatchesCalculator(BatchSizeSchedule.parse("0:4 100:16"), micro_batch_size=1, data_parallel_size=8)
    found.update(100)
    assert found.get() == 2
    with pytest.raises(ConfigError, match="after 50 samples"):
        found.update(50)


@given(
    steps=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), max_size=4),
    first=st.integers(1, 40),
    chunk=st.integers(1, 5),
    train_samples=st.integers(0, 1500),
)
def test_iterations_count_what_a_loop_would_run(steps, first, chunk, train_samples):
    table, threshold = [(0, first)], 0
    for gap, size in steps:
        threshold += gap
        table.append((threshold, size))
    found = NumMicroBatchesCalculator(
        BatchSizeSchedule(tuple((t, size * chunk) for t, size in table)), 1, chunk, decrease_batch_size_if_needed=True
    )
    consumed = iterations = 0
    while consumed + found.running_global_batch_size(consumed) <= train_samples:
        consumed += found.running_global_batch_size(consumed)
        iterations += 1
    assert found.iterations(train_samples) == iterations
    assert found.samples(iterations) == consumed


def test_megatron_names():
    calculator.init_num_microbatches_calculator(0, [8, 8, 64], 24, 2, 4)
    assert (calculator.get_num_microbatches(), calculator.get_micro_batch_size()) == (1, 2)
    calculator.update_num_microbatches(64)
    assert calculator.get_num_microbatches() == 3
    assert calculator.get_current_global_batch_size() == calculator.get_current_running_global_batch_size() == 24
    with pytest.raises(AssertionError, match="already initialized"):
        calculator.init_num_microbatches_calculator(0, None, 24, 2, 4)
    calculator.reconfigure_num_microbatches_calculator(0, None, 16, 2, 4)
    assert calculator.get_num_microbatches() == 2
    calculator.unset_num_microbatches_calculator()
    with pytest.raises(AssertionError, match="not initialized"):
        calculator.get_num_microbatches()


def test_two_schedules_are_refused():
    with pytest.raises(ConfigError, match="rampup_batch_size"):
        calculator.build_num_microbatches_calculator([8, 8, 64], 24, 2, 4, step_batch_size_schedule="0:8")
