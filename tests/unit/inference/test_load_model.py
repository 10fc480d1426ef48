"""A model rebuilt from nothing but its checkpoint, and the command that lets it write."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import CheckpointError, save_checkpoint
from megatron_lite.inference.load_model import load_model
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.tokenizers import TokenizerConfig
from megatron_lite.transformer.transformer_config import TransformerConfig
from tools import generate

LENGTH = 32


def save(root: Path, **changes: object) -> tuple[GPTModel, RunConfig]:
    """A checkpoint of a small random model, with settings as a tensor parallel run stores them."""
    torch.manual_seed(3)
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    shape |= {"swiglu": True, "init_method_std": 0.2, "window_size": (8, 0)} | changes
    gpt = GPTModelConfig(position_embedding_type="rope", max_position_embeddings=LENGTH)
    run = RunConfig(
        transformer=TransformerConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            tp_comm_overlap=True,
            transformer_impl="transformer_engine",
            **shape,
            hidden_dropout=0.1,
        ),
        gpt=gpt,
        tokenizer=TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
    )
    model = build_gpt_model(TransformerConfig(**shape), gpt, 257, LENGTH)
    save_checkpoint(root, 12, model, None, {}, config_dict=run.to_dict())
    return model, run


def logits(model: GPTModel) -> torch.Tensor:
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        return model(tokens, tokens)


def test_the_model_is_the_one_that_was_saved(tmp_path: Path) -> None:
    model, _ = save(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.iteration == 12
    assert loaded.tokenizer.vocab_size == loaded.model.vocab_size
    assert not loaded.model.training
    assert torch.equal(logits(loaded.model), logits(model.eval()))


def test_weights_are_cast_to_the_dtype_of_the_run(tmp_path: Path) -> None:
    save(tmp_path, bf16=True)
    loaded = load_model(tmp_path)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert logits(loaded.model).dtype == torch.bfloat16


def rewrite(root: Path, group: str, **changes: object) -> None:
    path = root / "iter_0000012" / "common.json"
    common = json.loads(path.read_text())
    common["config"].setdefault(group, {}).update(changes)
    path.write_text(json.dumps(common))


def test_a_checkpoint_cannot_ask_to_trust_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    rewrite(tmp_path, "tokenizer", trust_remote_code=True)
    seen: list[TokenizerConfig] = []

    def spy(config: TokenizerConfig) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_lite.inference.load_model.build_tokenizer", spy)
    with pytest.raises(KeyboardInterrupt):
        load_model(tmp_path, tokenizer_model="elsewhere")
    assert [(config.trust_remote_code, config.tokenizer_model) for config in seen] == [(False, "elsewhere")]


def test_settings_of_a_newer_version_are_left_out_and_broken_ones_named(tmp_path: Path) -> None:
    model, _ = save(tmp_path)
    rewrite(tmp_path, "transformer", a_new_field=3)
    assert torch.equal(logits(load_model(tmp_path).model), logits(model.eval()))
    rewrite(tmp_path, "transformer", num_layers="two")
    with pytest.raises(CheckpointError, match=r"transformer\.num_layers is 'two', but should be a whole number"):
        load_model(tmp_path)


def test_the_command_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    capsys.readouterr()
    words = ["--load", str(tmp_path), "--prompt", "ab", "--max-new-tokens", "6", "--seed", "4"]
    assert generate.main(words) == 0
    first = capsys.readouterr()
    assert first.out.startswith("ab")
    assert first.out.endswith("\n")
    assert "iteration 12" in first.err
    assert generate.main(words) == 0
    assert capsys.readouterr().out == first.out
    assert generate.main([*words, "--num-samples", "2"]) == 0
    twice = capsys.readouterr().out
    assert twice.startswith("--- sample 1 of 2 ---\n" + first.out + "--- sample 2 of 2 ---\nab")


def test_the_prompt_may_come_from_a_file_or_the_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    capsys.readouterr()
    (tmp_path / "prompt.txt").write_text("früh", encoding="utf-8")
    words = ["--load", str(tmp_path), "--max-new-tokens", "3", "--temperature", "0"]
    assert generate.main([*words, "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
    from_file = capsys.readouterr().out
    assert from_file.startswith("früh")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", (tmp_path / "prompt.txt").open(encoding="utf-8"))
        assert generate.main(words) == 0
    assert capsys.readouterr().out == from_file


def test_mistakes_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    capsys.readouterr()
    for words, complaint in (
        (["--load", str(tmp_path / "nowhere")], "There is no checkpoint in"),
        (["--load", str(tmp_path), "--ckpt-step", "5"], "There is no checkpoint of iteration 5"),
        (["--load", str(tmp_path), "--top-p", "7"], "top_p is 7.0"),
        (["--load", str(tmp_path), "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--load", str(tmp_path), "--num-samples", "-1"], "num_samples is -1"),
    ):
        assert generate.main([*words, "--prompt", "x"]) == 2
        written = capsys.readouterr()
        assert f"error: {complaint}" in written.err
        assert written.out == ""
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe")
    assert generate.main(["--load", str(tmp_path), "--prompt-file", str(tmp_path / "prompt.bin")]) == 2
    assert "prompt.bin is not text in UTF-8" in capsys.readouterr().err
    assert generate.main(["--load", str(tmp_path), "--prompt", "x" * LENGTH]) == 2
    assert "the prompt has 32 tokens" in capsys.readouterr().err
