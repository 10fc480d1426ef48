"""Flags and YAML keys of the configuration dataclasses: precedence, conversion, frozen results, --print-config."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_lite.arguments import RunConfig, build_parser, build_run_config, parse_args, read_settings
from megatron_lite.arguments.options import all_options
from megatron_lite.arguments.run_config import GROUPS
from megatron_lite.errors import ConfigError
from megatron_lite.value_parsing import convert, list_expression

SMALL = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --train-iters 10 "
    "--lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def preset(folder: Path, text: str) -> str:
    """A YAML file with this text."""
    path = folder / "preset.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def errors_of(*words: str) -> str:
    """What parse_args complains about."""
    with pytest.raises(ConfigError) as caught:
        parse_args([*SMALL, *words])
    return str(caught.value)


def test_the_groups_hold_what_was_given() -> None:
    run = parse_args([*SMALL, "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"])
    assert run.transformer.num_layers == 2
    assert run.transformer.swiglu
    assert not run.transformer.add_bias_linear
    assert not run.gpt.share_embeddings_and_output_weights
    assert run.gpt.max_position_embeddings == run.data.seq_length == 32
    assert run.optimizer.lr == 1e-3
    assert run.global_batch_size == 2


def test_our_three_defaults_and_megatrons() -> None:
    run = parse_args(SMALL)
    assert run.transformer.calculate_per_token_loss
    assert run.transformer.transformer_impl == "auto"
    assert run.transformer.hidden_dropout == run.transformer.attention_dropout == 0.0
    assert run.optimizer.clip_grad == 1.0
    assert run.optimizer.adam_beta2 == 0.999
    assert run.scheduler.lr_decay_style == "linear"
    assert run.validation.eval_iters == 100
    assert run.logger.log_interval == 100
    assert run.rng.seed == 1234


def test_command_line_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    path = preset(tmp_path, "lr: 3e-4\nswiglu: true\nmin_lr: 1e-5\nseed: 7\n")
    words = [word for word in SMALL if word not in ("--lr", "1e-3")]
    run = parse_args(
        [*words, "--config", path, "--min-lr", "2e-5", "--no-swiglu"], defaults={"seed": 3, "eval_iters": 4}
    )
    assert run.optimizer.lr == 3e-4
    assert run.optimizer.min_lr == 2e-5
    assert not run.transformer.swiglu
    assert run.rng.seed == 7
    assert run.validation.eval_iters == 4


@pytest.mark.parametrize("spelling", ["--config", "--yaml-cfg"])
def test_keys_are_fields_or_flags(tmp_path: Path, spelling: str) -> None:
    path = preset(
        tmp_path,
        """
        disable_bias_linear: true
        untie_embeddings_and_output_weights: true
        norm_epsilon: 1e-6
        no_save_optim: true
        calculate_per_token_loss: false
        add_qkv_bias: yes
        rampup_batch_size: [2, 2, 100]
        train_samples: 1_000
        split: 949,50,1
        data_path: [0.3, a, 0.7, b]
        log_interval: 1e1
        wandb_entity: null
        """,
    )
    words = [w for w in SMALL if w not in ("--train-iters", "10", "--mock-data")]
    run = parse_args([*words, spelling, path, "--global-batch-size", "4"])
    assert not run.transformer.add_bias_linear
    assert not run.gpt.share_embeddings_and_output_weights
    assert run.transformer.layernorm_epsilon == 1e-6
    assert not run.checkpoint.save_optim
    assert not run.transformer.calculate_per_token_loss
    assert run.transformer.add_qkv_bias
    assert run.training.rampup_batch_size == [2, 2, 100]
    assert run.training.train_samples == 1000
    assert run.data.split == "949,50,1"
    assert run.data.data_path == ["0.3", "a", "0.7", "b"]
    assert run.logger.log_interval == 10
    assert run.logger.wandb_entity is None


def test_sections_named_like_the_groups(tmp_path: Path) -> None:
    path = preset(tmp_path, "transformer:\n  swiglu: true\noptimizer:\n  weight_decay: 0.2\nseed: 5\n")
    run = parse_args([*SMALL, "--config", path])
    assert run.transformer.swiglu
    assert run.optimizer.weight_decay == 0.2
    assert run.rng.seed == 5


def test_a_field_of_several_groups_is_one_setting() -> None:
    run = parse_args([*SMALL, "--fp16"])
    assert run.transformer.fp16
    assert run.optimizer.fp16


def test_unknown_flags_and_keys_name_the_closest(tmp_path: Path) -> None:
    path = preset(tmp_path, "tensor_parallel_size: 2\n")
    message = errors_of("--config", path, "--num-layer", "3", "--gloabl-batch-size=8")
    assert "--num-layer is not a flag; the closest is --num-layers." in message
    assert "--gloabl-batch-size is not a flag; the closest is --global-batch-size." in message
    assert "preset.yaml:1: tensor_parallel_size is not a setting; the closest is tensor_model_parallel_size." in message


def test_a_flag_may_not_be_abbreviated() -> None:
    assert "--tensor-model-parallel is not a flag" in errors_of("--tensor-model-parallel", "1")


def test_a_word_without_flag_and_a_flag_without_value() -> None:
    assert "'stray' on the command line belongs to no flag" in errors_of("--bf16", "stray")
    assert "--seed" in errors_of("--seed")


def test_a_value_that_begins_with_minus_is_a_value() -> None:
    assert read_settings(["--window-size", "-1,0"]).values["window_size"][0] == (-1, 0)
    assert read_settings(["--lr", "-1e-3"]).values["lr"][0] == -1e-3


def test_a_switch_with_a_value() -> None:
    with pytest.raises(ConfigError, match="--swiglu is a switch and takes no value, but 'true' is given"):
        read_settings(["--swiglu=true"])


def test_values_of_the_wrong_type_are_reported_together(tmp_path: Path) -> None:
    path = preset(tmp_path, "weight_decay: heavy\nswiglu: maybe\nnum_layers: null\n")
    message = errors_of("--config", path, "--seed", "1.5", "--iterations-to-skip", "1", "two")
    assert "weight_decay is 'heavy' (" in message
    assert "preset.yaml:1), but must be a number." in message
    assert "swiglu is 'maybe'" in message
    assert "must be true or false" in message
    assert "seed is '1.5' (command line), but must be a whole number." in message
    assert "iterations_to_skip is '1 two'" in message
    assert "num_layers is None" in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("!!python/object/apply:os.system ['true']", "must hold `key: value` lines"),
        ("lr: !!python/object/apply:os.system ['true']", "not a plain YAML file"),
        ("lr: !!python/name:os.system", "not a plain YAML file"),
        ("- lr\n- 3\n", "must hold `key: value` lines"),
        ("just text", "must hold `key: value` lines"),
        ("lr: 1\nlr: 2\n", "lr was already set at"),
        ("lr: {deep: {deeper: 1}}", "lr holds a mapping"),
        ("optimizer:\n  lr:\n    x: 1\n", "lr holds a mapping"),
        ("lr: [1, 2", "not a plain YAML file"),
        ("lr: [1, [2, 3]]", "lr holds lists or mappings inside of a list"),
        ("data_path: &a [*a]", "data_path holds lists or mappings inside of a list"),
        ("? [1, 2]\n: 3\n", "is not text"),
        ("\x00", "not a plain YAML file"),
        ("lr: " + "[" * 3000, "--config"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    assert complaint in errors_of("--config", preset(tmp_path, text))


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    assert "cannot be read" in errors_of("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00lr")
    assert "cannot be read" in errors_of("--config", str(tmp_path / "binary"))


def test_the_result_is_frozen() -> None:
    run = parse_args(SMALL)
    with pytest.raises(ConfigError, match="frozen"):
        run.optimizer.lr = 1.0
    with pytest.raises(ConfigError, match="frozen"):
        run.world_size = 8
    with pytest.raises(ConfigError, match="frozen"):
        run.transformer = dataclasses.replace(run.transformer, num_layers=3)
    changed = dataclasses.replace(run.transformer, num_layers=3)
    changed.num_layers = 5
    assert run.transformer.num_layers == 2


def test_print_config_reads_back_to_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = preset(tmp_path, "lr: 3e-4\nwindow_size: [15, 0]\nsplit: '90,5,5'\n")
    words = [word for word in SMALL if word not in ("--lr", "1e-3")]
    words += ["--config", path, "--swiglu", "--disable-bias-linear", "--wandb-entity", "a: #b", "--adam-eps", "1e-12"]
    with pytest.raises(SystemExit) as stopped:
        parse_args([*words, "--print-config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "lr: 0.0003  # " + path + ":1" in printed
    assert "num_layers: 2  # command line" in printed
    assert "adam_beta1: 0.9  # default" in printed
    assert "kv_channels: null  # default, derived: 16" in printed
    assert set(yaml.safe_load(printed)) == {option.field for option in all_options()}
    again = parse_args(["--config", preset(tmp_path, printed)])
    assert again.to_dict() == parse_args(words).to_dict()


def test_the_plain_dictionary_survives_yaml() -> None:
    plain = parse_args([*SMALL, "--bf16"]).to_dict()
    assert plain["transformer"]["params_dtype"] == "bfloat16"
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


def test_every_flag_has_help_and_every_field_a_flag_once() -> None:
    text = build_parser().format_help()
    for option in all_options():
        assert option.help.endswith("."), option.field
        for spelling in option.shown:
            assert spelling in text, spelling
    for group in (
        "precision and model parallelism",
        "learning rate and weight decay",
        "checkpointing",
        "data and dataloader",
    ):
        assert group in text


def test_no_setting_is_ignored() -> None:
    """Each field is read somewhere: as an attribute, or by its name in quotes."""
    package = Path(__file__).parents[2] / "megatron_lite"
    code = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    read = set(re.findall(r"\.(\w+)|\"(\w+)\"", code))
    names = {name for pair in read for name in pair}
    assert [option.field for option in all_options() if option.field not in names] == []


def test_conversion_follows_the_type() -> None:
    assert convert("3e-4", float) == 3e-4
    assert convert("1e6", int) == 1_000_000
    assert convert("(-1, 0)", tuple[int, int] | None) == (-1, 0)
    assert convert("([0]*3+[1]*2)", int | list[int] | None) == [0, 0, 0, 1, 1]
    assert convert("4", int | list[int] | None) == 4
    assert convert(["1,2", "3"], list[int]) == [1, 2, 3]
    assert convert(None, str | None) is None
    for raw, hint in [("x", int), ("1.5", int), (None, int), (["1"], int), ("1 2 3", tuple[int, int]), ("nan", int)]:
        with pytest.raises(ValueError, match=r"number|values|text"):
            convert(raw, hint)


@pytest.mark.parametrize(
    "text", ["__import__('os')", "[0]*10**9", "[0]*99999999", "[1]*[2]", "[x]", "[1.5]", "3", "(" * 500]
)
def test_list_expressions_compute_lists_only(text: str) -> None:
    with pytest.raises(ValueError, match=r"list|number"):
        list_expression(text)


def test_world_size_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    run = parse_args([*SMALL, "--tensor-model-parallel-size", "2"])
    assert (run.world_size, run.data_parallel_size) == (4, 2)
    assert "--world-size is 8, but 4 ranks were started" in errors_of("--world-size", "8")


@pytest.mark.parametrize("text", ["abc", "0", "-2"])
def test_a_launcher_that_counts_wrongly(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    settings = read_settings([])
    build_run_config(settings)
    assert f"WORLD_SIZE is {text!r}" in settings.problems[0]


def test_infinity_is_no_whole_number() -> None:
    assert "but must be a whole number" in read_settings(["--seed", "1e400"]).problems[0]


def test_defaults_build_without_a_command_line() -> None:
    assert RunConfig().transformer.num_layers == 0
    assert build_run_config(read_settings([])).training.micro_batch_size is None


def test_help_is_quick() -> None:
    """It does not import torch. Mutation: import it at the top of a configuration, or in a package's __init__."""
    slow = ["torch", "sentencepiece", "transformers", "matplotlib", "transformer_engine"]
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('slow:', [name for name in {slow} if name in sys.modules]))\n"
        "import runpy; sys.argv = ['pretrain_gpt.py', '--help', 'transformer']\n"
        "runpy.run_path('pretrain_gpt.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True
    )
    assert "--tensor-model-parallel-size" in done.stdout
    assert done.stdout.endswith("slow: []\n")


def test_help_lists_topics_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag is in the help of exactly one topic. Mutation: a group that is no topic."""

    def shown(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            parse_args(["--help", *words])
        assert not ended.value.code
        return capsys.readouterr().out

    def flags(text: str) -> set[str]:
        return set(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE))

    overview = shown()
    assert len(overview.splitlines()) < 40
    topics = [topic for topic in ("general", *GROUPS) if f"\n  {topic} " in overview]
    assert topics == ["general", *GROUPS]
    found = [flags(shown(topic)) for topic in topics]
    assert set.union(*found) == flags(shown("all"))
    assert sum(map(len, found)) == len(set.union(*found))
    assert flags(shown("lr")) == {"--lr"}


def test_help_of_what_is_not_there_names_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"--help optimiser: .*; the closest is optimizer\. Topics: general, "):
        parse_args(["--help", "optimiser"])
