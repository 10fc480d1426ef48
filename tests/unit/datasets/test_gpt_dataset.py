"""GPT samples: Megatron's order, whole and unpadded tokens, masks by position, and a cache that is never stale."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.datasets import gpt_dataset as gpt_dataset_module
from megatron_lite.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron_lite.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    get_ltor_masks_and_position_ids,
)
from megatron_lite.datasets.gpt_indices import build_sample_index, plan_samples
from megatron_lite.datasets.index_cache import load_or_build
from megatron_lite.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_lite.datasets.utils import normalize
from megatron_lite.errors import ConfigError
from tests.unit.datasets import corpora

GOLDEN = json.loads((Path(__file__).parent / "megatron_golden.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the corpora of corpora.py."""
    folder = tmp_path_factory.mktemp("corpora")
    before = os.getcwd()
    os.chdir(folder)
    corpora.write_corpora()
    os.chdir(before)
    return folder


def build(case, cache="cache", **changes):
    config = GPTDatasetConfig(**(corpora.settings(case, cache) | changes))
    dataset_class = MockGPTDataset if config.mock else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset_class, case["sizes"], lambda: True, config).build()


@pytest.mark.parametrize("name", corpora.CASES)
def test_everything_equals_megatron(name, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    for attempt in ("built", "read from the cache"):
        found = [corpora.fingerprint(dataset) for dataset in build(corpora.CASES[name], str(tmp_path))]
        assert found == GOLDEN[name], attempt


def test_the_cases_are_what_their_names_say(folder, monkeypatch):
    monkeypatch.chdir(folder)
    tokens = int(build(corpora.CASES["part of an epoch"])[0].dataset.sequence_lengths[:144].sum())

    def plan(name):
        return plan_samples(tokens, corpora.CASES[name]["sizes"][0], 32, True, True)

    assert plan("part of an epoch").num_epochs == plan("exactly what one epoch has").num_epochs == 1
    assert plan("last epoch mostly used").num_epochs == 4
    assert not plan("last epoch mostly used").separate_final_epoch
    assert plan("last epoch apart").num_epochs == 3
    assert plan("last epoch apart").separate_final_epoch


def test_a_last_epoch_is_apart_below_four_fifths():
    """1,001 tokens are 100 samples of 10; the second epoch gives what is above 100."""
    assert plan_samples(1001, 179, 10, True, True) == (2, 200, 100)
    assert plan_samples(1001, 180, 10, True, True) == (2, 200, 200)


def walk(lengths, document_index, sequence_length, num_samples, extra):
    """Where samples begin, found by walking the stream a document at a time."""
    rows, document, offset = [(0, 0)], 0, 0
    for _ in range(num_samples):
        missing = sequence_length + extra
        while True:
            available = lengths[document_index[document]] - offset
            if missing <= available:
                offset += missing - extra
                break
            if document == len(document_index) - 1:
                offset = lengths[document_index[document]] - extra
                break
            missing -= available
            document, offset = document + 1, 0
        rows.append((document, offset))
    return rows


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda values: values[-1] > 0),
    sequence_length=st.integers(1, 9),
    extra=st.booleans(),
    drop_last=st.booleans(),
    num_samples=st.one_of(st.none(), st.integers(1, 30)),
)
def test_sample_index_equals_a_walk(lengths, sequence_length, extra, drop_last, num_samples):
    plan = plan_samples(sum(lengths), num_samples, sequence_length, extra, drop_last)
    document_index = np.tile(np.arange(len(lengths), dtype=np.int32), plan.num_epochs)
    found = build_sample_index(np.array(lengths, np.int32), document_index, sequence_length, plan.num_samples, extra)
    assert found.tolist() == [
        list(row) for row in walk(lengths, document_index, sequence_length, plan.num_samples, extra)
    ]
    assert plan.num_samples >= (num_samples or 0)
    if plan.num_epochs > 1:
        assert (plan.num_epochs - 1) * sum(lengths) < num_samples * sequence_length + extra, "an epoch too many"


