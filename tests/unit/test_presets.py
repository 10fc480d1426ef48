"""configs/: each preset is valid, short, and builds a model with the published number of parameters."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.checkpoint.huggingface import Architecture, config_of
from megatron_lite.dry_run import describe
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.models.gpt.parameter_count import count_parameters
from megatron_lite.tokenizers.null_tokenizer import NullTokenizer
from megatron_lite.training.setup import model_of
from megatron_lite.transformer.attention_choices import uses_window

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
    "qwen3_235b_a22b": 235_093_634_560,
    "llama3_405b": 405_853_388_800,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_404_352,  # without the layer of multi-token prediction
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
}
WORLDS = {
    "quickstart": 2,
    "llama_15m": 2,
    "llama_30m": 2,
    "llama_60m": 2,
    "quickstart_cpu": 2,
    "quickstart_moe": 2,
    "quickstart_deepseek": 2,
    "mixtral_8x7b": 64,
    "mixtral_8x22b": 256,
    "qwen3_30b_a3b": 32,
    "gpt2_124m": 1,
    "gpt3_175b": 1024,
    "llama3_8b": 8,
    "llama3_8b_128k": 64,
    "llama3_70b": 256,
    "qwen3_8b": 8,
    "qwen3_235b_a22b": 256,
    "llama3_405b": 8192,
    "deepseek_v2_lite": 8,
    "deepseek_v3": 2048,
    "gpt_oss_20b": 16,
    "gpt_oss_120b": 64,
}


def load(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> RunConfig:
    """The run a preset describes, on the number of ranks it is meant for."""
    monkeypatch.setenv("WORLD_SIZE", str(WORLDS[name]))
    data = ["--mock-data", "--tokenizer-type", "NullTokenizer"]
    return parse_args(["--config", str(CONFIGS / f"{name}.yaml"), *data, *words])


def build_whole_model(run: RunConfig, mtp_num_layers: int | None = None) -> GPTModel:
    """The model in one piece, without storage; without multi-token prediction, unless asked for."""
    sizes = ("context_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size")
    one_rank = dict.fromkeys(sizes, 1) | {"pipeline_model_parallel_layout": None}
    transformer = replace(run.transformer, mtp_num_layers=mtp_num_layers, **one_rank)  # type: ignore[arg-type]
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
    assert (padding > 0) == name.startswith(("gpt2", "gpt3"))


def test_what_multi_token_prediction_adds_to_deepseek(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with experts, a projection of 2 h to h and three norms; embedding and output layer are the model's.

    Mutation: without one of the norms, or with an embedding of its own, another number.
    """
    run = load("deepseek_v3", monkeypatch)
    assert run.transformer.mtp_num_layers == 1
    h, heads, q_rank, kv_rank = 7168, 128, 1536, 512
    attention = h * q_rank + q_rank + q_rank * heads * 192 + h * (kv_rank + 64) + kv_rank + kv_rank * heads * 256
    attention += heads * 128 * h
    layer = attention + 257 * 3 * h * 2048 + 256 * h + 2 * h
    total = sum(parameter.numel() for parameter in build_whole_model(run, mtp_num_layers=1).parameters())
    assert total - PUBLISHED["deepseek_v3"] == layer + 2 * h * h + 3 * h


# Shapes as their authors' config.json files have them, where these differ from the defaults of the `transformers`
# package, which are DeepSeek-V3's and gpt-oss-120b's.
HUGGING_FACE: dict[str, tuple[str, dict[str, int | None]]] = {
    "deepseek_v3": ("DeepseekV3", {}),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 6,
        },
    ),
    "qwen3_235b_a22b": (
        "Qwen3Moe",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "head_dim": 128,
            "moe_intermediate_size": 1536,
        },
    ),
    "gpt_oss_20b": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt_oss_120b": ("GptOss", {}),
    "llama3_405b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
        },
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_counts_as_many_parameters(name: str) -> None:
    """Independently of our model. Mutation: any of these sizes, one layer, expert or head more, is another number."""
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="builds the models of transformers 5")
    family, sizes = HUGGING_FACE[name]
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


SMALL_LLAMAS = {"llama_15m": 15_145_344, "llama_30m": 29_368_832, "llama_60m": 61_292_160}


@pytest.mark.parametrize("name", SMALL_LLAMAS)
def test_a_small_llama_is_as_large_as_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers counts for its shape; and trained on the tokens that its head tells, by the rule it tells.

    Mutation: another width, number of layers, groups or steps than the first lines are of.
    """
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="counts the parameters of a Llama")
    run = load(name, monkeypatch)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**config_of(Architecture(run.transformer, run.gpt, run.gpt.vocab_size))[1])
        )
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == sum(parameter.numel() for parameter in build_whole_model(run).parameters()) == SMALL_LLAMAS[name]
    assert run.training.train_iters is not None
    batch = run.global_batch_size * run.sequence_length
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    steps, tokens, further = re.search(  # type: ignore[union-attr]
        r"(\d+) steps of .*, (\d+\.\d) million\.\n.*--train-iters (\d+)", text
    ).groups()
    assert f"{count:,} parameters" in text.splitlines()[0]
    assert int(steps) == run.training.train_iters == round(count / 4 / batch)
    assert float(tokens) == round(run.training.train_iters * batch / 1e6, 1)
    assert int(further) == round(20 * count / batch)


def test_deepseek_v3_is_routed_and_normalized_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the number of parameters does not show. Mutation: any of these values changed in the preset."""
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="knows the published values")
    theirs, run = transformers.DeepseekV3Config(), load("deepseek_v3", monkeypatch)
    c = run.transformer
    assert (c.moe_router_num_groups, c.moe_router_group_topk) == (theirs.n_group, theirs.topk_group)
    assert (c.moe_router_topk_scaling_factor, c.layernorm_epsilon) == (
        theirs.routed_scaling_factor,
        theirs.rms_norm_eps,
    )
    assert (c.moe_router_score_function, c.moe_router_enable_expert_bias) == ("sigmoid", True)
    assert run.gpt.rotary_base == theirs.rope_parameters["rope_theta"]
    assert run.gpt.yarn(c.multi_latent_attention) is None


