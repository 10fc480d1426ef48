"""configs/: each preset is valid, short, and builds a model with the published number of parameters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.models.gpt.parameter_count import count_parameters
from megatron_lite.tokenizers.null_tokenizer import NullTokenizer
from megatron_lite.training.setup import model_of

CONFIGS = Path(__file__).parents[2] / "configs"


def gpt_parameters(layers: int, hidden: int, vocabulary: int, positions: int) -> int:
    """Parameters of a GPT-2 or GPT-3: tied embeddings, biases everywhere, an MLP of 4 h.

    A layer has 12 h^2 weights, 9 h biases (3 h + h + 4 h + h) and 4 h in its norms; the last norm has 2 h.
    """
    return (vocabulary + positions) * hidden + layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden


# Published counts; vocabulary entries that exist only as padding are not counted.
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt3_175b": gpt_parameters(96, 12288, 50257, 2048),
    "llama3_8b": 8_030_261_248,
    "llama3_8b_128k": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "qwen3_30b_a3b": 30_532_122_624,
}
WORLDS = {
    "quickstart": 2,
    "quickstart_moe": 2,
    "mixtral_8x7b": 64,
    "mixtral_8x22b": 256,
    "qwen3_30b_a3b": 32,
    "gpt2_124m": 1,
    "gpt3_175b": 1024,
    "llama3_8b": 8,
    "llama3_8b_128k": 64,
    "llama3_70b": 256,
    "qwen3_8b": 8,
}


def load(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> RunConfig:
    """The run a preset describes, on the number of ranks it is meant for."""
    monkeypatch.setenv("WORLD_SIZE", str(WORLDS[name]))
    data = ["--mock-data", "--tokenizer-type", "NullTokenizer"]
    return parse_args(["--config", str(CONFIGS / f"{name}.yaml"), *data, *words])


def build_whole_model(run: RunConfig) -> GPTModel:
    """The model in one piece, without storage."""
    transformer = replace(run.transformer, context_parallel_size=1, expert_model_parallel_size=1)
    with torch.device("meta"):
        return build_gpt_model(transformer, run.gpt, run.gpt.vocab_size or 0, run.data.seq_length or 0)


def test_there_is_a_preset_for_each_entry_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(WORLDS)


def test_the_formula_agrees_with_gpt2() -> None:
    assert gpt_parameters(12, 768, 50257, 1024) == PUBLISHED["gpt2_124m"]
    assert round(PUBLISHED["gpt3_175b"] / 1e9, 1) == 174.6


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(name, monkeypatch)
    model = build_whole_model(run)
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = 1 if run.gpt.share_embeddings_and_output_weights else 2
    padding = (model.padded_vocab_size - model.vocab_size) * run.transformer.hidden_size * tables
    assert total - padding == PUBLISHED[name]
    assert (padding > 0) == name.startswith("gpt")


# Published to the first digit behind the point, in billions, as 12.9, 39 and 3.3.
ACTIVE = {
    "mixtral_8x7b": 12_879_925_248,
    "mixtral_8x22b": 39_152_031_744,
    "qwen3_30b_a3b": 3_353_032_704,
    "qwen3_8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_the_published_number_of_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: 7 experts of Qwen3 instead of 8, or the dense width for its experts, is another number."""
    run = load(name, monkeypatch)
    assert count_parameters(build_whole_model(run), run.transformer).active == ACTIVE[name]


@pytest.mark.parametrize("name", WORLDS)
def test_a_preset_is_valid_and_fits_a_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(name, monkeypatch)
    assert run.notices == () or name.startswith("quickstart")
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


def test_quickstart_verifies_in_float64_for_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--tensor-model-parallel-size", "2", "--fp64", "--train-iters", "20", "--metrics-jsonl", "a.jsonl"]
    run = load("quickstart", monkeypatch, *words)
    assert run.transformer.params_dtype == torch.float64
    assert run.checkpoint.save is None
    assert run.checkpoint.load is None


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("quickstart", monkeypatch)
    with pytest.raises(ConfigError, match=r"vocab_size is 4096, but must hold the 5000 ids"):
        model_of(run, NullTokenizer(5000), torch.device("cpu"))
