"""A checkpoint of ours becomes a folder that `transformers` loads, one parameter at a time."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.conversion.architecture import Architecture, empty_model
from megatron_lite.checkpoint.conversion.filling import pieces_of_tensors
from megatron_lite.checkpoint.conversion.pieces import Piece, take
from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface.config_json import CONFIG
from megatron_lite.checkpoint.huggingface.folder import INDEX, SINGLE, require_safetensors
from megatron_lite.checkpoint.huggingface.settings import config_of
from megatron_lite.checkpoint.model_state import compare_names_and_shapes, model_tensors
from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader, tensor_shapes
from megatron_lite.checkpoint.tensor_files import read_tensors
from megatron_lite.errors import ConfigError

LARGEST_FILE = 5 * 10**9
_MODEL = "model."
_EMBEDDING = "model.embedding.word_embeddings.weight"


@torch.no_grad()
def export_checkpoint(
    checkpoint: str | Path,
    save: str | Path,
    model: Architecture,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    largest_file: int = LARGEST_FILE,
    more_config: Mapping[str, Any] | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> str:
    """Write model.safetensors (above `largest_file` bytes several files and an index) and config.json, in one process.

    Args:
        checkpoint: folder of one checkpoint of ours.
        save: folder to make; it must not exist, or be empty.
        model: what the checkpoint's settings say, with the size of the vocabulary.
        model_type: of theirs; default the first that can express the model.
        dtype: of the weights; default the one the model computes with. Biases of routers stay in float32.
        largest_file: bytes.
        more_config: further members of config.json.
        announce: called with the name of each parameter before it is read.

    Returns:
        The model type.

    Raises:
        ConfigError: no model of theirs computes what ours does, or `save` holds something.
        CheckpointError: the checkpoint is damaged, or not of this model.
    """
    require_safetensors()
    family, values = config_of(model, model_type)
    dtype = dtype or model.transformer.params_dtype
    reader = SafeFileSystemReader(checkpoint)
    shapes = {name: shape for name, shape in tensor_shapes(reader.metadata).items() if name.startswith(_MODEL)}
    padded = shapes.get(_EMBEDDING)
    empty = empty_model(model, None if padded is None else padded[0])
    own = model_tensors(empty)
    wanted = {_MODEL + name: tensor for name, tensor in own.items()}
    compare_names_and_shapes(wanted, wanted, shapes, checkpoint)
    pieces = pieces_of_tensors(own, family, empty)
    dtypes = {name: torch.float32 if name.endswith("expert_bias") else dtype for name in own}

    def tensors_of(name: str) -> dict[str, Tensor]:
        announce(name)
        whole = torch.empty_like(own[name], device="cpu")
        read_tensors(reader, {_MODEL + name: whole})
        return {
            piece.name: torch.empty(piece.shape, dtype=dtypes[name]).copy_(take(piece, whole)) for piece in pieces[name]
        }

    config = {
        **values,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "initializer_range": model.transformer.init_method_std,
        **(more_config or {}),
    }
    with _Folder(Path(save)) as folder:
        _write_files(folder, pieces, dtypes, tensors_of, largest_file)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return family.model_type


def _write_files(
    folder: Path,
    pieces: Mapping[str, list[Piece]],
    dtypes: Mapping[str, torch.dtype],
    tensors_of: Callable[[str], dict[str, Tensor]],
    largest_file: int,
) -> None:
    """All tensors, in files that are full in the order of our parameters."""
    from safetensors.torch import save_file

    place, total = _places(pieces, dtypes, largest_file)
    files = max(place.values()) + 1
    names = [SINGLE] if files == 1 else [f"model-{n + 1:05d}-of-{files:05d}.safetensors" for n in range(files)]
    current: dict[str, Tensor] = {}
    number = 0
    for ours in pieces:
        for name, tensor in tensors_of(ours).items():
            if place[name] != number:
                save_file(current, folder / names[number], metadata={"format": "pt"})
                current, number = {}, place[name]
            current[name] = tensor
    save_file(current, folder / names[number], metadata={"format": "pt"})
    if files > 1:
        weight_map = {name: names[file] for name, file in sorted(place.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _places(
    pieces: Mapping[str, list[Piece]], dtypes: Mapping[str, torch.dtype], largest_file: int
) -> tuple[dict[str, int], int]:
    """The number of the file that each tensor goes to, and the bytes of all."""
    place: dict[str, int] = {}
    number = filled = total = 0
    for ours, found in pieces.items():
        for piece in found:
            size = math.prod(piece.shape) * dtypes[ours].itemsize
            if filled and filled + size > largest_file:
                number, filled = number + 1, 0
            if piece.name in place:
                raise CheckpointError(f"{piece.name} would be made of two parameters, {ours} the second.")
            place[piece.name] = number
            filled, total = filled + size, total + size
    return place, total


class _Folder:
    """A new folder that has its name only when all that was written to it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(f"--save is {str(self.path)!r}, where there is something already: name a new folder.")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        if self.path.exists():
            self.path.rmdir()
        os.rename(self.temporary, self.path)
