"""scripts/quickstart.sh from nothing to a sample of text, shortened, and once more (with --full-matrix)."""

import os
import subprocess

import pytest

from tests.e2e.commands import REPOSITORY, environment, training_metrics

pytestmark = pytest.mark.e2e
SHORT = ["--num-layers", "1", "--hidden-size", "64", "--ffn-hidden-size", "128", "--seq-length", "64"]
SHORT += ["--eval-iters", "1", "--eval-interval", "4", "--log-interval", "1", "--num-workers", "0"]


def quickstart(folder, *arguments: str) -> str:
    """Run the script in `folder` with the Python that runs this test; returns what it printed."""
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", *SHORT, *arguments],
        cwd=REPOSITORY,
        env={**environment(VENV="active", RUN=str(folder)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_quickstart_trains_and_reports(tmp_path):
    """All its files are there, and the loss falls."""
    output = quickstart(tmp_path, "--train-iters", "8", "--save-interval", "8")
    for name in ("corpus.jsonl", "tokenizer.model", "corpus_text_document.idx", "loss.png", "metrics.jsonl"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert os.listdir(tmp_path / "tensorboard")
    assert "held-out loss: " in output
    assert "unigram entropy of the corpus: " in output
    assert "What to try next" in output
    metrics = training_metrics(tmp_path / "metrics.jsonl", "lm_loss")
    assert metrics[-1][1] < metrics[0][1]


@pytest.mark.full
def test_quickstart_resumes(tmp_path):
    """The second call goes on where the first one stopped, on the same corpus."""
    quickstart(tmp_path, "--train-iters", "8", "--save-interval", "8")
    output = quickstart(tmp_path, "--train-iters", "10", "--override-opt_param-scheduler")
    assert "successfully loaded checkpoint" in output
    assert [entry[0] for entry in training_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))