def test_samples_are_the_stream_of_tokens(folder, monkeypatch):
    """Unshuffled, the samples of an epoch are its documents, cut; each label is the next token."""
    monkeypatch.chdir(folder)
    dataset = build(corpora.CASES["part of an epoch"])[0]
    stream = np.concatenate([dataset.dataset[int(document)] for document in dataset.document_index])
    seen = set()
    for position in range(len(dataset)):
        begin = 32 * int(dataset.shuffle_index[position])
        item = dataset[position]
        assert item["tokens"].tolist() == stream[begin : begin + 32].tolist()
        assert item["labels"].tolist() == stream[begin + 1 : begin + 33].tolist()
        seen.add(begin)
    assert len(seen) == len(dataset) == (len(stream) - 1) // 32


def test_items_have_a_mask_only_if_asked(folder, monkeypatch):
    monkeypatch.chdir(folder)
    case = corpora.CASES["part of an epoch"]
    plain = {
        "tokens": (torch.int64, (32,)),
        "labels": (torch.int64, (32,)),
        "loss_mask": (torch.float32, (32,)),
        "position_ids": (torch.int64, (32,)),
    }
    documents = {"document_starts": (torch.int64, (32,))}
    mask = {"attention_mask": (torch.bool, (1, 32, 32))}

    def contents(**changes):
        item = build(case, **({"create_attention_mask": False} | changes))[0][0]
        return {key: (value.dtype, tuple(value.shape)) for key, value in item.items()}

    assert GPTDatasetConfig.create_attention_mask is False
    assert contents() == plain
    assert contents(reset_attention_mask=True) == plain | documents
    assert contents(inter_document_masking=True) == plain | documents
    assert contents(create_attention_mask=True) == plain | mask
    assert contents(create_attention_mask=True, reset_attention_mask=True) == plain | documents | mask


@pytest.mark.parametrize("split", [0, 1])
def test_documents_of_the_file(folder, monkeypatch, split, tmp_path):
    """inter_document_masking divides where the documents of the file do, whatever tokens end them.

    Mutations: starts of each part's own tokens only (padding would begin at 0), or counted in the document.
    """
    monkeypatch.chdir(folder)
    case = corpora.CASES["whole epoch, last validation sample padded"]
    dataset = build(case, str(tmp_path), inter_document_masking=True)[split]
    lengths = [int(dataset.dataset.sequence_lengths[document]) for document in dataset.document_index]
    ends = np.cumsum(lengths)
    several = 0
    for position in range(len(dataset)):
        item = dataset[position]
        begin = 32 * int(dataset.shuffle_index[position])
        document = np.minimum(np.searchsorted(ends, begin + np.arange(32), side="right"), len(ends) - 1)
        starts = np.searchsorted(document, document, side="left")
        assert item["document_starts"].tolist() == starts.tolist()
        assert item["position_ids"].tolist() == (np.arange(32) - starts).tolist()
        several += starts[-1] > 0
    assert several > 0


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_masks_and_positions_against_their_definition(tokens):
    result = get_ltor_masks_and_position_ids(torch.tensor(tokens), 0, True, True, True, True)
    document = [tokens[:position].count(0) for position in range(len(tokens))]
    for i, token in enumerate(tokens):
        assert result["loss_mask"][i] == (token != 0)
        assert result["position_ids"][i] == i - document.index(document[i])
        for j in range(len(tokens)):
            allowed = j <= i and document[i] == document[j]
            assert bool(result["attention_mask"][0, i, j]) == (not allowed)
    assert result["document_starts"].tolist() == [document.index(number) for number in document]
    plain = get_ltor_masks_and_position_ids(torch.tensor(tokens), 0, False, False, False, False)
    assert not {"attention_mask", "document_starts"} & set(plain)
    assert plain["loss_mask"].all()
    assert plain["position_ids"].tolist() == list(range(len(tokens)))


PADDED = corpora.CASES["whole epoch, last validation sample padded"]


@pytest.mark.parametrize("pad", [-1, None, corpora.EOD])
@pytest.mark.filterwarnings("ignore:The tokenizer's pad id")
def test_padding_is_masked_and_real_ends_are_not(folder, monkeypatch, pad, tmp_path):
    """A pad id equal to the end-of-document id must not mask real ends (they would never be learned)."""
    monkeypatch.chdir(folder)
    valid = build(PADDED, str(tmp_path), tokenizer=corpora.PlainTokenizer(pad))[1]
    num_tokens = int(valid.dataset.sequence_lengths[valid.indices].sum())
    padded_samples, ends = 0, 0
    for position in range(len(valid)):
        item = valid[position]
        is_last = int(valid.shuffle_index[position]) == len(valid) - 1
        real = num_tokens - 1 - 32 * (len(valid) - 1) if is_last else 32
        assert 0 < real <= 32
        assert item["loss_mask"].tolist() == [1.0] * real + [0.0] * (32 - real)
        assert item["labels"][real:].tolist() == [0] * (32 - real)
        assert item["tokens"].min() >= 0
        padded_samples += real < 32
        ends += int((item["labels"][:real] == corpora.EOD).sum())
    assert padded_samples == 1
    assert ends > 10


