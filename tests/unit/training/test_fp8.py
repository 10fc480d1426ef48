"""A short run in fp8, as pretrain_gpt.py makes it: what start-up says, and losses near those of bf16."""

import json
from pathlib import Path

import pytest

from megatron_lite.arguments import parse_args
from pretrain_gpt import pretrain

SMALL = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32", "--swiglu"),
    *("--vocab-size", "64", "--micro-batch-size", "4", "--tokenizer-type", "NullTokenizer", "--lr", "3e-3"),
    *("--num-workers", "0", "--mock-data", "--train-iters", "15", "--eval-iters", "0", "--bf16"),
]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_losses_are_near_those_of_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: no scale in any product, or the gradient of the weight zero."""

    def losses(*words: str) -> list[float]:
        path = tmp_path / f"{len(words)}-{words[-1] if words else 'bf16'}.jsonl"
        pretrain(parse_args([*SMALL, *words, "--metrics-jsonl", str(path)]))
        return [json.loads(line)["lm_loss"] for line in path.read_text().splitlines()]

    plain = losses()
    assert "fp8" not in capsys.readouterr().out
    assert plain[-1] < plain[0] - 1.0
    for words, said in (
        (("--fp8-format", "hybrid"), "linear layers: fp8 hybrid tensorwise (emulated)"),
        (("--fp8-format", "e4m3", "--fp8-recipe", "rowwise"), "linear layers: fp8 e4m3 rowwise (emulated)"),
    ):
        found = losses(*words)
        out = capsys.readouterr().out
        assert said in out
        assert "not in fp8" not in out
        assert found != plain
        assert found == pytest.approx(plain, rel=0.01), (words, found, plain)


@pytest.mark.full
def test_losses_with_experts_are_near_those_of_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: no scale in either product of experts."""
    experts = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "64", "--moe-grouped-gemm"]

    def losses(*words: str) -> list[float]:
        path = tmp_path / f"{len(words)}.jsonl"
        pretrain(parse_args([*SMALL, *experts, *words, "--metrics-jsonl", str(path)]))
        return [json.loads(line)["lm_loss"] for line in path.read_text().splitlines()]

    plain, found = losses(), losses("--fp8-format", "hybrid")
    out = capsys.readouterr().out
    assert "fp8 hybrid tensorwise (emulated), routed experts e4m3 rowwise (emulated), the gradients of their" in out
    assert "note: --fp8-format hybrid: routed experts have a scale for each row and e4m3 for gradients too" in out
    assert plain[-1] < plain[0] - 1.0
    assert found != plain
    assert found == pytest.approx(plain, rel=0.02)


def test_layers_that_stay_out_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: a line for each layer."""
    pretrain(parse_args([*SMALL, "--train-iters", "1", "--ffn-hidden-size", "40", "--fp8-format", "hybrid"]))
    out = capsys.readouterr().out
    assert out.count("note: --fp8-format: mlp.linear_fc2 (64 x 40) is not in fp8") == 1
    assert "scales are those of the tensor at hand (--fp8-recipe tensorwise), where Megatron-LM's default" in out
