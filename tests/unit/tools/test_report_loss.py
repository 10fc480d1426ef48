"""tools/report_loss.py: one run, and several in one picture."""

import json
from pathlib import Path

import pytest

from tools import report_loss


def metrics(path: Path, losses: list[float], held_out: float | None = None) -> str:
    """A file as --metrics-jsonl writes it."""
    entries = [{"iteration": number, "lm_loss": loss} for number, loss in enumerate(losses, start=1)]
    if held_out is not None:
        entries.append({"iteration": len(losses), "validation_loss": held_out})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_several_runs_are_named_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A curve each for training and held-out loss. Mutations: the last run alone; one label for all."""
    from matplotlib.figure import Figure

    drawn: list[list[str]] = []
    save = Figure.savefig

    def spy(figure: Figure, *words: object) -> None:
        drawn.append([str(text.get_text()) for text in figure.axes[0].get_legend().get_texts()])
        save(figure, *words)

    monkeypatch.setattr(Figure, "savefig", spy)
    one, two = metrics(tmp_path / "a" / "m.jsonl", [3.0, 2.0], 2.25), metrics(tmp_path / "b" / "m.jsonl", [3.5, 1.0])
    output = tmp_path / "pictures" / "both.png"
    report_loss.main(["--metrics", one, two, "--labels", "first", "second", "--output", str(output)])
    assert drawn == [["first, training", "first, held out", "second, training"]]
    assert output.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines() == [
        "first:",
        "training loss: 3.000 at iteration 1, 2.000 at the end",
        "held-out loss: 2.250 (perplexity 9.5)",
        "second:",
        "training loss: 3.500 at iteration 1, 1.000 at the end",
        f"picture: {output}",
    ]
    report_loss.main(["--metrics", one, "--output", str(output)])
    assert drawn[1:] == [["training", "held out"]]
    assert capsys.readouterr().out.startswith("training loss: 3.000 at iteration 1")


def test_mistakes_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: labels given to the first runs only."""
    one = metrics(tmp_path / "m.jsonl", [3.0])
    with pytest.raises(SystemExit):
        report_loss.main(["--metrics", one, one, "--labels", "first"])
    assert "--labels names 1, but there are 2 --metrics" in capsys.readouterr().err
    for path, complaint in ((metrics(tmp_path / "e.jsonl", []), "no training iterations"), ("none", "cannot be read")):
        with pytest.raises(SystemExit, match=complaint):
            report_loss.main(["--metrics", path])


def test_steps_without_a_number_are_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As null, and as the NaN of files of earlier versions. Mutation: leave None as it is."""
    pytest.importorskip("matplotlib")
    entries = [{"iteration": n, "lm_loss": 4.0 / n} for n in (1, 2, 3, 4)]
    entries[1]["lm_loss"] = None  # type: ignore[typeddict-item]
    entries[2]["lm_loss"] = float("nan")
    evaluation = {"iteration": 4, "validation_loss": None, "validation_ppl": None}
    path, picture = tmp_path / "m.jsonl", tmp_path / "loss.png"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, evaluation]))
    report_loss.main(["--metrics", str(path), "--output", str(picture)])
    out = capsys.readouterr().out
    assert "training loss: 4.000 at iteration 1, 1.000 at the end" in out
    assert "held-out loss: nan (perplexity nan)" in out
    assert picture.stat().st_size > 0


def test_runs_that_diverged_or_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutations: e to a loss of 1000; the last line read although it is cut."""
    path, picture = tmp_path / "m.jsonl", str(tmp_path / "loss.png")
    metrics(path, [3.0, 900.0], 1000.0)
    path.write_text(path.read_text() + '{"iteration": 3, "lm_')
    report_loss.main(["--metrics", str(path), "--output", picture])
    assert "held-out loss: 1000.000 (perplexity inf)" in capsys.readouterr().out
    for words, complaint in ((["--data-path", "nowhere"], "nowhere"), (["--output", str(tmp_path / "o.xyz")], "xyz")):
        with pytest.raises(SystemExit, match=complaint):
            report_loss.main(["--metrics", str(path), *words])
    path.write_text("[1]\n")
    with pytest.raises(SystemExit, match="cannot be read as a file of --metrics-jsonl"):
        report_loss.main(["--metrics", str(path)])
