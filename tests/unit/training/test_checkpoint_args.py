"""--use-checkpoint-args: command line over checkpoint over default, for what describes model and tokenizer."""

from pathlib import Path

import pytest

from megatron_lite.arguments import parse_args, read_settings
from megatron_lite.checkpoint import CheckpointError
from tests.unit.training.test_loop import MOCK, lines, run

MODEL = [
    *(
        "--num-layers",
        "2",
        "--ffn-hidden-size",
        "24",
        "--swiglu",
        "--normalization",
        "RMSNorm",
        "--disable-bias-linear",
    ),
    *("--position-embedding-type", "rope", "--rotary-base", "5000", "--window-size", "7,0", "--no-rope-freq", "2"),
    *("--group-query-attention", "--num-query-groups", "1", "--untie-embeddings-and-output-weights"),
]
# What the checkpoint does not decide.
REST = ["--seq-length", "16", "--micro-batch-size", "2", "--lr", "1e-3", "--num-workers", "0", *MOCK]
REST += ["--eval-iters", "0", "--log-interval", "1"]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Checkpoints of iterations 2 and 4."""
    words = [*MODEL, *MOCK, "--eval-iters", "0", "--log-interval", "1", "--train-iters", "4", "--save-interval", "2"]
    run(monkeypatch, *words, "--save", str(tmp_path / "saved"), "--metrics-jsonl", str(tmp_path / "whole.jsonl"))
    return tmp_path / "saved"


def test_a_run_goes_on_without_a_word_of_its_model(folder: Path, monkeypatch, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """The same losses, and no setting that differs. Mutation: a shape, the window or the tokenizer left out."""
    from pretrain_gpt import pretrain

    words = [*REST, "--use-checkpoint-args", "--load", str(folder), "--ckpt-step", "2", "--train-iters", "4"]
    pretrain(parse_args([*words, "--metrics-jsonl", str(tmp_path / "resumed.jsonl")]))
    assert "WARNING" not in capsys.readouterr().out
    whole, resumed = (lines(tmp_path / f"{name}.jsonl") for name in ("whole", "resumed"))
    assert [one["lm_loss"] for one in resumed] == [one["lm_loss"] for one in whole[2:]]


def test_the_command_line_wins_and_says_so(folder: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """A setting that gives the weights another meaning is taken, with a warning. Mutation: the checkpoint wins."""
    from pretrain_gpt import pretrain

    words = [*REST, "--use-checkpoint-args", "--load", str(folder), "--train-iters", "5", "--rotary-base", "7000"]
    words += ["--override-opt_param-scheduler"]
    settings = read_settings(words).values
    assert settings["rotary_base"][0] == 7000
    assert settings["ffn_hidden_size"] == (24, f"the checkpoint {folder / 'iter_0000004'}")
    assert settings["window_size"][0] == (7, 0)
    assert "lr" in settings
    assert "hidden_dropout" not in settings, "describes no model"
    pretrain(parse_args(words))
    assert "WARNING: rotary_base is 7000.0, but the weights were trained with 5000.0." in capsys.readouterr().out


def test_without_a_checkpoint_nothing_is_taken(tmp_path: Path) -> None:
    assert "num_layers" not in read_settings(["--use-checkpoint-args", "--load", str(tmp_path)]).values


def test_a_checkpoint_that_says_nonsense_is_refused(folder: Path) -> None:
    common = folder / "iter_0000004" / "common.json"
    common.write_text(common.read_text().replace('"num_layers": 2', '"num_layers": "many"'))
    with pytest.raises(CheckpointError, match="num_layers is 'many', but must be a whole number"):
        read_settings(["--use-checkpoint-args", "--load", str(folder)])
