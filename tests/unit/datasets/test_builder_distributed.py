"""Datasets built by several processes: one folder, and a folder each as on nodes with disks of their own."""

import os
from pathlib import Path

from megatron_lite.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron_lite.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from tests.unit.datasets import corpora


def build(rank, world_size, folder, own_cache, idle_rank):
    """Fingerprints of the train dataset of this rank, or None."""
    os.chdir(folder)
    cache = f"cache{rank}" if own_cache else "cache"
    config = GPTDatasetConfig(**corpora.settings(corpora.CASES["blend with weights"], cache))
    sizes = corpora.CASES["blend with weights"]["sizes"]
    train = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: rank != idle_rank, config).build()[0]
    return corpora.fingerprint(train)


def test_all_ranks_have_the_same_order(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpora.write_corpora()
    for own_cache in (False, True):
        found = pool.run(build, str(tmp_path), own_cache, None, world_size=3)
        assert found[0] is not None
        assert found[0] == found[1] == found[2]
    num_files = len(list(Path("cache").iterdir()))
    assert num_files > 10
    assert all(len(list(Path(f"cache{rank}").iterdir())) == num_files for rank in range(3))


def test_ranks_that_build_nothing_wait_for_nobody(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpora.write_corpora()
    for idle_rank in (0, 1):
        found = pool.run(build, str(tmp_path), False, idle_rank, world_size=2)
        assert found[idle_rank] is None
        assert found[1 - idle_rank] is not None
