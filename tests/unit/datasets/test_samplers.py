"""Samplers: the order is a function of the consumed samples, whatever the layout (T51)."""

import itertools

import pytest

from megatron_lite.datasets.samplers import MegatronPretrainingRandomSampler, MegatronPretrainingSampler
from megatron_lite.errors import ConfigError

TOTAL = 96


def sequential(consumed, micro_batch_size, rank, size, **kwargs):
    return MegatronPretrainingSampler(TOTAL, consumed, micro_batch_size, rank, size, **kwargs)


def cyclic(consumed, micro_batch_size, rank, size):
    return MegatronPretrainingRandomSampler(None, TOTAL, consumed, micro_batch_size, rank, size)


def global_order(make, micro_batch_size, size, number, consumed=0):
    """The samples of all ranks, put together in the order of steps and ranks."""
    ranks = [iter(make(consumed, micro_batch_size, rank, size)) for rank in range(size)]
    steps = itertools.islice(zip(*ranks, strict=False), number // (micro_batch_size * size))
    return [sample for step in steps for batch in step for sample in batch]


@pytest.mark.parametrize("make", [sequential, cyclic])
@pytest.mark.parametrize(("micro_batch_size", "size"), [(1, 1), (4, 1), (1, 4), (2, 3), (3, 8), (12, 2)])
def test_the_order_does_not_depend_on_the_layout(make, micro_batch_size, size):
    number = 96 if make is sequential else 240
    assert global_order(make, micro_batch_size, size, number) == global_order(make, 1, 1, number)


@pytest.mark.parametrize("make", [sequential, cyclic])
@pytest.mark.parametrize("consumed", [1, 24, 95])
def test_going_on_in_another_layout(make, consumed):
    number = (96 - consumed) // 12 * 12
    whole = global_order(make, 1, 1, 96)
    assert global_order(make, 3, 4, number, consumed) == whole[consumed : consumed + number]


@pytest.mark.parametrize("make", [sequential, cyclic])
def test_global_batches_that_grow(make):
    """A ramp-up takes more micro-batches a step from the same stream."""
    order, consumed = [], 0
    for global_batch_size in (4, 8, 12, 24):
        order += global_order(make, 2, 2, global_batch_size, consumed)
        consumed += global_batch_size
    assert order == global_order(make, 1, 1, 48)


def test_megatrons_parts_of_a_step():
    """Ranks take contiguous parts."""
    assert list(itertools.islice(sequential(8, 2, 1, 3), 2)) == [[10, 11], [16, 17]]


def test_the_last_incomplete_step():
    assert len(list(sequential(0, 5, 0, 4))) == 4
    kept = [list(sequential(0, 5, rank, 4, drop_last=False))[4:] for rank in range(4)]
    assert kept == [[[80, 81, 82, 83, 84]], [[85, 86, 87, 88, 89]], [[90, 91, 92, 93, 94]], [[95]]]


def test_each_cycle_holds_every_sample_once_in_its_own_order():
    order = global_order(cyclic, 2, 4, 3 * TOTAL)
    cycles = [order[begin : begin + TOTAL] for begin in range(0, 3 * TOTAL, TOTAL)]
    for cycle in cycles:
        assert sorted(cycle) == list(range(TOTAL))
    assert cycles[0] != cycles[1] != cycles[2]


def test_mistakes():
    with pytest.raises(ConfigError, match="All 96 samples"):
        sequential(96, 1, 0, 1)
    with pytest.raises(ConfigError, match="does not exist among 2"):
        sequential(0, 1, 2, 2)
    with pytest.raises(ConfigError, match="micro_batch_size is 0"):
        cyclic(0, 0, 0, 1)
    with pytest.raises(ConfigError, match="at least one"):
        MegatronPretrainingSampler(0, 0, 1, 0, 1)
    with pytest.raises(ConfigError, match="data_sharding"):
        MegatronPretrainingRandomSampler(None, 9, 0, 1, 0, 1, data_sharding=True)
