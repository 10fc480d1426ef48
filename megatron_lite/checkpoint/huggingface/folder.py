"""The tensors of a Hugging Face folder, in `*.safetensors` only: nothing is ever unpickled."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from megatron_lite.checkpoint.conversion.pieces import Box
from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_lite.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")


def require_safetensors() -> ModuleType:
    """The optional package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ConfigError(
            f"Hugging Face weights need the Python package 'safetensors', which cannot be imported ({error}); "
            "install it with: pip install 'megatron_lite[hf]'"
        ) from error


def has_safetensors(folder: str | Path) -> bool:
    """Return True if a folder holds tensors that can be read."""
    return any((Path(folder) / name).is_file() for name in (SINGLE, INDEX))


def find_safetensors(folder: str | Path) -> Path:
    """The one file of a folder's tensors, or the index of several.

    Raises:
        ConfigError: there is neither.
    """
    folder = Path(folder)
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles:
        raise ConfigError(
            f"{folder} holds its weights in {pickles[0]} only, a pickle, which can run code on the machine "
            "that opens it and is not read: load the model with transformers, if you trust it, and write it with "
            "save_pretrained(), which makes model.safetensors."
        )
    raise ConfigError(
        f"{folder} holds neither {SINGLE} nor {INDEX}: name a folder that a Hugging Face model was saved to."
    )


class TensorFolder:
    """Names and shapes of the tensors of a folder, and slices of them.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and the files it names.
        prefix: added to the names where no tensor has it, since a model saved without its head lacks it.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> F32, BF16 ...

    Raises:
        ConfigError: the folder holds no safetensors.
        CheckpointError: they are damaged, or the index names files outside of the folder or tensors that are not there.
    """

    def __init__(self, folder: str | Path, prefix: str = "") -> None:
        self.folder = Path(folder)
        safetensors = require_safetensors()
        self._open: Any = safetensors.safe_open
        self._error: type[Exception] = safetensors.SafetensorError
        self._files: dict[Path, Any] = {}
        self._places: dict[str, tuple[Any, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name, path in sorted(self._names().items()):
            self._add(name, path)
        if prefix and not any(name.startswith(prefix) for name in self.shapes):
            self._places = {_with_prefix(name, prefix): place for name, place in self._places.items()}
            self.shapes = {_with_prefix(name, prefix): shape for name, shape in self.shapes.items()}
            self.dtypes = {_with_prefix(name, prefix): dtype for name, dtype in self.dtypes.items()}

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, on the CPU, in the dtype it is stored in."""
        file, stored = self._places[name]
        try:
            part: Tensor = file.get_slice(stored)[box]
        except Exception as error:  # the package raises several kinds for bytes that do not make a tensor
            raise DamagedCheckpointError(f"{name} in {self.folder} cannot be read: {error}") from error
        return part

    def _names(self) -> dict[str, Path]:
        """Name of each tensor -> its file."""
        path = find_safetensors(self.folder)
        if path.name == SINGLE:
            return dict.fromkeys(self._opened(path).keys(), path)
        named = {name: self._file_of_index(name, file) for name, file in _weight_map(path).items()}
        # Transformers takes all tensors of these files, whether the index names them or not.
        for file in sorted(set(named.values())):
            held = self._opened(file).keys()
            for name in held:
                if named.setdefault(name, file) != file:
                    raise CheckpointError(
                        f"{name} is in {file} and in {named[name].name}, and there is no telling which is meant: "
                        "remove one of them."
                    )
        return named

    def _file_of_index(self, name: str, file: str) -> Path:
        if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{self.folder / INDEX} is refused: it says that {name} is in {file!r}, which is not a safetensors "
                "file of this folder."
            )
        return self.folder / file

    def _opened(self, path: Path) -> Any:
        if path not in self._files:
            if not path.is_file():
                raise DamagedCheckpointError(
                    f"{path} is missing, which {self.folder / INDEX} names: download it again."
                )
            try:
                self._files[path] = self._open(path, framework="pt", device="cpu")
            except (self._error, OSError) as error:
                raise DamagedCheckpointError(f"{path} is damaged or cut short: {error}. Download it again.") from error
        return self._files[path]

    def _add(self, name: str, path: Path) -> None:
        file = self._opened(path)
        try:
            described = file.get_slice(name)
        except self._error as error:
            raise DamagedCheckpointError(f"{path} has no tensor {name}, which the index says it has.") from error
        dtype = described.get_dtype()
        if dtype not in DTYPES and not name.endswith(("bias", "position_ids")):
            raise CheckpointError(
                f"{name} in {path} is of dtype {dtype}, but weights must be of {', '.join(DTYPES)}: take the model's "
                "bfloat16 weights."
            )
        shape = tuple(described.get_shape())
        if 0 in shape:
            # Shared experts of no width, as transformers has them for n_shared_experts 0.
            return
        self._places[name], self.shapes[name] = (file, name), shape
        self.dtypes[name] = dtype


def _with_prefix(name: str, prefix: str) -> str:
    return name if name == "lm_head.weight" else prefix + name


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        sound = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{index} is damaged: {type(error).__name__}: {error}") from error
    if not sound:
        raise DamagedCheckpointError(f"{index} is damaged: its weight_map does not name a file for each tensor.")
    return weight_map
