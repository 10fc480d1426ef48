"""A step whose loss is not a number: the run stops, goes on or goes back, and says which samples it was."""

from pathlib import Path

import pytest
import torch

from megatron_lite.training import train
from megatron_lite.training.non_finite import FILE
from tests.unit.training.test_loop import MOCK, lines, run

WORDS = [*MOCK, "--train-iters", "9", "--log-interval", "1", "--eval-iters", "0", "--global-batch-size", "4"]
SAVING = ["--save-interval", "3", "--hidden-dropout", "0.1"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever samples 16 to 19 are trained on, those of iteration 5, the loss is not a number."""
    original = train.train_step
    state = {"run": None}
    before = train.one_iteration

    def one_iteration(running: train.Run) -> None:
        state["run"] = running  # type: ignore[assignment]
        before(running)

    def train_step(chunks, optimizer, batches, **how):  # type: ignore[no-untyped-def]
        if state["run"].progress.iteration == 5:  # type: ignore[attr-defined]
            batches[0]["loss_mask"] = batches[0]["loss_mask"] * torch.nan
        return original(chunks, optimizer, batches, **how)

    monkeypatch.setattr(train, "one_iteration", one_iteration)
    monkeypatch.setattr(train, "train_step", train_step)


def losses(path: Path) -> dict[int, float]:
    return {entry["iteration"]: entry["lm_loss"] for entry in lines(path) if "lm_loss" in entry}


def written(folder: Path) -> list[tuple[int, list[int], str]]:
    return [(entry["iteration"], entry["samples"], entry["update"]) for entry in lines(folder / FILE)]


def test_it_stops_and_names_the_samples(broken: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The default. Mutation: samples counted from the end of the step."""
    words = [*WORDS, *SAVING, "--save", str(tmp_path)]
    with pytest.raises(FloatingPointError, match=r"iteration 5: lm loss nan.* from samples 16 to 20, was skipped"):
        run(monkeypatch, *words)
    assert written(tmp_path) == [(5, [16, 19], "skipped")]


def test_it_goes_on(broken: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """The update is left out; the rest is as if the iteration had been skipped. Mutation: weights that take part."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    run(monkeypatch, *WORDS, "--save", str(tmp_path / "a"), "--save-interval", "100", "--on-nan", "skip",
        "--metrics-jsonl", str(files[0]))  # fmt: skip
    assert "WARNING: iterations [5] gave no numbers" in capsys.readouterr().out
    run(monkeypatch, *WORDS, "--iterations-to-skip", "5", "--metrics-jsonl", str(files[1]))
    found, wanted = (losses(path) for path in files)
    assert found.pop(5) is None
    assert found == wanted
    assert written(tmp_path / "a") == [(5, [16, 19], "skipped")]


@pytest.mark.parametrize(("how", "interval"), [pytest.param([], "1", marks=pytest.mark.full), (["--async-save"], "4")])
def test_it_goes_back(broken: None, monkeypatch, tmp_path: Path, capsys, how, interval) -> None:  # type: ignore[no-untyped-def]
    """To iteration 3, whose checkpoint was the last, with every random stream; from there on without those samples.

    Found when metrics are read, perhaps iterations later. Mutations: data read from where they were; the optimizer's
    moments kept; the metrics file with both.
    """
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    words = [*WORDS, "--log-interval", interval, *SAVING]
    run(
        monkeypatch, *words, *how, "--save", str(tmp_path / "a"), "--on-nan", "rewind", "--metrics-jsonl", str(files[0])
    )
    assert "rewinding to the checkpoint of iteration 3" in capsys.readouterr().out
    run(
        monkeypatch,
        *words,
        "--iterations-to-skip",
        "5",
        "--save",
        str(tmp_path / "b"),
        "--metrics-jsonl",
        str(files[1]),
    )
    found, wanted = (losses(path) for path in files)
    assert found == wanted
    assert written(tmp_path / "a") == [(5, [16, 19], "skipped")]


def test_it_cannot_go_back_without_a_checkpoint(broken: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="no checkpoint yet to rewind to"):
        run(monkeypatch, *WORDS, "--save", str(tmp_path), "--save-interval", "100", "--on-nan", "rewind")