@pytest.mark.filterwarnings("ignore:The tokenizer's pad id")
def test_ambiguous_pad_ids_can_be_asked_for(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    tokenizer = corpora.PlainTokenizer(pad=corpora.EOD)
    train = build(PADDED, str(tmp_path), tokenizer=tokenizer, allow_ambiguous_pad_tokens=True)[0]
    for position in range(20):
        item = train[position]
        assert torch.equal(item["loss_mask"] == 0.0, item["labels"] == corpora.EOD)


def test_a_pad_id_of_its_own_is_masked_wherever_it_is(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    plain = build(PADDED, str(tmp_path))[0][3]
    pad = int(plain["labels"][5])
    item = build(PADDED, str(tmp_path), tokenizer=corpora.PlainTokenizer(pad))[0][3]
    assert torch.equal(item["loss_mask"] == 0.0, plain["labels"] == pad)
    assert (item["labels"][plain["labels"] == pad] == 0).all()


def test_the_sample_that_fills_a_batch_counts_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    item = build(corpora.CASES["part of an epoch"])[0][None]
    assert item["loss_mask"].sum() == 0
    assert item["tokens"].shape == (32,)


def test_a_small_corpus_has_no_validation_or_test_data(folder, monkeypatch, capsys):
    """Said in one line each; without any training data there is nothing to do. Mutation: refuse all alike."""
    monkeypatch.chdir(folder)
    case = {"sizes": [10, 10, 10], "config": {"sequence_length": 8, "blend": (["c"], None), "split": "969,30,1"}}
    train, valid, test = build(case)
    assert (len(train) >= 10, len(valid) >= 10, test) == (True, True, None)
    note = "note: no test data from c: too few documents for a share (--split '969,30,1')\n"
    assert capsys.readouterr().out == note
    assert build(case | {"sizes": [10, 0, 0]})[2] is None
    assert capsys.readouterr().out == "", "not wanted, not missed"
    case["config"]["split"] = "998,1,1"
    assert [dataset is None for dataset in build(case)] == [False, True, True]
    assert capsys.readouterr().out.count("\n") == 2
    case["config"]["split"] = "1,999"
    with pytest.raises(ConfigError, match=r"train split of c is empty: its 25 documents"):
        build(case)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 1.0], None])
def test_a_blend_goes_without_the_part_that_has_no_documents(folder, monkeypatch, tmp_path, capsys, weights):
    """The others take its share. Mutation: keep its weight, so that they give too few samples."""
    monkeypatch.chdir(folder)
    blend = {"sequence_length": 8, "blend": (["a", "b", "c"], weights), "split": "97,2,1"}
    train, valid, test = build({"sizes": [50, 40, 20], "config": blend}, str(tmp_path))
    assert len(train.datasets) == len(valid.datasets) == 3
    assert [dataset.dataset_path for dataset in test.datasets] == ["a", "b"]
    assert len(test) >= (20 if weights else 1)
    if weights:
        assert test.weights == normalize([1.0, 2.0])
        assert np.bincount(test.dataset_index[:18]).tolist() == [6, 12]
    assert capsys.readouterr().out.startswith("note: no test data from c: ")
    few = {"sequence_length": 8, "blend": (["c", "c"], weights and weights[:2]), "split": "969,30,1"}
    assert build({"sizes": [50, 4, 2], "config": few}, str(tmp_path))[2] is None
    assert "note: no test data from c, c: " in capsys.readouterr().out


