"""Blends: the greedy rule step by step, and what a builder makes of weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.datasets import blending
from megatron_lite.datasets.blended_dataset import BlendedDataset
from megatron_lite.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron_lite.datasets.blending import build_blending_indices, build_exhaustive_blending_indices
from megatron_lite.datasets.config import DataConfig
from megatron_lite.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron_lite.datasets.utils import get_blend_from_list, normalize, parse_and_normalize_split
from megatron_lite.errors import ConfigError
from tests.unit.datasets import corpora


def one_step_at_a_time(weights, size, limits=None):
    """The rule as it is worded."""
    counts = [0] * len(weights)
    chosen, samples = [], []
    for step in range(size):
        lags = [weight * float(max(step, 1)) - count for weight, count in zip(weights, counts, strict=True)]
        open_ones = [d for d in range(len(weights)) if limits is None or counts[d] < limits[d]]
        best = max(open_ones, key=lambda d: (lags[d], -d))
        chosen.append(best)
        samples.append(counts[best])
        counts[best] += 1
    return chosen, samples


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=9),
    size=st.integers(0, 700),
    block=st.sampled_from([50, 333, 1 << 22]),
)
def test_weights(weights, size, block):
    weights = normalize(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blending, "STEPS_PER_BLOCK", block)
        dataset_index, sample_index = build_blending_indices(weights, size)
    assert (dataset_index.dtype, sample_index.dtype) == (np.int16, np.int64)
    assert (dataset_index.tolist(), sample_index.tolist()) == one_step_at_a_time(weights, size)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 120), min_size=1, max_size=7))
def test_everything(sizes):
    dataset_index, sample_index = build_exhaustive_blending_indices(sizes)
    weights = [size / float(sum(sizes)) for size in sizes]
    assert (dataset_index.tolist(), sample_index.tolist()) == one_step_at_a_time(weights, sum(sizes), sizes)
    assert np.bincount(dataset_index, minlength=len(sizes)).tolist() == sizes


def test_wrong_guesses_cost_time_only(monkeypatch):
    """Whatever the stretches start from, the result is that of the loop."""
    weights = normalize([0.1, 0.25, 0.4])
    right = build_blending_indices(weights, 3000)[0]
    guess = blending._guess_counts

    def poor_guess(weights, starts, counts, limits):
        guesses = guess(weights, starts, counts, limits)
        guesses[0, 1:] += 5
        guesses[1, 1:] -= 5
        return guesses

    monkeypatch.setattr(blending, "_guess_counts", poor_guess)
    assert np.array_equal(build_blending_indices(weights, 3000)[0], right)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The current folder holds the corpora a, b and c."""
    monkeypatch.chdir(tmp_path)
    corpora.write_corpora()


def build(sizes, **changes):
    case = {"config": {"sequence_length": 16, "blend": (["a", "b", "c"], [0.2, 3.0, 0.55])} | changes}
    config = GPTDatasetConfig(**corpora.settings(case, None))
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def test_items_say_which_dataset_they_are_from(in_folder):
    train = build([300, 10, 5])[0]
    assert isinstance(train, BlendedDataset)
    counts = np.zeros(3)
    for position in range(len(train)):
        item = train[position]
        counts[item["dataset_id"]] += 1
        source = train.datasets[item["dataset_id"]][int(train.dataset_sample_index[position])]
        assert np.array_equal(item["tokens"], source["tokens"])
    assert np.abs(counts / len(train) - np.array([0.2, 3.0, 0.55]) / 3.75).max() < 0.01


def test_threads_change_nothing(in_folder):
    one, many = build([900, 10, 5])[0], build([900, 10, 5], num_dataset_builder_threads=3)[0]
    assert np.array_equal(one.dataset_index, many.dataset_index)
    assert np.array_equal(one[17]["tokens"], many[17]["tokens"])


def test_ranks_that_need_none(in_folder):
    config = GPTDatasetConfig(**corpora.settings(corpora.CASES["blend with weights"], None))
    assert BlendedMegatronDatasetBuilder(GPTDataset, [9, 9, 9], lambda: False, config).build() == [None] * 3


def test_too_few_samples_are_an_error_that_says_what_to_do(in_folder, monkeypatch):
    monkeypatch.setattr(GPTDataset, "__len__", lambda self: 3)
    with pytest.raises(ConfigError, match="--mid-level-dataset-surplus"):
        build([900, 10, 5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": (["a", "b"], [1.0])}, "2 datasets has 1 weights"),
        ({"blend": (["a", "b"], [1.0, 0.0])}, "must be positive"),
        ({"split": None}, "needs a split"),
        ({"split": "1,2,3,4"}, "one to 3 shares"),
        ({"split": "0,0"}, "not all zero"),
        ({"split": "1.2.3"}, "not a list of numbers"),
        ({"blend_per_split": [(["a"], None), None, None]}, "must not be given too"),
        ({"blend": None, "split": None, "blend_per_split": [(["a"], None)]}, "one for each of train"),
        ({"blend": (["nowhere"], None)}, r"no file nowhere\.idx"),
        ({"sequence_length": 0}, "at least 1"),
    ],
)
def test_mistakes(in_folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        build([9, 9, 9], **changes)


def test_weights_without_a_number_of_samples(in_folder):
    with pytest.raises(ConfigError, match="no number of samples"):
        build([None, 9, 9])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, None),
        (["a"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["30", "a", "70", "b"], (["a", "b"], [30.0, 70.0])),
        (["1e-3", " a "], (["a"], [0.001])),
        (["1", "2", "3"], (["1", "2", "3"], None)),
    ],
)
def test_words_of_data_path(words, expected):
    assert get_blend_from_list(words) == expected


def test_a_file_stands_for_its_pair(tmp_path):
    assert get_blend_from_list(["3", "a.bin", "7", "b.c.idx"]) == (["a", "b.c"], [3.0, 7.0])
    assert get_blend_from_list(["a.idx"]) == (["a"], None)
    assert get_blend_from_list(["a.bin", "a.idx", "b", "b"]) == (["a", "b", "b"], None), "a.* of the shell"
    (tmp_path / "odd.bin.idx").write_bytes(b"")
    assert get_blend_from_list([f"{tmp_path}/odd.bin"]) == ([f"{tmp_path}/odd.bin"], None), "a prefix of that name"
    per_split = tmp_path / "files.json"
    per_split.write_text('{"train": "1 a.bin 2 b.idx", "valid": ["c.bin"]}')
    blends = DataConfig(per_split_data_args_path=str(per_split)).blends()[1]
    assert blends == [(["a", "b"], [1.0, 2.0]), (["c"], None), None]
    data = DataConfig(train_data_path=["a.bin"], valid_data_path=["1", "b.idx"], test_data_path=["c"])
    assert data.blends()[1] == [(["a"], None), (["b"], [1.0]), (["c"], None)]


@pytest.mark.parametrize("words", [["30", "a", "b", "70"], []])
def test_wrong_words_of_data_path(words):
    with pytest.raises(ConfigError):
        get_blend_from_list(words)


def test_split_shares():
    assert parse_and_normalize_split("969, 30, 1") == [0.969, 0.03, 0.001]
    assert parse_and_normalize_split("9,1") == [0.9, 0.1, 0.0]
