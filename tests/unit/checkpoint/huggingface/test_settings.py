"""config.json: what it means in our flags, what cannot be expressed, and what a run's flags get wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.arguments import parse_args
from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.huggingface import architecture_of, config_of, disagreements, flags_of, read_architecture
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.checkpoint.huggingface.facts import differences
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.errors import ConfigError

# As the released models' files have them, with the spellings of before transformers 5 and without what is not read;
# DeepSeek-V3 as it was pretrained, in bfloat16 and before YaRN.
RELEASED: dict[str, dict[str, Any]] = {
    "llama3_8b": {
        "model_type": "llama",
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"num_hidden_layers": 32, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": None},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": False, "vocab_size": 128256},
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"num_hidden_layers": 32, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None},
        **{"num_experts_per_tok": 2, "num_local_experts": 8, "max_position_embeddings": 32768, "vocab_size": 32000},
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4},
        **{"head_dim": 128, "num_hidden_layers": 48, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48, "use_sliding_window": False},
        **{"max_position_embeddings": 40960, "vocab_size": 151936},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **{"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128},
        **{"num_hidden_layers": 61, "rms_norm_eps": 1e-06, "rope_theta": 10000, "vocab_size": 129280},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8},
        **{"topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
        **{"routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "max_position_embeddings": 163840},
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss",
        **{"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8},
        **{"head_dim": 64, "num_hidden_layers": 24, "rms_norm_eps": 1e-05, "rope_theta": 150000, "vocab_size": 201088},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "attention_bias": True, "sliding_window": 128},
        **{"max_position_embeddings": 131072, "swiglu_limit": 7.0, "hidden_act": "silu", "layer_types": None},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
    },
}
PRESETS = Path(__file__).resolve().parents[4] / "configs"


def write(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return {**RELEASED[name], **changes}


@pytest.mark.parametrize("preset", RELEASED)
def test_presets_are_the_released_models(tmp_path: Path, preset: str) -> None:
    """The config.json of a released model and the preset of configs/ say the same, and the export writes it again.

    Mutations: the reading of each setting wrong by one, or left at our default.
    """
    run = parse_args(
        [
            "--config",
            str(PRESETS / f"{preset}.yaml"),
            "--mock-data",
            "--dry-run",
            "--world-size",
            "1024",
            "--global-batch-size",
            "15360",
        ]
    )
    mine = Architecture(run.transformer, run.gpt, run.gpt.vocab_size)
    assert list(disagreements(write(tmp_path, **RELEASED[preset]), mine)) == []
    family, values = config_of(mine)
    assert family.model_type == RELEASED[preset]["model_type"]
    again = architecture_of(flags_of(family, ConfigJson("there", values)))
    assert not list(differences(again, mine))
    ignored = {"topk_method", "scoring_func", "moe_layer_freq", "num_nextn_predict_layers", "max_position_embeddings"}
    for key, value in RELEASED[preset].items():
        if value is not None and key not in ignored:
            assert values[key] == value, key


def test_all_differences_are_told_at_once(tmp_path: Path) -> None:
    """With the flag to write for each. Mutations: the first difference only; remedies with our value.

    A base of the positions is no difference that weights cannot fit.
    """
    folder = write(tmp_path, **RELEASED["llama3_8b"])
    with pytest.raises(ConfigError) as caught:
        parse_args(
            ["--config", str(PRESETS / "llama3_8b.yaml"), "--mock-data", "--dry-run", "--world-size", "8"]
            + ["--num-layers", "4", "--rotary-base", "10000", "--load-hf", str(folder), "--swiglu"]
            + ["--no-untie-embeddings-and-output-weights"]
        )
    where = folder / "config.json"
    assert f"num_layers is 4, but {where} says 32: leave it out, or write --num-layers 32." in str(caught.value)
    assert "write --untie-embeddings-and-output-weights." in str(caught.value)
    assert str(caught.value).startswith("2 settings")


INEXPRESSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("llama3_8b", {"model_type": "mamba2"}, "model_type is 'mamba2'"),
    ("llama3_8b", {"model_type": None}, "model_type is None"),
    ("llama3_8b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama3_8b", {"attention_bias": True}, "attention_bias is True"),
    ("llama3_8b", {"num_hidden_layers": None}, "has no num_hidden_layers"),
    ("llama3_8b", {"hidden_size": "4096"}, "hidden_size is '4096'|wrong kind"),
    ("llama3_8b", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ("llama3_8b", {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_type .* is 'longrope'"),
    ("llama3_8b", {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 2.0}}, "low_freq_factor"),
    ("llama3_8b", {"rope_scaling": "yarn"}, "must be an object"),
    ("llama3_8b", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("gpt_oss_20b", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
    ("gpt_oss_20b", {"layer_types": ["chunked_attention"] * 24}, "layer_types"),
    ("gpt_oss_20b", {"rope_scaling": {"rope_type": "yarn", "factor": 32.0, "attention_factor": 1.0}}, "attention_fac"),
    ("deepseek_v3", {"topk_group": 2}, "topk_group is 2"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    ("deepseek_v3", {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}, "topk_method"),
    ("qwen3_30b_a3b", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("llama3_8b", {"is_causal": False}, "is_causal is"),
    ("llama3_8b", {"transformers_weights": "other.safetensors"}, "transformers_weights is"),
    ("llama3_8b", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config is"),
    ("llama3_8b", {"rope_scaling": {"full_attention": {"rope_type": "yarn"}}}, "full_attention"),
    ("llama3_8b", {"rope_scaling": {"type": "linear"}}, "factor .* is None"),
    ("llama3_8b", {"hidden_size": 4100, "head_dim": 96}, "hidden_size is 4100.*type want a multiple"),
    ("llama3_8b", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ("llama3_8b", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ("llama3_8b", {"num_key_value_heads": "8"}, "num_key_value_heads is '8'"),
    ("llama3_8b", {"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_type"),
    ("llama3_8b", {"model_type": "phi3", "partial_rotary_factor": 0.01}, "rotate 1 channels"),
    ("gpt_oss_20b", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("gpt_oss_20b", {"sliding_window": None}, "no sliding_window"),
    ("gpt_oss_20b", {"sliding_window": 0}, "sliding_window is 0"),
    ("deepseek_v3", {"first_k_dense_replace": 61}, "first_k_dense_replace is 61"),
]


@pytest.mark.parametrize(("name", "changes", "message"), INEXPRESSIBLE, ids=[one[2] for one in INEXPRESSIBLE])
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    """Mutations: the value read as if it were the usual one."""
    with pytest.raises(ConfigError, match=message):
        read_architecture(write(tmp_path, **changed(name, **changes)))


def test_everything_inexpressible_is_told_at_once(tmp_path: Path) -> None:
    """Mutation: the first refusal raised."""
    folder = write(tmp_path, **changed("deepseek_v3", hidden_act="relu", attention_bias=True, topk_group=2))
    with pytest.raises(ConfigError, match=r"(?s)hidden_act.*attention_bias.*topk_group"):
        read_architecture(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100000, '"llama"'])
def test_damaged_config_json(tmp_path: Path, content: str) -> None:
    """Mutation: json's own exceptions."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_positions_of_both_spellings(tmp_path: Path) -> None:
    """Either alone means the same; of both, rope_scaling counts, as in transformers, unless it is empty.

    Mutations: `type` not read as `rope_type`; rope_theta of the older spelling lost; rope_parameters read first.
    """
    scaling = {"type": "linear", "factor": 2.0}
    _, old = read_architecture(write(tmp_path, **changed("llama3_8b", rope_scaling=scaling)))
    assert old.gpt.rotary_seq_len_interpolation_factor == 2.0
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    settings = changed("llama3_8b", rope_parameters=rope)
    del settings["rope_theta"]
    _, new = read_architecture(write(tmp_path, **settings))
    assert list(differences(old, new)) == []
    both = changed("llama3_8b", rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4})
    _, found = read_architecture(write(tmp_path, **{**both, "rope_scaling": scaling}))
    assert list(differences(old, found)) == []
    _, found = read_architecture(write(tmp_path, **{**both, "rope_scaling": {}}))
    assert {name for name, _, _ in differences(old, found)} == {"rotary_base", "rotary_seq_len_interpolation_factor"}


