"""--load-hf: a run that starts from the weights of a Hugging Face folder, and continues from its own checkpoints."""

from pathlib import Path

import pytest
import torch

from megatron_lite.arguments import parse_args
from megatron_lite.errors import ConfigError
from pretrain_gpt import pretrain
from tools import convert_checkpoint

tiny_models = pytest.importorskip("tests.unit.checkpoint.huggingface.tiny_models", reason="needs transformers")

LLAMA = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "40", "--num-attention-heads", "4"),
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--position-embedding-type", "rope", "--seq-length", "16", "--micro-batch-size", "2", "--mock-data"),
    *("--num-workers", "0", "--tokenizer-type", "NullTokenizer", "--eval-iters", "0", "--log-interval", "1"),
]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*line: str) -> None:
    pretrain(parse_args([*LLAMA, *line]))


def test_a_run_starts_from_a_folder_and_goes_on_from_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of 0 the first checkpoint holds the folder's weights to the bit; the second run resumes.

    Mutations: weights loaded before the initial ones are drawn; the folder read again by a run that has a checkpoint;
    masters kept apart from the weights.
    """
    from safetensors.torch import load_file

    theirs, ours = tmp_path / "theirs", str(tmp_path / "ours")
    tiny_models.save("llama2", theirs)
    still = ["--vocab-size", "61", "--lr", "0", "--min-lr", "0", "--load-hf", str(theirs)]
    saved = ["--save", ours, "--load", ours, "--save-interval", "1", "--override-opt_param-scheduler"]
    run(*still, *saved, "--train-iters", "1")
    assert "loaded the weights of the Hugging Face model" in capsys.readouterr().out
    words = ["--from", "megatron_lite", "--to", "hf", "--load", ours, "--save", str(tmp_path / "again")]
    assert convert_checkpoint.main(words) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    capsys.readouterr()
    run(*still, *saved, "--train-iters", "2")
    out = capsys.readouterr().out
    assert "loaded the weights of the Hugging Face model" not in out
    assert "successfully loaded checkpoint" in out


def test_the_vocabulary_of_the_tokenizer_is_compared(tmp_path: Path) -> None:
    """It is known only when the tokenizer is. Mutation: compared only where --vocab-size is given."""
    tiny_models.save("llama2", tmp_path)
    line = ["--lr", "1e-3", "--train-iters", "1", "--tokenizer-type", "ByteLevelTokenizer", "--load-hf", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"vocab_size is \d+, but .* says 61: write --vocab-size 61"):
        run(*line)


def test_upcycling_reads_checkpoints_of_ours(tmp_path: Path) -> None:
    """Mutation: the flag of upcycling without effect."""
    tiny_models.save("llama2", tmp_path)
    line = ["--lr", "1e-3", "--train-iters", "1", "--vocab-size", "61", "--load-hf", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"moe_use_upcycling.*convert_checkpoint"):
        run(*line, "--num-experts", "4", "--moe-use-upcycling", "--pretrained-checkpoint", "x")
