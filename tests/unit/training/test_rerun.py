"""--rerun-iteration: the numbers of the run once more, and where they stop being numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.training import rerun
from megatron_lite.transformer.mlp import MLP
from tests.unit.training.test_loop import MOCK, lines, run

WORDS = [*MOCK, "--num-layers", "2", "--train-iters", "8", "--global-batch-size", "4", "--hidden-dropout", "0.1"]


def report(folder: Path, iteration: int) -> dict[str, Any]:
    return json.loads((folder / f"rerun_{iteration:07d}_rank0.json").read_text())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The command line of a run with checkpoints at 3, 6 and 8, and metrics in m.jsonl."""
    words = [*WORDS, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "3"]
    words += ["--eval-interval", "2", "--eval-iters", "1", "--log-interval", "1"]
    words += ["--metrics-jsonl", str(tmp_path / "m.jsonl")]
    run(monkeypatch, *words)
    return words


@pytest.mark.parametrize("iteration", [pytest.param(2, marks=pytest.mark.full), 7])
def test_the_numbers_are_those_of_the_run(trained, monkeypatch, tmp_path, capsys, iteration) -> None:  # type: ignore[no-untyped-def]
    """From the checkpoint before (or the start), bit for bit, with dropout; and the run's files stay as they are.

    Mutations: the checkpoint of the iteration itself; a step short; random numbers of the pass before.
    """
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(monkeypatch, *trained, "--rerun-iteration", str(iteration))
    printed = capsys.readouterr().out
    assert "the passes agree bit for bit" in printed
    assert "everything is finite on all ranks" in printed
    seen = report(tmp_path, iteration)
    recorded = next(one for one in lines(tmp_path / "m.jsonl") if one["iteration"] == iteration and "lm_loss" in one)
    for one in seen["passes"]:
        assert (one["loss"], one["grad_norm"]) == ([recorded["lm_loss"]], recorded["grad_norm"])
    assert seen["samples"] == [4 * iteration - 4, 4 * iteration - 1]
    assert [one["sample"] for one in seen["sequences"]] == list(range(4 * iteration - 4, 4 * iteration))
    assert sum(one["loss"] for one in seen["sequences"]) / 4 == pytest.approx(recorded["lm_loss"], rel=1e-6)
    norms = torch.tensor([one["gradient_norm"] for one in seen["parameters"]])
    assert norms.norm().item() == pytest.approx(recorded["grad_norm"], rel=1e-6)
    for way in ("forward", "backward"):
        assert any("layers.1.mlp.linear_fc2" in one["module"] for one in seen[way]), way
    assert before == {path: path.read_bytes() for path in before}


def test_the_first_module_with_bad_values_is_named(trained, monkeypatch, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    """Mutations: modules in the order of their names; a maximum that drops what is no number."""
    forward = MLP.forward
    count = []

    def broken(self: MLP, *inputs: Any) -> Any:
        count.append(1)
        output = forward(self, *inputs)
        return output * torch.nan if len(count) % 2 == 0 else output  # of the second layer

    monkeypatch.setattr(MLP, "forward", broken)
    run(monkeypatch, *trained, "--rerun-iteration", "4")
    assert "rank 0: the output of decoder.layers.1.mlp holds nan, and that of no module before it" in (
        capsys.readouterr().out
    )
    seen = report(tmp_path, 4)
    assert seen["repeats"]
    assert seen["passes"][0]["loss"] == ["nan"]


def test_passes_that_differ_are_an_error(trained, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Here other random numbers stand for a machine that computes something else."""
    monkeypatch.setattr(rerun, "set_rng_state", lambda streams: None)
    with pytest.raises(FloatingPointError, match="iteration 5 gives other numbers each time"):
        run(monkeypatch, *trained, "--rerun-iteration", "5")
    assert not report(tmp_path, 5)["repeats"]