@pytest.mark.parametrize("inside", [True, False])
def test_parts_of_heads_are_rotated_by_phi3_alone(tmp_path: Path, inside: bool) -> None:
    """The models of other types in transformers rotate whole heads whatever their config.json says.

    Mutations: partial_rotary_factor taken over, or ignored, for llama; the one outside of rope_parameters not read.
    """
    partial = {"partial_rotary_factor": 0.5}
    values = changed("llama3_8b", **({"rope_parameters": partial} if inside else partial))
    with pytest.raises(ConfigError, match=r"partial_rotary_factor .* is 0\.5 .*phi3"):
        read_architecture(write(tmp_path, **values))
    _, ours = read_architecture(write(tmp_path, **{**values, "model_type": "phi3"}))
    assert ours.gpt.rotary_percent == 0.5
    assert config_of(ours)[0].model_type == "phi3"
    with pytest.raises(ConfigError, match=r"'llama'.*rotary_percent is 0.5, theirs 1"):
        config_of(ours, "llama")


def test_gpt_oss_is_scaled_unless_it_says_otherwise(tmp_path: Path) -> None:
    """Mutations: a config.json without positions means plain ones; an export without YaRN writes none."""
    values = changed("gpt_oss_20b", rope_scaling=None)
    _, scaled = read_architecture(write(tmp_path, **values))
    assert scaled.gpt.rotary_scaling_factor == 32.0
    _, plain = read_architecture(write(tmp_path, **values, rope_parameters={}))
    assert plain.gpt.position_embedding_type == "rope"
    assert config_of(plain)[1]["rope_scaling"] == {"rope_type": "default"}


