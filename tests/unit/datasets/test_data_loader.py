"""The loader and what stands before it: settings to datasets to batches."""

import itertools
import json

import numpy as np
import pytest
import torch

from megatron_lite.datasets.builders import build_train_valid_test_datasets
from megatron_lite.datasets.config import DataConfig
from megatron_lite.datasets.data_loader import build_pretraining_data_loader
from megatron_lite.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron_lite.errors import ConfigError
from tests.unit.datasets import corpora


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Settings that read corpus a of the current folder."""
    monkeypatch.chdir(tmp_path)
    corpora.write_corpora()
    return DataConfig(data_path=["a"], split="8,1,1", seq_length=16)


def datasets(data, sizes=(100, 10, 5)):
    return build_train_valid_test_datasets(data, corpora.PlainTokenizer(), sizes, seed=1234)


def batches(dataset, number, **settings):
    loader = build_pretraining_data_loader(dataset, **({"consumed_samples": 0, "micro_batch_size": 4} | settings))
    return [batch["tokens"] for batch in itertools.islice(loader, number)]


@pytest.mark.parametrize("dataloader_type", ["single", "cyclic"])
def test_workers_change_nothing(data, dataloader_type):
    train = datasets(data)[0]
    settings = {"dataloader_type": dataloader_type, "consumed_samples": 12}
    here = batches(train, 8, **settings)
    there = batches(train, 8, num_workers=2, **settings)
    assert here[0].shape == (4, 16)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)


def test_ranks_together_read_what_one_reads(data):
    train = datasets(data)[0]
    alone = torch.cat(batches(train, 6))
    ranks = [batches(train, 3, micro_batch_size=2, data_parallel_rank=r, data_parallel_size=4) for r in range(4)]
    together = torch.cat([ranks[rank][step] for step in range(3) for rank in range(4)])
    assert torch.equal(together, alone)


def test_it_begins_after_the_consumed_samples(data):
    train = datasets(data)[0]
    assert torch.equal(torch.cat(batches(train, 2, consumed_samples=8)), torch.cat(batches(train, 4))[8:])
    loader = build_pretraining_data_loader(train, 0, micro_batch_size=4)
    assert len(list(loader)) == len(train) // 4


def test_nothing_to_load(data):
    assert build_pretraining_data_loader(None, 0, micro_batch_size=1) is None
    valid = datasets(DataConfig(data_path=["a", "b"], split="8,1,1", seq_length=16), (100, 0, 0))[1]
    assert len(valid) == 0
    assert build_pretraining_data_loader(valid, 0, micro_batch_size=1) is None


def test_unknown_order(data):
    with pytest.raises(ConfigError, match="single, cyclic"):
        build_pretraining_data_loader(datasets(data)[0], 0, micro_batch_size=1, dataloader_type="external")


def test_made_up_data():
    train, valid, test = datasets(DataConfig(mock_data=True, seq_length=64))
    assert all(type(dataset) is MockGPTDataset for dataset in (train, valid, test))
    assert train[0]["tokens"].shape == (64,)


def test_sources_of_data(data, tmp_path):
    per_split = {"train": "1 a 3 b", "valid": ["c"], "test": None}
    (tmp_path / "splits.json").write_text(json.dumps(per_split))
    (tmp_path / "words.txt").write_text("0.5 a\n0.5 b")
    by_flag = DataConfig(train_data_path=["1", "a", "3", "b"], valid_data_path=["c"], seq_length=16)
    by_file = DataConfig(per_split_data_args_path="splits.json", seq_length=16)
    for found in (by_flag, by_file):
        assert found.violations() == []
        train, valid, test = datasets(found)
        assert [dataset.dataset_path for dataset in train.datasets] == ["a", "b"]
        assert type(valid) is GPTDataset
        assert test is None
    assert DataConfig(data_args_path="words.txt").blends() == ((["a", "b"], [0.5, 0.5]), None)


def test_split_of_megatron_by_default(data):
    data.split = None
    data.data_path = ["b"]
    train, valid, _ = datasets(data, (10, 10, 0))
    assert (len(train.indices), len(valid.indices)) == (58, 2)
    assert train.unique_identifiers["split"] == "969, 30, 1"


def test_system_calls_instead_of_mapping(data):
    mapped = datasets(data)[0][3]
    data.mmap_bin_files = False
    train = datasets(data)[0]
    assert not train.dataset.mmap
    assert np.array_equal(train[3]["tokens"], mapped["tokens"])


def test_masks_reach_the_samples(data):
    data.reset_attention_mask = data.reset_position_ids = data.eod_mask_loss = True
    item = datasets(data)[0][0]
    assert item["document_starts"].shape == (16,)
    assert "attention_mask" not in item
    data.reset_attention_mask = False
    assert "document_starts" not in datasets(data)[0][0]
    data.dataloader_inter_document_masking = True
    item = datasets(data)[0][0]
    assert torch.equal(item["position_ids"], torch.arange(16) - item["document_starts"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": ["a"], "mock_data": True}, "named 2 times, by data_path and by mock_data"),
        ({"train_data_path": ["a"], "split": "9,1"}, "drop --split"),
        ({"data_args_path": "nowhere"}, "not a file"),
        ({"seq_length": 0}, "at least 1"),
        ({"num_workers": -1}, "0 or more"),
        ({"num_dataset_builder_threads": 0}, "at least 1"),
        ({"mid_level_dataset_surplus": -0.1}, "0 or more"),
        ({"dataloader_type": "external"}, "single, cyclic"),
    ],
)
def test_rules(settings, message):
    assert any(message in violation for violation in DataConfig(**settings).violations())


def test_rules_that_show_late():
    with pytest.raises(ConfigError, match="--data-path"):
        datasets(DataConfig(seq_length=16))
    with pytest.raises(ConfigError, match="--seq-length"):
        datasets(DataConfig(mock_data=True))
