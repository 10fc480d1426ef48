"""The picture of a run whose metrics hold what is not a number."""

import json
import sys
from pathlib import Path

import pytest

from tools import report_loss


def test_steps_without_a_number_are_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As null, and as the NaN of files of earlier versions. Mutation: leave None as it is."""
    pytest.importorskip("matplotlib")
    entries = [{"iteration": n, "lm_loss": 4.0 / n} for n in (1, 2, 3, 4)]
    entries[1]["lm_loss"] = None  # type: ignore[typeddict-item]
    entries[2]["lm_loss"] = float("nan")
    evaluation = {"iteration": 4, "validation_loss": None, "validation_ppl": None}
    metrics, picture = tmp_path / "m.jsonl", tmp_path / "loss.png"
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, evaluation]))
    monkeypatch.setattr(sys, "argv", ["report_loss.py", "--metrics", str(metrics), "--output", str(picture)])
    report_loss.main()
    out = capsys.readouterr().out
    assert "training loss: 4.000 at iteration 1, 1.000 at the end" in out
    assert "held-out loss: nan (perplexity nan)" in out
    assert picture.stat().st_size > 0