def test_a_null_window_is_none(tmp_path: Path) -> None:
    """Mutation: null taken for a missing width, which means 4096."""
    values = changed("llama3_8b", model_type="qwen2", use_sliding_window=True, max_window_layers=0)
    assert read_architecture(write(tmp_path, **values))[1].transformer.window_size == (4095, 0)
    assert read_architecture(write(tmp_path, **values, sliding_window=None))[1].transformer.window_size is None


def test_exports_have_the_kinds_that_transformers_wants(tmp_path: Path) -> None:
    """It refuses null and whole numbers in these places, and a gpt-oss without a width of windows.

    Mutations: null for no shared experts; a whole epsilon written so; no width where no layer has a window.
    """
    values = changed("deepseek_v3", n_shared_experts=0)
    assert config_of(read_architecture(write(tmp_path, **values))[1])[1]["n_shared_experts"] == 0
    epsilon = config_of(read_architecture(write(tmp_path, **changed("llama3_8b", rms_norm_eps=1)))[1])[1][
        "rms_norm_eps"
    ]
    assert type(epsilon) is float
    values = changed("gpt_oss_20b", layer_types=["full_attention"] * 24)
    assert config_of(read_architecture(write(tmp_path, **values))[1])[1]["sliding_window"] == 128


def test_one_of_two_sources_of_weights(tmp_path: Path) -> None:
    """Mutation: one of them silently wins."""
    folder = write(tmp_path, **RELEASED["llama3_8b"])
    line = ["--config", str(PRESETS / "llama3_8b.yaml"), "--mock-data", "--dry-run", "--world-size", "8"]
    with pytest.raises(ConfigError, match="pretrained_checkpoint"):
        parse_args([*line, "--load-hf", str(folder), "--pretrained-checkpoint", "elsewhere"])


def test_every_family_has_a_name_of_its_own() -> None:
    """Mutation: a family registered twice."""
    assert len({family.architecture for family in FAMILIES.values()}) == len(FAMILIES) == 11
