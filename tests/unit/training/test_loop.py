"""The loop as pretrain_gpt.py runs it, in this process: what is written at its end, skipped iterations, evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.arguments import parse_args
from megatron_lite.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_lite.optimizer import MegatronOptimizer
from megatron_lite.training import setup
from megatron_lite.training import step as training_step
from megatron_lite.training.hooks import Hook
from pretrain_gpt import pretrain

TINY = [
    *("--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"),
    *("--vocab-size", "64", "--micro-batch-size", "2", "--tokenizer-type", "NullTokenizer", "--lr", "1e-3"),
    *("--num-workers", "0"),
]
MOCK = ["--mock-data"]


def run(monkeypatch: pytest.MonkeyPatch, *line: str) -> None:
    """One process trains to the end."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    pretrain(parse_args([*TINY, *line]))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def progress(folder: Path, iteration: int) -> dict[str, int]:
    return json.loads((folder / f"iter_{iteration:07d}" / "common.json").read_text())["extra"]["progress"]


def test_a_short_last_interval_is_written_and_logged(monkeypatch, tmp_path, capsys):
    """Nothing else would read it: no evaluation, no checkpoint. Mutation: leave out the last log() of train()."""
    path = tmp_path / "m.jsonl"
    words = ["--train-iters", "5", "--log-interval", "3", "--eval-iters", "0", "--metrics-jsonl", str(path)]
    run(monkeypatch, *MOCK, *words)
    assert [entry["iteration"] for entry in lines(path)] == [1, 2, 3, 4, 5]
    assert "iteration        5/       5" in capsys.readouterr().out


