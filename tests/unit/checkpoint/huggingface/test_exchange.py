"""There and back: theirs to ours to theirs is the same to the bit, and transformers runs what was exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import folders, read_common
from megatron_lite.checkpoint.conversion.architecture import empty_model
from megatron_lite.checkpoint.conversion.filling import pieces_of_tensors
from megatron_lite.checkpoint.huggingface import (
    Architecture,
    architecture_of,
    config_of,
    flags_of,
    load_huggingface,
    read_architecture,
    read_config,
)
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.checkpoint.huggingface.exporting import export_checkpoint
from megatron_lite.checkpoint.huggingface.facts import differences, facts_of
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.importing import import_checkpoint, settings_to_import
from megatron_lite.errors import ConfigError
from megatron_lite.inference.generate import generate
from megatron_lite.inference.sampling import SamplingConfig
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from tests.unit.checkpoint.huggingface import tiny_models
from tools import convert_checkpoint

from safetensors.torch import load_file, save_file  # isort: skip  # behind the check that the package is there

NAMES = pytest.mark.parametrize("name", tiny_models.MODELS)


def convert(*words: object) -> int:
    return convert_checkpoint.main([str(word) for word in words])


def there_and_back(theirs: Path, tmp_path: Path, *options: str) -> Path:
    """Import and export by the command line."""
    assert convert("--from", "hf", "--to", "megatron_lite", "--load", theirs, "--save", tmp_path / "ours") == 0
    again = tmp_path / "again"
    assert convert("--from", "megatron_lite", "--to", "hf", "--load", tmp_path / "ours", "--save", again, *options) == 0
    return again


def loaded(folder: Path) -> GPTModel:
    _, ours = read_architecture(folder)
    model = build_gpt_model(ours.transformer, ours.gpt, tiny_models.VOCAB, tiny_models.LENGTH).eval()
    load_huggingface(folder, model)
    return model


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tensors_come_back_byte_for_byte(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """All tensors of a folder, in its dtype, after an import and an export, and no others; config.json reads the same.

    Mutations: export without undoing a transposition; rows in the order of storage; padding of the vocabulary
    exported; weights exported in float32 always; biases of routers in bfloat16; transposed tensors left without a copy.
    """
    tiny_models.save(name, tmp_path / "theirs", dtype)
    again = there_and_back(tmp_path / "theirs", tmp_path)
    before, after = load_file(tmp_path / "theirs/model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        # transformers keeps this one in float32 when a user asks for bfloat16, but not when .to() does.
        expected = tensor.float() if key.endswith("e_score_correction_bias") else tensor
        assert expected.dtype == after[key].dtype, key
        assert torch.equal(expected.view(torch.uint8), after[key].view(torch.uint8)), key
    first, second = read_architecture(tmp_path / "theirs")[1], read_architecture(again)[1]
    assert facts_of(first) == facts_of(second)
    values = json.loads((again / "config.json").read_text())
    assert values["torch_dtype"] == str(dtype).removeprefix("torch.")


@NAMES
def test_exported_folders_run_in_transformers(tmp_path: Path, name: str) -> None:
    """AutoModelForCausalLM.from_pretrained loads the export, whole; logits and greedy tokens are ours.

    Mutations: config.json without its rope scaling, without layer types, with a wrong number of groups, with tied
    embeddings where they are not.
    """
    tiny_models.save(name, tmp_path / "theirs")
    again = there_and_back(tmp_path / "theirs", tmp_path)
    theirs, report = tiny_models.transformers.AutoModelForCausalLM.from_pretrained(
        again, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = loaded(again)
    ids = tiny_models.tokens()
    with torch.no_grad():
        logits = ours(ids, torch.arange(ids.size(1)).repeat(ids.size(0), 1))
    assert tiny_models.difference(logits, tiny_models.logits_of(theirs.eval())) < 1e-5
    greedy = generate(ours, ids, 12, SamplingConfig(temperature=0.0))
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy, expected)


@NAMES
def test_every_element_has_one_place(tmp_path: Path, name: str) -> None:
    """The pieces of each parameter cover it once, without overlap, but for the padding of the vocabulary.

    Mutations: ups at the places of gates; values at those of keys; one expert's tensor for all.
    """
    tiny_models.save(name, tmp_path)
    family, ours = read_architecture(tmp_path)
    model = empty_model(ours)
    for parameter, pieces in pieces_of_tensors(model.state_dict(), family, model).items():
        counts = torch.zeros(model.state_dict()[parameter].shape, dtype=torch.int64)
        for piece in pieces:
            index = [torch.tensor([one]) if isinstance(one, int) else torch.as_tensor(one) for one in piece.places]
            grid = torch.meshgrid(*index, indexing="ij")
            counts.index_put_(tuple(grid), torch.ones((), dtype=torch.int64), accumulate=True)
        padded = parameter in ("embedding.word_embeddings.weight", "output_layer.weight")
        used = counts[: tiny_models.VOCAB] if padded else counts
        assert (used == 1).all(), parameter
        assert counts.sum() == used.sum(), parameter


def test_large_models_become_several_files(tmp_path: Path) -> None:
    """Mutations: an index that names a file for too many tensors; tensors of the last file lost; sizes in elements."""
    tiny_models.save("qwen3_moe", tmp_path / "theirs")
    again = there_and_back(tmp_path / "theirs", tmp_path, "--max-shard-size", "30000")
    index = json.loads((again / "model.safetensors.index.json").read_text())
    files = sorted(again.glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    before, after = load_file(tmp_path / "theirs/model.safetensors"), {}
    for file in files:
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        assert len(tensors) == 1 or sum(one.nbytes for one in tensors.values()) <= 30000
        after |= tensors
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in before.values())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    logits = tiny_models.logits_of(tiny_models.build("qwen3_moe"))
    ids = tiny_models.tokens()
    with torch.no_grad():
        ours = loaded(again)(ids, torch.arange(ids.size(1)).repeat(ids.size(0), 1))
    assert tiny_models.difference(ours, logits) < 1e-5


def test_padding_of_the_vocabulary_is_zero(tmp_path: Path) -> None:
    """Mutations: padding left as it was in memory; rows of theirs counted as padding."""
    tiny_models.save("llama2", tmp_path)
    _, ours = read_architecture(tmp_path)
    model = build_gpt_model(ours.transformer, ours.gpt, tiny_models.VOCAB, tiny_models.LENGTH)
    load_huggingface(tmp_path, model)
    assert model.padded_vocab_size == 128
    for weight in (model.embedding.word_embeddings.weight, model.output_layer.weight):
        assert weight is not None
        assert (weight[: tiny_models.VOCAB] != 0).any(dim=1).all()
        assert (weight[tiny_models.VOCAB :] == 0).all()


def test_two_chunks_of_one_rank(tmp_path: Path) -> None:
    """The first and the last stage of a tied model on one rank: the copy of the embeddings is filled, too.

    Mutation: fill_copies left out.
    """
    tiny_models.save("qwen3", tmp_path)
    _, ours = read_architecture(tmp_path)
    parts: list[dict[str, Any]] = [
        {"pre_process": stage == 0, "post_process": stage == 1, "layer_indices": [stage]} for stage in range(2)
    ]
    first, last = (
        build_gpt_model(ours.transformer, ours.gpt, tiny_models.VOCAB, tiny_models.LENGTH, **part).eval()
        for part in parts
    )
    load_huggingface(tmp_path, [first, last])
    ids = tiny_models.tokens()
    positions = torch.arange(ids.size(1)).repeat(ids.size(0), 1)
    with torch.no_grad():
        logits = last(None, positions, decoder_input=first(ids, positions))
    assert tiny_models.difference(logits, tiny_models.logits_of(tiny_models.build("qwen3"))) < 1e-5


def test_multi_token_prediction_travels(tmp_path: Path) -> None:
    """Layers behind the decoder's are exported and imported; transformers, and a model without them, leave them.

    Mutations: depth counted from the decoder's first layer; the copy of the embeddings wanted by the import, or not
    exported; the layers of a model without multi-token prediction taken for layers that nobody wants.
    """
    tiny_models.save("deepseek_v3", tmp_path / "theirs")
    settings = settings_to_import(tmp_path / "theirs")
    settings["transformer"]["mtp_num_layers"] = 2
    ours = architecture_of(settings)
    torch.manual_seed(3)
    model = build_gpt_model(ours.transformer, ours.gpt, tiny_models.VOCAB, 64)
    _save_ours(model, ours, tmp_path / "ours")
    folder = folders.find_checkpoint(tmp_path / "ours", 1)
    export_checkpoint(folder, tmp_path / "again", ours)
    tensors = load_file(tmp_path / "again/model.safetensors")
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    assert torch.equal(tensors["model.layers.3.eh_proj.weight"], model.state_dict()["mtp.layers.1.eh_proj.weight"])

    again = settings_to_import(tmp_path / "again")
    assert again["transformer"]["mtp_num_layers"] == 2
    copy = build_gpt_model(ours.transformer, ours.gpt, tiny_models.VOCAB, 64)
    load_huggingface(tmp_path / "again", copy)
    weights = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        rows = tiny_models.VOCAB if (parameter.size(0) == 128 and "mbedding" in name) or "output" in name else None
        assert torch.equal(parameter[:rows], weights[name][:rows]), name
    assert loaded(tmp_path / "again").mtp is None
    without_copies = {
        n: one for n, one in tensors.items() if "layers" not in n or ("embed" not in n and "head.h" not in n)
    }
    assert len(without_copies) == len(tensors) - 4
    save_file(without_copies, tmp_path / "again/model.safetensors")
    load_huggingface(tmp_path / "again", copy)
    tiny_models.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def _save_ours(model: GPTModel, ours: Architecture, root: Path) -> None:
    from megatron_lite.checkpoint import save_checkpoint

    settings = {"transformer": {}, "gpt": dataclasses.asdict(ours.gpt), "tokenizer": {}}
    save_checkpoint(root, 1, model, None, {}, config_dict=settings, save_rng=False)


def test_tokenizers_travel(tmp_path: Path) -> None:
    """An import takes the tokenizer along, generation works with it, and the export has its files and special tokens.

    Mutations: the tokenizer of the folder named instead of the copy; special tokens left to the family's defaults.
    """
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tmp_path / "theirs"
    tiny_models.save("llama2", theirs)
    words = tokenizers.models.WordLevel({f"w{n}": n for n in range(60)} | {"</s>": 60}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (theirs / "generation_config.json").write_text('{"eos_token_id": 60, "bos_token_id": 3}')
    again = there_and_back(theirs, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (theirs / name).read_bytes()
    values = json.loads((again / "config.json").read_text())
    assert (values["eos_token_id"], values["bos_token_id"], values["pad_token_id"]) == (60, 3, None)
    from tools import generate as generate_tool

    line = ["--load", str(tmp_path / "ours"), "--prompt", "w3 w4", "--max-new-tokens", "3", "--temperature", "0"]
    for file in theirs.iterdir():
        file.unlink()
    assert generate_tool.main(line) == 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_export_finds_the_family(tmp_path: Path, model_type: str) -> None:
    """The config.json of each family reads back to what it was written from, for the class itself and automatically.

    Mutations: layer types written of the other kind; a factor of YaRN lost; experts in all layers.
    """
    name = {"llama": "llama3"}.get(model_type, model_type)
    tiny_models.save(name, tmp_path)
    _, ours = read_architecture(tmp_path)
    for asked in (model_type, None):
        family, values = config_of(ours, asked)
        again = architecture_of(flags_of(family, ConfigJson("there", values)))
        assert not list(differences(ours, again))
        assert not list(differences(again, ours))
        assert family.model_type == model_type


@pytest.mark.parametrize(
    ("transformer", "gpt", "named"),
    [
        ({"squared_relu": True, "swiglu": False}, {}, "squared_relu"),
        ({"layernorm_zero_centered_gamma": True}, {}, "layernorm_zero_centered_gamma"),
        ({"window_size": (-1, 3)}, {}, "window_size"),
        ({}, {"rotary_interleaved": True}, "rotary_interleaved"),
    ],
)
def test_models_without_a_family_are_refused(
    tmp_path: Path, transformer: dict[str, Any], gpt: dict[str, Any], named: str
) -> None:
    """Mutation: the first family taken although settings are lost."""
    tiny_models.save("llama2", tmp_path)
    settings = flags_of(*read_config(tmp_path))
    ours = architecture_of({"transformer": settings["transformer"] | transformer, "gpt": settings["gpt"] | gpt})
    with pytest.raises(ConfigError, match=named):
        config_of(ours)


def test_the_settings_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Mutation: the dtype of the folder not taken over."""
    tiny_models.save("mixtral", tmp_path / "theirs", torch.bfloat16)
    ours = architecture_of(settings_to_import(tmp_path / "theirs"))
    folder = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", ours, {"transformer": {"bf16": True}})
    assert read_common(folder)["config"] == {"transformer": {"bf16": True}}
    assert ours.transformer.bf16
    assert ours.transformer.num_moe_experts == 8


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a checkpoint nor a folder of theirs; and nothing is left of an export that failed.

    Mutation: the export writes beside what is there.
    """
    tiny_models.save("llama2", tmp_path / "theirs")
    there_and_back(tmp_path / "theirs", tmp_path)
    line = ["--from", "hf", "--to", "megatron_lite", "--load", tmp_path / "theirs", "--save", tmp_path / "ours"]
    assert convert(*line) == 2
    assert "there is a checkpoint already" in capsys.readouterr().err
    back = ["--from", "megatron_lite", "--to", "hf", "--load", tmp_path / "ours", "--save", tmp_path / "again"]
    assert convert(*back) == 2
    assert "there is something already" in capsys.readouterr().err
    assert convert(*back[:-1], tmp_path / "new", "--model-type", "gpt2") == 2
    assert "normalization" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours", "again"}


def test_models_saved_without_their_head(tmp_path: Path) -> None:
    """Names without the prefix, and tables of masks, as the first GPT-2 folders have them.

    Mutations: the prefix demanded; buffers of masks wanted.
    """
    tiny_models.save("gpt2", tmp_path)
    expected = loaded(tmp_path).state_dict()
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    save_file(tensors, path)
    found = loaded(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
