"""The tensors and settings of a Megatron-LM checkpoint in the format `torch_dist`, and nothing of it unpickled.

A folder `iter_0001000` holds what torch.distributed.checkpoint writes: `.metadata` and `__0_0.distcp`, ... Layers that
are alike are stacked, in one tensor with the layer as its first dimension; otherwise each has a tensor with its number
in the name. Settings are the arguments of the run, pickled in the entry `common_state`, or in a file common.pt of older
versions. Here every layer has a name of its own, and what was named after Transformer Engine's modules is named as in
our model.
"""

import io
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_lite.checkpoint.conversion.pieces import Box
from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_lite.checkpoint.folders import checkpoint_folder, complete_iterations
from megatron_lite.checkpoint.inert_pickle import Record, read_inert
from megatron_lite.checkpoint.safe_reader import METADATA, read_metadata
from megatron_lite.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
COMMON_STATE = "common_state/shard_0_1"
_MASTERS = "optimizer.state.fp32_param."
_MOMENTS = {"exp_avg": "optimizer.state.exp_avg.", "exp_avg_sq": "optimizer.state.exp_avg_sq."}
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine_state", "chained_")
# Megatron's arguments are some ten thousand bytes.
_LARGEST_PICKLE = 1 << 26

# Names within a layer that depend on the modules a run was made of -> ours.
_SPELLINGS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.experts.experts.linear_fc1.weight": "mlp.experts.weight1",
    "mlp.experts.experts.linear_fc2.weight": "mlp.experts.weight2",
    "mlp.experts.experts.linear_fc1.bias": "mlp.experts.bias1",
    "mlp.experts.experts.linear_fc2.bias": "mlp.experts.bias2",
    "mtp_model_layer.": "transformer_layer.",
}
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")


