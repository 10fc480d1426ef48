"""Where the tensors of a folder and its config.json disagree: ties, precisions, indices. As transformers does it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.arguments import parse_args
from megatron_lite.checkpoint import CheckpointError
from megatron_lite.checkpoint.huggingface import (
    architecture_of,
    disagreements,
    load_huggingface,
    read_architecture,
    tying,
)
from megatron_lite.checkpoint.huggingface.importing import import_checkpoint, settings_to_import
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_model import build_gpt_model
from tests.unit.checkpoint.huggingface import tiny_models

from safetensors.torch import load_file, save_file  # isort: skip  # behind the check that the package is there

NORM = "model.norm.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """Qwen3 with tied embeddings."""
    tiny_models.save("qwen3", tmp_path / "theirs")
    return tmp_path / "theirs"


def change(folder: Path, tensors: dict[str, Tensor] | None = None, **values: Any) -> None:
    """Add tensors, or set members of config.json; None removes one."""
    path, config_json = folder / "model.safetensors", folder / "config.json"
    save_file(load_file(path) | (tensors or {}), path)
    config = json.loads(config_json.read_text()) | values
    config_json.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def theirs_and_ours(folder: Path) -> tuple[Tensor, Tensor]:
    theirs = tiny_models.transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    _, ours = read_architecture(folder)
    model = build_gpt_model(ours.transformer, ours.gpt, tiny_models.VOCAB, tiny_models.LENGTH).eval()
    load_huggingface(folder, model)
    ids = tiny_models.tokens()
    with torch.no_grad():
        return tiny_models.logits_of(theirs), model(ids, torch.arange(ids.size(1)).repeat(ids.size(0), 1))


def test_a_trained_head_is_kept(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json ties, but the folder holds another output layer: it counts, and a tied model is refused.

    Mutations: config.json alone decides; the head left as a copy of the embeddings; only its first rows compared.
    """
    monkeypatch.setattr(tying, "_ROWS", 16)
    embeddings = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    head = embeddings.clone()
    head[-1, -1] += 3.0
    _, as_tied = read_architecture(tied)
    change(tied, {"lm_head.weight": head})
    theirs, ours = theirs_and_ours(tied)
    assert tiny_models.difference(ours, theirs) < 1e-5
    settings = settings_to_import(tied)
    assert settings["gpt"]["share_embeddings_and_output_weights"] is False
    assert [line for line in disagreements(tied, as_tied) if "--untie-embeddings-and-output-weights" in line]
    model = build_gpt_model(as_tied.transformer, as_tied.gpt, tiny_models.VOCAB, tiny_models.LENGTH)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* differs .* --untie"):
        load_huggingface(tied, model)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* differs .* --untie"):
        import_checkpoint(tied, tmp_path / "ours", as_tied, {})
    import_checkpoint(tied, tmp_path / "ours", architecture_of(settings), {})


def test_a_copy_of_the_embeddings_is_tied(tied: Path) -> None:
    """Mutations: any head unties; a folder without one does."""
    embeddings = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert read_architecture(tied)[1].gpt.share_embeddings_and_output_weights
    change(tied, {"lm_head.weight": embeddings.clone()})
    assert read_architecture(tied)[1].gpt.share_embeddings_and_output_weights
    theirs, ours = theirs_and_ours(tied)
    assert tiny_models.difference(ours, theirs) < 1e-5


def test_damaged_weights_are_told_with_the_flags(tied: Path) -> None:
    """Looking for the head reads the folder when flags are checked. Mutation: a traceback."""
    (tied / "model.safetensors").write_bytes(b"{")
    with pytest.raises(ConfigError, match="damaged or cut short"):
        parse_args(["--load-hf", str(tied), "--mock-data", "--dry-run"])


BF16, F16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("saved", "norm", "values", "expected"),
    [
        (torch.float32, BF16, {"dtype": "float32"}, None),
        (torch.float32, BF16, {"dtype": None}, None),
        (torch.float32, torch.float32, {"dtype": "bfloat16"}, "bf16"),
        (BF16, torch.float32, {"dtype": None, "torch_dtype": "bfloat16"}, "bf16"),
        (BF16, BF16, {"dtype": "float16", "torch_dtype": "bfloat16"}, "fp16"),
        (BF16, BF16, {"dtype": "float32"}, None),
        (BF16, BF16, {"dtype": None}, "bf16"),
        (F16, F16, {"dtype": None}, "fp16"),
    ],
)
def test_precision(
    tmp_path: Path, saved: torch.dtype, norm: torch.dtype, values: dict[str, Any], expected: str | None
) -> None:
    """That which transformers computes in: of config.json, else of the weights; float32 where these are mixed.

    Mutations: bfloat16 wherever one tensor has it; torch_dtype before dtype; config.json not asked.
    """
    tiny_models.save("llama2", tmp_path, saved)
    change(tmp_path, {NORM: torch.ones(32, dtype=norm)}, **values)
    settings = settings_to_import(tmp_path)["transformer"]
    assert [name for name in ("bf16", "fp16") if settings[name]] == ([expected] if expected else [])
    theirs = tiny_models.transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype
    assert theirs == {None: torch.float32, "bf16": BF16, "fp16": F16}[expected]


def test_the_bias_of_a_router_decides_no_precision(tmp_path: Path) -> None:
    """It is float32 in folders of bfloat16. Mutation: counted among the weights."""
    tiny_models.save("deepseek_v3", tmp_path, torch.bfloat16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(tmp_path, {bias: torch.ones(8)}, dtype=None)
    assert settings_to_import(tmp_path)["transformer"]["bf16"]


def test_unknown_precisions_are_refused(tmp_path: Path) -> None:
    """Mutation: taken for float32."""
    tiny_models.save("llama2", tmp_path)
    change(tmp_path, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match="dtype is 'float8_e4m3fn'"):
        settings_to_import(tmp_path)


def test_tensors_that_an_index_does_not_name(tied: Path) -> None:
    """Transformers reads whole files: what else is in them counts, but a tensor that is there twice has no meaning.

    Mutations: the names of the index alone; the file of the index wins.
    """
    tensors = load_file(tied / "model.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = sorted(tensors)
    halves = {first: names[::2], second: names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tied / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    (tied / "model.safetensors").unlink()
    (tied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    head = torch.randn(tiny_models.VOCAB, 32, generator=torch.Generator().manual_seed(4))
    part = {name: tensors[name] for name in halves[first]}
    save_file({**part, "lm_head.weight": head}, tied / first, metadata={"format": "pt"})
    theirs, ours = theirs_and_ours(tied)
    assert tiny_models.difference(ours, theirs) < 1e-5
    save_file({**part, names[1]: tensors[names[1]]}, tied / first, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no telling which"):
        read_architecture(tied)
