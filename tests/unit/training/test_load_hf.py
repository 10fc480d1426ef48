"""--load-hf: a run that starts from the weights of a Hugging Face folder, and continues from its own checkpoints."""

from pathlib import Path

import pytest
import torch
import yaml

from megatron_lite.arguments import RunConfig, parse_args, read_settings
from megatron_lite.checkpoint.huggingface import Architecture, read_architecture
from megatron_lite.checkpoint.huggingface.facts import differences
from megatron_lite.errors import ConfigError
from pretrain_gpt import pretrain
from tools import convert_checkpoint

transformers = pytest.importorskip("transformers", minversion="5.0", reason="writes the models of transformers 5")
tiny_models = pytest.importorskip("tests.unit.checkpoint.huggingface.tiny_models", reason="needs transformers")

# Nothing of the model.
REST = [
    *("--seq-length", "16", "--micro-batch-size", "2", "--mock-data", "--num-workers", "0"),
    *("--eval-iters", "0", "--log-interval", "1"),
]
NUMBERS = ["--tokenizer-type", "NullTokenizer"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*line: str) -> None:
    pretrain(parse_args([*REST, *line]))


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
    still = [*NUMBERS, "--lr", "0", "--min-lr", "0", "--load-hf", str(theirs)]
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
    """It is known only when the tokenizer is. Mutation: the remedy of a run without weights, another --vocab-size."""
    tiny_models.save("llama2", tmp_path)
    line = ["--lr", "1e-3", "--train-iters", "1", "--tokenizer-type", "ByteLevelTokenizer", "--load-hf", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"must hold the 257 ids of the tokenizer: the weights in .* have no more"):
        run(*line)


def test_upcycling_reads_checkpoints_of_ours(tmp_path: Path) -> None:
    """Mutation: the flag of upcycling without effect."""
    tiny_models.save("llama2", tmp_path)
    line = [*NUMBERS, "--lr", "1e-3", "--train-iters", "1", "--load-hf", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"moe_use_upcycling.*convert_checkpoint"):
        run(*line, "--num-experts", "4", "--moe-use-upcycling", "--pretrained-checkpoint", "x")


def described(folder: Path, name: str) -> str:
    """A folder with the config.json of a model, and nothing else."""
    kind, settings = tiny_models.MODELS[name]
    family = kind.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(folder)
    return str(folder)


def parsed(folder: str, *line: str) -> RunConfig:
    return parse_args([*REST, *NUMBERS, "--lr", "1e-3", "--train-iters", "1", "--load-hf", folder, *line])


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_the_settings_of_a_model_come_from_its_folder(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, named with their origin, also in YAML that can be read back.

    Mutations: the settings of one group only; values that are false left out.
    """
    folder = described(tmp_path / "model", name)
    run = parsed(folder)
    _, wanted = read_architecture(folder)
    assert not list(differences(Architecture(run.transformer, run.gpt, run.gpt.vocab_size), wanted))
    told = [notice for notice in run.notices if notice.startswith(f"From {folder}/config.json: ")]
    assert "num_layers 2, " in told[0]
    assert "hidden_size 32, " in told[0]
    with pytest.raises(SystemExit):
        parsed(folder, "--print-config")
    printed = capsys.readouterr().out
    assert f"hidden_size: 32  # {folder}/config.json\n" in printed
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(yaml.safe_load(printed)))
    again = parse_args(["--config", str(tmp_path / "again.yaml")])
    assert again.to_dict() == run.to_dict()


def test_a_flag_wins_where_weights_fit_it(tmp_path: Path) -> None:
    """With a word; where they do not, both values are told. Mutations: config.json wins; no word; all are errors."""
    folder = described(tmp_path, "llama2")
    run = parsed(folder, "--rotary-base", "500", "--position-embedding-type", "yarn", "--rotary-scaling-factor", "4")
    assert run.gpt.rotary_base == 500
    told = [notice for notice in run.notices if "but the weights were trained with" in notice]
    assert f"rotary_base is 500.0, but the weights were trained with 10000.0, says {folder}/config.json." in told
    assert any(notice.startswith("position_embedding_type is yarn") for notice in told)
    with pytest.raises(ConfigError) as caught:
        parsed(
            folder, "--num-layers", "3", "--untie-embeddings-and-output-weights", "--position-embedding-type", "none"
        )
    assert f"num_layers is 3, but {folder}/config.json says 2: leave it out, or write --num-layers 2." in str(
        caught.value
    )
    assert "position_embedding_type is none" in str(caught.value)
    assert str(caught.value).startswith("2 settings")


def test_a_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    """Unless another is named in any way. Mutations: half of another tokenizer; SentencePiece read by transformers."""
    folder = described(tmp_path, "llama2")
    line = ["--load-hf", folder]
    assert "tokenizer_type" not in read_settings(line).values
    (tmp_path / "tokenizer.model").touch()
    settings = read_settings(line).values
    assert settings["tokenizer_type"][0] == "SentencePieceTokenizer"
    assert settings["tokenizer_model"][0] == f"{folder}/tokenizer.model"
    (tmp_path / "tokenizer.json").touch()
    settings = read_settings(line).values
    assert settings["tokenizer_type"] == ("HuggingFaceTokenizer", f"the tokenizer's files in {folder}")
    assert settings["tokenizer_model"][0] == folder
    for other in (["--tokenizer-type", "ByteLevelTokenizer"], ["--vocab-file", "v", "--merge-file", "m"]):
        values = read_settings([*line, *other]).values
        assert "tokenizer_model" not in values
        assert values.get("tokenizer_type", ("none", ""))[0] != "HuggingFaceTokenizer"


def test_a_folder_that_cannot_be_read_is_told_alone(tmp_path: Path) -> None:
    """Not with all that its config.json would have said. Mutation: collected with other problems."""
    with pytest.raises(ConfigError, match=r"^\S*config\.json is missing"):
        parsed(str(tmp_path))