class Witness(Hook):
    """Remembers when it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def before_step(self, iteration: int) -> None:
        self.calls.append(("before", iteration))

    def after_step(self, iteration: int) -> None:
        self.calls.append(("after", iteration))


def test_a_skipped_iteration_reads_its_data_and_calls_its_hooks(monkeypatch, tmp_path):
    """The schedule and the samples move on as if it had been trained; its own number is missing from the metrics."""
    witness = Witness()
    monkeypatch.setattr(setup, "build_hooks", lambda *_: [witness])
    words = [*MOCK, "--train-iters", "4", "--log-interval", "1", "--eval-iters", "0"]
    run(monkeypatch, *words, "--metrics-jsonl", str(tmp_path / "all.jsonl"))
    witness.calls.clear()
    run(monkeypatch, *words, "--metrics-jsonl", str(tmp_path / "some.jsonl"), "--iterations-to-skip", "2")
    whole, some = lines(tmp_path / "all.jsonl"), lines(tmp_path / "some.jsonl")
    assert [entry["iteration"] for entry in some] == [1, 3, 4]
    for name in ("learning_rate", "consumed_samples"):
        assert [entry[name] for entry in some] == [whole[n][name] for n in (0, 2, 3)]
    assert some[0]["lm_loss"] == whole[0]["lm_loss"]
    assert some[1]["lm_loss"] != whole[2]["lm_loss"]
    assert witness.calls == [(when, n) for n in (1, 2, 3, 4) for when in ("before", "after")]


def test_the_validation_position_counts_what_was_evaluated(monkeypatch, tmp_path):
    """A global batch of 5 is rounded down to 2 x 2. Mutation: count the 5; a resumed run then skips samples."""
    batch = ["--global-batch-size", "5", "--decrease-batch-size-if-needed", "--eval-iters", "3", "--eval-interval", "1"]
    saving = ["--save", str(tmp_path), "--save-interval", "2"]
    run(monkeypatch, *MOCK, *batch, *saving, "--train-iters", "2")
    assert progress(tmp_path, 2) == {"iteration": 2, "consumed_train_samples": 8, "consumed_valid_samples": 24}


def test_the_batch_grows_at_token_counts_and_the_rate_lasts_as_long_as_the_run(monkeypatch, tmp_path):
    """Thresholds are tokens, 16 a sample here. Mutation: take them for samples; decay over 5 x 2 samples."""
    schedule = ["--step-batch-size-schedule", "0:2 64:4", "--train-iters", "5", "--eval-iters", "0"]
    run(monkeypatch, *MOCK, *schedule, "--log-interval", "1", "--metrics-jsonl", str(tmp_path / "m.jsonl"))
    found = lines(tmp_path / "m.jsonl")
    assert [entry["consumed_samples"] for entry in found] == [2, 4, 8, 12, 16]
    rates = [1e-3 * (1 - before / 16) for before in (0, 2, 4, 8, 12)]
    assert [entry["learning_rate"] for entry in found] == pytest.approx(rates)


@pytest.fixture
def blend(tmp_path) -> list[str]:
    """Two small corpora: a blend has exactly as many samples as a run asks for."""
    generator = np.random.default_rng(0)
    words = ["--data-path"]
    for name in ("x", "y"):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for _ in range(200):
            builder.add_document(torch.from_numpy(generator.integers(0, 64, 50)), [50])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        words += ["1", str(tmp_path / name)]
    return [*words, "--split", "80,10,10"]


def test_a_resumed_run_may_evaluate_less_often_or_evaluate_alone(monkeypatch, tmp_path, blend, capsys):
    """More validation samples are behind it than it would have read from the start, yet there are some left.

    Mutation: ask for the validation samples of a run from the start; "All 12 samples of the dataset are consumed".
    """
    words = [*blend, "--eval-iters", "2", "--load", str(tmp_path / "ckpt")]
    training = ["--train-iters", "6", "--save", str(tmp_path / "ckpt"), "--save-interval", "3"]
    run(monkeypatch, *words, *training, "--eval-interval", "1")
    run(monkeypatch, *words, *training, "--eval-interval", "3", "--ckpt-step", "3")
    assert progress(tmp_path / "ckpt", 6)["consumed_valid_samples"] == 16
    capsys.readouterr()
    run(monkeypatch, *words, "--skip-train")
    printed = capsys.readouterr().out
    assert "validation loss at iteration 6 on validation set" in printed
    assert "validation loss at iteration 6 on test set" in printed


def test_evaluation_alone_needs_no_schedule(monkeypatch, tmp_path, capsys):
    """Neither a learning rate nor a length has to be made up. Mutation: build the scheduler nevertheless."""
    monkeypatch.setattr("tests.unit.training.test_loop.TINY", [w for w in TINY if w not in ("--lr", "1e-3")])
    run(monkeypatch, *MOCK, "--skip-train", "--eval-iters", "1")
    assert "validation loss at iteration 0 on validation set" in capsys.readouterr().out


@pytest.mark.parametrize(("level", "each", "evaluating"), [(0, 0, 0), (1, 1, 3), (2, 2, 3)])
def test_unused_memory_is_given_back(level, each, evaluating, monkeypatch):
    """As in Megatron-LM: after the backward pass of each of 2 steps, from level 2 on after the update too, and in each
    of 3 steps of evaluation (here on validation and on test data).

    Mutations: `>` for `>=`; leave evaluation out.
    """
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    words = ["--train-iters", "2", "--eval-iters", "3", "--empty-unused-memory-level", str(level)]
    run(monkeypatch, *MOCK, *words)
    assert len(calls) == 2 * each + 2 * evaluating


def test_unused_memory_is_given_back_before_the_update(monkeypatch):
    """There the gradients are, and no activations. Mutation: empty the cache before the backward pass, or behind."""
    order = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty"))
    step, finalize = MegatronOptimizer.step, training_step.finalize_model_grads
    monkeypatch.setattr(MegatronOptimizer, "step", lambda self: (order.append("step"), step(self))[1])
    monkeypatch.setattr(training_step, "finalize_model_grads", lambda *a: (order.append("finalize"), finalize(*a)))
    run(monkeypatch, *MOCK, "--train-iters", "1", "--eval-iters", "0", "--empty-unused-memory-level", "2")
    assert order == ["finalize", "empty", "step", "empty"]
