"""Generated models in both directions: what transformers computes ours computes too, or it is refused by name."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint import CheckpointError, folders, save_checkpoint
from megatron_lite.checkpoint.huggingface import Architecture, architecture_of, config_of, load_huggingface
from megatron_lite.checkpoint.huggingface.exporting import export_checkpoint
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.importing import settings_to_import
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from tests.unit.checkpoint.huggingface import generated, tiny_models

from safetensors.torch import save_file  # isort: skip  # behind the check that the package is there

# With the default widths of DeepSeek's latents sums have 1536 terms.
BOUND = 1e-4
SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 30))])


def theirs(values: dict[str, Any], folder: Path) -> Tensor | None:
    """Write a folder with these settings and random weights: the logits of transformers; None if it cannot."""
    config_json = folder / "config.json"
    config_json.write_text(json.dumps(values))
    try:
        config = tiny_models.transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
        torch.manual_seed(0)
        model = tiny_models.transformers.AutoModelForCausalLM.from_config(config).eval()
        tiny_models.randomize(model)
        logits = tiny_models.logits_of(model)
        model.save_pretrained(folder)
    except Exception:
        save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
        logits = None
    config_json.write_text(json.dumps(values))
    return logits if logits is not None and logits.isfinite().all() else None


def build(model: Architecture) -> GPTModel:
    return build_gpt_model(model.transformer, model.gpt, tiny_models.VOCAB, tiny_models.LENGTH).eval()


def logits_of(model: GPTModel) -> Tensor:
    ids = tiny_models.tokens()
    with torch.no_grad():
        logits: Tensor = model(ids, torch.arange(ids.size(1)).repeat(ids.size(0), 1))
    return logits


def ours(folder: Path) -> Tensor:
    """The logits of a folder, read by us."""
    model = build(architecture_of(settings_to_import(folder)))
    load_huggingface(folder, model)
    return logits_of(model)


def is_named(message: str, changed: tuple[str, ...], values: dict[str, Any]) -> bool:
    """Whether a refusal tells one of the changed fields, in their words or, of our rules, in ours."""
    fields = FAMILIES[values["model_type"]].fields
    words = [*changed, *(fields[key].ours for key in changed if key in fields)]
    if {"rope_scaling", "rope_parameters", "rope_theta"}.intersection(changed):
        words.append("of the rotary positions")
    return any(word in message for word in words)


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OUTSIDE = "original_max_position_embeddings"
ABSENT = generated.ABSENT

# (tiny model, what is changed, what a refusal names; None: computed)
FOUND: list[tuple[str, dict[str, Any], str | None]] = [
    ("llama2", {"rope_scaling": LINEAR, "rope_parameters": YARN}, None),
    ("llama2", {"rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 50.0}, "rope_theta": 10.0}, None),
    ("llama2", {"rope_scaling": YARN, OUTSIDE: 4}, None),
    ("llama3", {OUTSIDE: 16}, OUTSIDE),
    ("llama3", {"rope_parameters": LLAMA3}, OUTSIDE),
    ("llama3", {"rope_parameters": LLAMA3, "max_position_embeddings": 8192}, None),
    (
        "llama2",
        {"rope_parameters": {**YARN, OUTSIDE: 64, "rope_theta": 50.0, "beta_fast": 4.0, "truncate": None}},
        None,
    ),
    ("qwen2", {"rope_parameters": {**YARN, OUTSIDE: 10**6, "rope_theta": 50.0}}, None),
    ("qwen3", {"rope_parameters": {**YARN, "factor": None}}, None),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.25, "head_dim": 16}, None),
    ("gpt_oss", {"rope_parameters": ABSENT}, None),
    ("gpt_oss", {"rope_parameters": {}}, None),
    ("deepseek_v2", {"rope_parameters": {**LINEAR, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
    ("deepseek_v2", {"q_lora_rank": ABSENT}, None),
    ("deepseek_v2", {"n_shared_experts": 0}, None),
    ("deepseek_v2", {"n_shared_experts": ABSENT}, None),
    ("deepseek_v3", {"first_k_dense_replace": ABSENT, "num_hidden_layers": 4}, None),
    ("deepseek_v3", {"n_shared_experts": ABSENT}, None),
    ("deepseek_v3", {"norm_topk_prob": None}, "norm_topk_prob"),
    ("deepseek_v3", {"rope_interleave": None}, "rope_interleave"),
    ("deepseek_v3", {"num_local_experts": 4, "n_group": 1, "topk_group": 1}, None),
    ("gpt2", {"num_attention_heads": 2, "hidden_size": 16}, None),
    ("mixtral", {"num_experts": 4}, None),
    ("qwen3_moe", {"num_local_experts": 4}, None),
    ("qwen2", {"num_key_value_heads": None}, None),
    ("qwen2 with windows", {"sliding_window": None}, None),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 8}, None),
    ("mistral", {"sliding_window": ABSENT}, None),
]


@pytest.mark.parametrize(("name", "changes", "refused"), FOUND, ids=[f"{one[0]}-{one[1]}" for one in FOUND])
def test_folders_that_were_misread(tmp_path: Path, name: str, changes: dict[str, Any], refused: str | None) -> None:
    """Transformers computes each of them.

    Mutations: those of the test of generated folders, which finds some of these by chance.
    """
    values = {**tiny_models.config_values(name), **changes}
    expected = theirs({key: value for key, value in values.items() if value is not ABSENT}, tmp_path)
    assert expected is not None
    if refused is not None:
        with pytest.raises(ConfigError, match=refused):
            ours(tmp_path)
        return
    assert tiny_models.difference(ours(tmp_path), expected) < BOUND


@SEEDS
def test_generated_folders_compute_what_transformers_computes(tmp_path: Path, seed: int) -> None:
    """Or are refused by a message that names a field; what transformers refuses gives no other exception of ours.

    Mutations: rope_parameters before rope_scaling; theta outside before that inside; null taken for a missing value in
    q_lora_rank, sliding_window, norm_topk_prob; aliases of a key not read; layer_types of Mistral not read; a default
    of another family; the length of the original training inside before that outside.
    """
    counts: Counter[str] = Counter()
    for number, (changed, values) in enumerate(generated.folders(seed, 70)):
        folder = tmp_path / str(number)
        folder.mkdir()
        expected = theirs(values, folder)
        if expected is None:
            with contextlib.suppress(ConfigError, CheckpointError):
                ours(folder)
            continue
        try:
            found = ours(folder)
        except (ConfigError, CheckpointError) as error:
            counts["refused"] += 1
            if not is_named(str(error), changed, values):
                pytest.fail(f"{error} names none of {changed}: {values}")
            continue
        counts["equal"] += 1
        assert tiny_models.difference(found, expected) < BOUND, f"{changed} of {values}"
    assert counts["equal"] > 15
    assert counts["refused"] > 1


@SEEDS
def test_generated_exports_are_computed_by_transformers(tmp_path: Path, seed: int) -> None:
    """A model of ours, exported, loads into transformers whole and gives the same logits, or is refused.

    Mutations: rotary_percent left out of what is compared, or of Phi-3's config.json; null for n_shared_experts; a
    whole number where transformers wants a float; a width of the model that Llama refuses.
    """
    counts: Counter[str] = Counter()
    for number, (changed, model) in enumerate(generated.architectures(seed, 42)):
        try:
            family, _ = config_of(model)
        except ConfigError:
            counts["refused"] += 1
            continue
        root = tmp_path / str(number)
        torch.manual_seed(0)
        built = build(model)
        tiny_models.randomize(built)
        save_checkpoint(root, 1, built, None, {}, config_dict={}, save_rng=False)
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        export_checkpoint(folders.find_checkpoint(root, 1), root / "hf", model, more_config=special)
        exported, report = tiny_models.transformers.AutoModelForCausalLM.from_pretrained(
            root / "hf", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
        )
        # Shared experts of width 0.
        missing = [key for key in report["missing_keys"] if "shared_experts" not in key]
        assert not missing, f"{changed} as {family.model_type}"
        assert not report["unexpected_keys"], f"{changed} as {family.model_type}"
        difference = tiny_models.difference(logits_of(built), tiny_models.logits_of(exported.eval()))
        assert difference < BOUND, f"{changed} as {family.model_type}"
        counts["equal"] += 1
    assert counts["equal"] > 15
    assert counts["refused"] > 5