class MegatronTensors:
    """Tensors of a checkpoint by our names of the parameters they belong to, and slices of them.

    Args:
        folder: of the checkpoint.
        metadata: of the checkpoint.
        places: name that says which parameter a tensor belongs to -> the name it is stored under.

    Attributes:
        shapes: name -> shape.
    """

    def __init__(self, folder: Path, metadata: Metadata, places: Mapping[str, str]) -> None:
        self.folder, self._metadata = folder, metadata
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, int | None]] = {}
        for name, stored in places.items():
            self._add(name, stored)

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, on the CPU, in the dtype it is stored in."""
        stored, layer = self._places[name]
        entry = _tensor_entry(self._metadata, stored)
        wanted = [range(*one.indices(size)) for one, size in zip(box, self.shapes[name], strict=True)]
        if layer is not None:
            wanted.insert(0, range(layer, layer + 1))
        part = torch.empty([len(one) for one in wanted], dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place, source = _overlap(wanted, chunk.offsets, chunk.sizes)
            if place is not None:
                content = stored_bytes(self.folder, self._metadata, MetadataIndex(stored, chunk.offsets))
                what = f"{stored} in {self.folder}"
                part[place] = _tensor_of(content, chunk.sizes, part.dtype, what)[source]
        return part[0] if layer is not None else part

    def _add(self, name: str, stored: str) -> None:
        """Name a tensor, or each layer of a stack."""
        shape = tuple(_tensor_entry(self._metadata, stored).size)
        match = _LAYER.fullmatch(name)
        if match is None or match.group(1):
            self._place(_respelled(name), shape, stored, None)
            return
        if not shape:
            raise CheckpointError(f"{name} in {self.folder} is a single number, but should have a dimension of layers.")
        for layer in range(shape[0]):
            self._place(f"decoder.layers.{layer}.{_respelled(match.group(2))}", shape[1:], stored, layer)

    def _place(self, name: str, shape: tuple[int, ...], stored: str, layer: int | None) -> None:
        if name in self.shapes:
            raise CheckpointError(f"{self.folder} holds {name} twice, the second time as {stored}.")
        self.shapes[name], self._places[name] = shape, (stored, layer)


class MegatronCheckpoint:
    """One checkpoint.

    Args:
        folder: of the checkpoint.

    Attributes:
        weights: of the model; masters in float32 stand for them where the checkpoint has them.
        moments: Adam's "exp_avg" and "exp_avg_sq", where they are stored parameter by parameter; else empty.
        dtypes: of the weights the model computes with.
        arguments: of the run that wrote it, as far as they are plain values.
        iteration: it was written at.
        schedule: that of the learning rate, and where it stands.
        updates: that the optimizer has made; None if that is not known.

    Raises:
        CheckpointError: the files are damaged, or hold something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        metadata = read_metadata(self.folder, with_bytes=True)
        entries = {n: e for n, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
        names = [name for name in entries if not name.startswith(_NOT_WEIGHTS)]
        self.dtypes = {entries[name].properties.dtype for name in names}
        places = {name: _MASTERS + name if _MASTERS + name in entries else name for name in names}
        self.weights = MegatronTensors(self.folder, metadata, places)
        self.moments: dict[str, MegatronTensors] = {}
        for key, prefix in _MOMENTS.items():
            places = {name: prefix + name for name in names if prefix + name in entries}
            if places:
                self.moments[key] = MegatronTensors(self.folder, metadata, places)
        common, numbers = self._common_state(metadata)
        self.arguments = _plain_arguments(common.get("args"), self.folder)
        iteration, schedule = common.get("iteration"), common.get("opt_param_scheduler")
        self.iteration = iteration if type(iteration) is int else 0
        self.schedule = schedule if isinstance(schedule, dict) and all(map(_is_plain, schedule.values())) else {}
        self.updates = _updates(common.get("optimizer"), numbers)

    def _common_state(self, metadata: Metadata) -> tuple[dict[str, Any], Callable[[Record], float | None]]:
        """What the run saved beside tensors, and a reader of the numbers it saved as tensors."""
        path = self.folder / COMMON
        if MetadataIndex(COMMON_STATE) in metadata.storage_data:
            content = stored_bytes(self.folder, metadata, MetadataIndex(COMMON_STATE))
            where = f"{COMMON_STATE} in {self.folder}"
        elif path.is_file():
            content, where = path.read_bytes(), str(path)
        else:
            raise CheckpointError(
                f"{self.folder} holds neither {COMMON_STATE} nor {COMMON}, in which Megatron-LM keeps the arguments of "
                "the run: it is no checkpoint of --ckpt-format torch_dist."
            )
        state, numbers = _saved_object(content, where)
        state = state[0] if isinstance(state, list) and len(state) == 1 else state
        if not isinstance(state, dict):
            raise CheckpointError(f"{where} holds a {type(state).__name__}, but should hold the state of a run.")
        return state, numbers


def find_megatron(root: str | Path, step: int | None = None) -> Path:
    """The folder of a checkpoint: `root` itself, or the one that the tracker in it names, or of iteration `step`.

    Raises:
        ConfigError: there is none.
    """
    root = Path(root)
    if (root / METADATA).is_file():
        return root
    tracker = root / TRACKER
    named = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    found = checkpoint_folder(root, step if step is not None else int(named) if named.isdecimal() else 0)
    if named == "release" and step is None:
        found = root / "release"
    if (found / METADATA).is_file():
        return found
    if any(found.glob("mp_rank_*")):
        raise ConfigError(
            f"{found} is a checkpoint of --ckpt-format torch, pickles for each rank, which can run code on the machine "
            "that opens them and are not read: load it with Megatron-LM and save it with --ckpt-format torch_dist."
        )
    there = ", ".join(map(str, complete_iterations(root))) or "none"
    raise ConfigError(
        f"{root} holds no Megatron-LM checkpoint in the format torch_dist ({found / METADATA} is missing; iterations "
        f"there: {there}): name the folder that --save named, or choose with --ckpt-step."
    )


def _tensor_entry(metadata: Metadata, stored: str) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[stored]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def stored_bytes(folder: Path, metadata: Metadata, index: MetadataIndex) -> bytes:
    """What a checkpoint holds under an index, as it stands in its file."""
    place = metadata.storage_data[index]
    path = folder / place.relative_path
    try:
        with open(path, "rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    if len(content) < place.length:
        raise DamagedCheckpointError(f"{path} is truncated: {index.fqn} reaches behind its end.")
    return content


def _respelled(name: str) -> str:
    for theirs, ours in _SPELLINGS.items():
        name = name.replace(theirs, ours)
    return name


def _overlap(
    wanted: list[range], offsets: torch.Size, sizes: torch.Size
) -> tuple[tuple[slice, ...] | None, tuple[slice, ...]]:
    """Where a chunk goes in the wanted part, and what of the chunk; (None, ()) where they do not meet."""
    place, source = [], []
    for one, offset, size in zip(wanted, offsets, sizes, strict=True):
        first, stop = max(one.start, offset), min(one.stop, offset + size)
        if first >= stop:
            return None, ()
        place.append(slice(first - one.start, stop - one.start))
        source.append(slice(first - offset, stop - offset))
    return tuple(place), tuple(source)


def _tensor_of(content: bytes, sizes: torch.Size, dtype: torch.dtype, what: str) -> Tensor:
    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedCheckpointError(f"{what} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(tensor, Tensor) or tensor.shape != sizes or tensor.dtype != dtype:
        raise DamagedCheckpointError(f"{what} is not what {METADATA} says: {list(sizes)} of {dtype}.")
    return tensor


def _saved_object(content: bytes, what: str) -> tuple[Any, Callable[[Record], float | None]]:
    """What torch.save wrote, as plain data and records, and a reader of tensors of a single float32 in it."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        (name,) = [one for one in archive.namelist() if one.endswith("/data.pkl")]
        if archive.getinfo(name).file_size > _LARGEST_PICKLE:
            raise CheckpointError(f"{what} is larger than the arguments of a run can be.")
        state = read_inert(archive.read(name))
    except CheckpointError:
        raise
    except Exception as error:
        raise DamagedCheckpointError(f"{what} is damaged: {type(error).__name__}: {error}") from error

    def number(record: Record) -> float | None:
        try:
            storage, offset, *_ = record.arguments
            (_, kind, key, *_) = storage.arguments[0]
            if kind.__name__ != "FloatStorage" or offset != 0:
                return None
            return float(struct.unpack("<f", archive.read(f"{name.removesuffix('data.pkl')}data/{key}"))[0])
        except Exception:
            return None

    return state, number


def _updates(optimizer: Any, number: Callable[[Record], float | None]) -> float | None:
    """Adam's count of updates, which is kept once for each optimizer of a run; None if it is not there, or several."""
    found: set[float | None] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                if key in ("step", "common_step") and not isinstance(entry, dict | list):
                    found.add(number(entry) if isinstance(entry, Record) else entry)
                else:
                    look(entry)
        elif isinstance(value, list):
            for entry in value:
                look(entry)

    look(optimizer)
    count = found.pop() if len(found) == 1 else None
    return float(count) if isinstance(count, int | float) and count >= 0 else None


def _plain_arguments(namespace: Any, folder: Path) -> dict[str, Any]:
    """The arguments of the run that are texts, numbers, lists of them, or None."""
    if not isinstance(namespace, Record) or not isinstance(namespace.state, dict):
        raise CheckpointError(f"{folder} does not hold the arguments of the run, from which to know the model.")
    return {str(name): value for name, value in namespace.state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
