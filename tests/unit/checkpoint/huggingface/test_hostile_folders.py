"""Folders that are damaged, of another model, or made to do harm: an error in words, and nothing read beyond them."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint import CheckpointError, DamagedCheckpointError
from megatron_lite.checkpoint.huggingface import load_huggingface, read_architecture
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_model import build_gpt_model
from tests.unit.checkpoint.huggingface import tiny_models

from safetensors.torch import load_file, save_file  # isort: skip  # behind the check that the package is there

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny_models.save("llama2", folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def load(folder: Path) -> None:
    _, ours = read_architecture(folder)
    load_huggingface(folder, build_gpt_model(ours.transformer, ours.gpt, tiny_models.VOCAB, tiny_models.LENGTH))


def change(folder: Path, step: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    step(tensors)
    save_file(tensors, folder / "model.safetensors")


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def names(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


def test_a_sound_folder_loads(folder: Path) -> None:
    """With one file, and with an index."""
    load(folder)
    index(folder, dict.fromkeys(names(folder), "model-00001-of-00001.safetensors"))
    load(folder)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "a\\x.safetensors", ""]
)
def test_an_index_cannot_leave_the_folder(folder: Path, file: str) -> None:
    """Mutation: names joined to the folder as they are."""
    shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
    index(folder, dict.fromkeys(names(folder), file))
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        load(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "x"])
def test_a_damaged_index(folder: Path, weight_map: object) -> None:
    """Mutation: an index trusted to be a mapping of texts."""
    index(folder, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load(folder)


def test_an_index_of_other_tensors(folder: Path) -> None:
    """It names a file that is not there, or a tensor that its file has not.

    Mutations: the exceptions of the package.
    """
    known = names(folder)
    index(folder, dict.fromkeys(known, "model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors is missing"):
        load(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys([*known, "more"], "model-00001-of-00001.safetensors")}))
    with pytest.raises(CheckpointError, match="has no tensor more"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_files(folder: Path, kept: float) -> None:
    """Mutation: the exceptions of the package."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(folder)


def test_a_missing_tensor(folder: Path) -> None:
    """Mutation: what nobody fills keeps its initial value."""
    change(folder, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=rf"(?s)not in the folder \(1\).*{Q_PROJ}"):
        load(folder)


def test_an_extra_tensor(folder: Path) -> None:
    """Mutations: what nobody wants is left; tables of rotary positions are wanted."""
    change(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    load(folder)
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    with pytest.raises(CheckpointError, match=r"(?s)of no use \(1\).*q_norm"):
        load(folder)


@pytest.mark.parametrize("shape", [(33, 32), (32, 31), (32,), (32, 32, 1)])
def test_another_shape(folder: Path, shape: tuple[int, ...]) -> None:
    """Mutation: shapes compared by the number of rows, or by whether the slices can be read."""
    change(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=r"(?s)another shape \(1\).*\[32, 32\] in this model"):
        load(folder)


def test_another_dtype(folder: Path) -> None:
    """Integers and 8 bit numbers have scales elsewhere. Mutation: read as they are."""
    change(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match="dtype F8_E4M3"):
        load(folder)


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the pickle read where there are no safetensors."""
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ConfigError, match=r"(?s)pytorch_model\.bin.*save_pretrained\(\)"):
        load(folder)
    assert not (folder / "exploded").exists()


def test_an_empty_folder(folder: Path) -> None:
    """Mutation: no weights taken for nothing to read."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(folder)


def test_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: an ImportError."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron_lite\[hf\]'"):
        load(folder)


def test_damage_is_told_from_another_model(folder: Path) -> None:
    """Mutation: one kind of error for both."""
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert isinstance(caught.value, DamagedCheckpointError)