@pytest.mark.parametrize(("name", "layers"), [("gpt_oss_20b", 24), ("gpt_oss_120b", 36)])
def test_gpt_oss_attends_as_published(name: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, positions, the cut-off activation. Mutation: any of these values changed in the preset."""
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="knows the published values")
    theirs, run = transformers.GptOssConfig(num_hidden_layers=layers), load(name, monkeypatch)
    c = run.transformer
    assert c.window_size == (theirs.sliding_window - 1, 0)
    windows = [uses_window(c, number) for number in range(1, layers + 1)]
    assert windows == [kind == "sliding_attention" for kind in theirs.layer_types]
    assert (c.activation_func_clamp_value, c.glu_linear_offset) == (theirs.swiglu_limit, 1.0)
    assert (c.layernorm_epsilon, c.moe_router_pre_softmax, c.softmax_type) == (theirs.rms_norm_eps, False, "learnable")
    rope, yarn = theirs.rope_parameters, run.gpt.yarn()
    assert yarn is not None
    assert (run.gpt.rotary_base, yarn.scaling_factor) == (rope["rope_theta"], rope["factor"])
    assert (yarn.beta_fast, yarn.beta_slow) == (rope["beta_fast"], rope["beta_slow"])
    assert yarn.original_max_position_embeddings == rope["original_max_position_embeddings"]
    assert yarn.correction_range_round_to_int == rope["truncate"]


# In billions as published: those of DeepSeek-V2-Lite and of gpt-oss leave out the embedding, which is no product.
ACTIVE = {
    "mixtral_8x7b": (12_879_925_248, 12.9),
    "mixtral_8x22b": (39_152_031_744, 39),
    "qwen3_30b_a3b": (3_353_032_704, 3.3),
    "qwen3_8b": (8_190_735_360, 8.2),
    "qwen3_235b_a22b": (22_190_763_520, 22),
    "llama3_405b": (405_853_388_800, 405),
    "deepseek_v3": (37_552_282_624, 37),
    "deepseek_v2_lite": (2_451_435_008 + 102400 * 2048, 2.4),
    "gpt_oss_20b": (3_608_307_264 + 201088 * 2880, 3.6),
    "gpt_oss_120b": (5_132_849_472 + 201088 * 2880, 5.1),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_the_published_number_of_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: 7 experts of Qwen3 instead of 8, or the dense width for its experts, is another number."""
    run = load(name, monkeypatch)
    found, (exact, published) = count_parameters(build_whole_model(run), run.transformer).active, ACTIVE[name]
    assert found == exact
    embedding = (run.gpt.vocab_size or 0) * run.transformer.hidden_size
    without = found - embedding if name.startswith(("deepseek_v2", "gpt_oss")) else found
    assert without / 1e9 == pytest.approx(published, rel=0.025)


def test_heads_say_how_many_parameters_there_are() -> None:
    """The first lines of the files. Mutation: a digit there."""
    for name, count in PUBLISHED.items():
        first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert f"{count:,}" in first or name.startswith("gpt3")
        if name in ACTIVE:
            assert f"{ACTIVE[name][0]:,}" in first


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if "405b" in name else name for name in HUGGING_FACE]
)
def test_a_large_preset_fits_its_gpus(name: str) -> None:
    """By the dry run's own estimate 80 GB are enough, with room for what it leaves out.

    Mutations: without recompute_modules DeepSeek-V3's fullest rank, without recomputed layers Llama's, does not.
    """
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--dry-run", "--world-size", str(WORLDS[name])]
    report = describe(parse_args(words))
    assert f"Layout of {WORLDS[name]:,} ranks" in report
    size, unit = report.split("  sum ")[1].split()[:2]
    assert unit == "GiB"
    assert float(size) * 2**30 < 0.9 * 80e9


@pytest.mark.parametrize("name", WORLDS)
def test_a_preset_is_valid_and_fits_a_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(name, monkeypatch)
    said = [notice for notice in run.notices if not notice.startswith("defaults that are not Megatron-LM's")]
    assert not said or name.startswith("quickstart")
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


@pytest.mark.parametrize("name", ["quickstart", "quickstart_moe", "quickstart_deepseek"])
def test_real_data_want_a_tokenizer_where_the_preset_means_made_up_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen by name it is legal, and so in a file that names the data too. Mutation: look at the value alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = ["--config", str(CONFIGS / f"{name}.yaml"), "--data-path", "text_document"]
    with pytest.raises(ConfigError) as caught:
        parse_args(line)
    message = str(caught.value)
    assert re.search(rf"NullTokenizer \(.*{name}.yaml:\d+\), which is for made-up data, but --data-path", message)
    assert "--tokenizer-type NullTokenizer if" in message
    assert parse_args([*line, "--tokenizer-type", "NullTokenizer"]).tokenizer.tokenizer_type == "NullTokenizer"
    assert parse_args([*line[:2], "--mock-data"]).data.mock_data
    assert parse_args([*line, "--dry-run"]).dry_run
    own = tmp_path / "own.yaml"
    own.write_text((CONFIGS / f"{name}.yaml").read_text() + "\ndata_path: text_document\n")
    assert parse_args(["--config", str(own)]).data.data_path == ["text_document"]