class TestCache:
    """Indices on disk."""

    CASE = corpora.CASES["last epoch apart"]

    def test_built_once_then_read(self, folder, monkeypatch, tmp_path):
        monkeypatch.chdir(folder)
        first = build(self.CASE, str(tmp_path))
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        monkeypatch.setattr(gpt_dataset_module, "build_gpt_indices", None)
        second = build(self.CASE, str(tmp_path))
        assert np.array_equal(first[0].sample_index, second[0].sample_index)

    def test_beside_the_data_by_default(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        corpora.write_corpora()
        build(self.CASE, None)
        assert len(list((tmp_path / "a" / "cache" / "GPTDataset_indices").glob("*-GPTDataset-train-*.npy"))) == 3

    @pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
    @pytest.mark.parametrize("damage", ["cut", "empty", "junk", "missing"])
    def test_damaged_files_are_built_again(self, folder, monkeypatch, tmp_path, name, damage):
        monkeypatch.chdir(folder)
        good = build(self.CASE, str(tmp_path))[0][5]
        path = next(tmp_path.glob(f"*-train-{name}.npy"))
        if damage == "missing":
            path.unlink()
        else:
            content = path.read_bytes()
            path.write_bytes({"cut": content[:-40], "empty": b"", "junk": b"\x00" * len(content)}[damage])
        assert torch.equal(build(self.CASE, str(tmp_path))[0][5]["tokens"], good["tokens"])

    def test_data_written_again_is_noticed(self, tmp_path, monkeypatch):
        """Megatron would read the old order into the new documents, silently."""
        monkeypatch.chdir(tmp_path)
        corpora.write_corpora()
        build(self.CASE)
        builder = IndexedDatasetBuilder("a.bin", np.uint16)
        for length in range(1, 181):
            builder.add_document(np.full(length, 9), [length])
        builder.finalize("a.idx")
        stale = build(self.CASE)
        fresh = build(self.CASE, "another_cache")
        for old, new in zip(stale, fresh, strict=True):
            assert np.array_equal(old.sample_index, new.sample_index)
            assert np.array_equal(old.document_index, new.document_index)

    def test_one_token_more_is_noticed(self, tmp_path, monkeypatch):
        """The number of samples stays the same, so only the lengths of the documents tell."""
        monkeypatch.chdir(tmp_path)
        corpora.write_corpora()
        before = build(self.CASE)[0]
        documents = [list(tokens) for tokens in before.dataset[:]]
        documents[0].append(1)
        builder = IndexedDatasetBuilder("a.bin", np.uint16)
        for tokens in documents:
            builder.add_document(tokens, [len(tokens)])
        builder.finalize("a.idx")
        stale, fresh = build(self.CASE)[0], build(self.CASE, "another_cache")[0]
        assert len(stale) == len(before)
        assert np.array_equal(stale.sample_index, fresh.sample_index)

    def test_pickles_are_not_read(self, folder, monkeypatch, tmp_path):
        monkeypatch.chdir(folder)
        build(self.CASE, str(tmp_path))
        path = next(tmp_path.glob("*-train-sample_index.npy"))

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
        build(self.CASE, str(tmp_path))
        assert not (tmp_path / "exploded").exists()

    def test_a_folder_that_cannot_be_made(self, folder, monkeypatch, tmp_path, caplog):
        monkeypatch.chdir(folder)
        (tmp_path / "file").write_text("")
        datasets = build(self.CASE, str(tmp_path / "file" / "cache"))
        assert len(datasets[0]) >= 600
        assert "--data-cache-path" in caplog.text

    def test_one_builds_while_the_others_wait(self, tmp_path):
        builds = []

        def slow_build():
            builds.append(1)
            time.sleep(0.2)
            return [np.arange(5)]

        def run(results):
            results.append(
                load_or_build(str(tmp_path), "base", ["x"], "text", slow_build, lambda arrays: True)[0].sum()
            )

        results: list[int] = []
        threads = [threading.Thread(target=run, args=(results,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [10] * 4
        assert len(builds) == 1

    def test_a_killed_build_leaves_nothing_that_looks_finished(self, tmp_path):
        def killed():
            yield np.arange(5)
            raise KeyboardInterrupt

        class Arrays(list):
            def __iter__(self):
                return killed()

        with pytest.raises(KeyboardInterrupt):
            load_or_build(str(tmp_path), "base", ["x", "y"], "text", lambda: Arrays([0, 0]), lambda arrays: True)
        again = load_or_build(str(tmp_path), "base", ["x", "y"], "t", lambda: [np.ones(1)] * 2, lambda arrays: True)
        assert [array.tolist() for array in again] == [[1.0], [1.0]]
