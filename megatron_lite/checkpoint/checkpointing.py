"""Saving and loading a run: weights, optimizer, random number streams, and everything else as JSON.

A checkpoint is one folder of torch.distributed.checkpoint (DCP) plus `common.json`. Tensors are stored once under
their global names, whatever the layout, so any other layout can read its own parts:

    model.<parameter>                   weights and persistent buffers
    optimizer.state.<parameter>.<key>   moments and step counters; optimizer.grad_scaler.<key>
    rng.<rank>.<stream>                 bytes of a rank's random number streams
"""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.checkpoint import folders
from megatron_lite.checkpoint.agreement import agreed, from_rank_zero, union_of_names, world
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.checksums import (
    CHECKSUMS,
    Checksums,
    as_json,
    checksums_of,
    read_checksums,
    verify_files,
)
from megatron_lite.checkpoint.common import COMMON, FORMAT, FORMAT_VERSION, read_common
from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_lite.checkpoint.layout import current_layout, describe_changes
from megatron_lite.checkpoint.model_state import compare_names_and_shapes, fill_copies, model_tensors
from megatron_lite.checkpoint.replicas import verify_all_replicas
from megatron_lite.checkpoint.rng import get_rng_state, reseed, set_rng_state
from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader, tensor_shapes
from megatron_lite.checkpoint.tensor_files import read_tensors, write_tensors
from megatron_lite.model_chunks import ModelChunks, as_chunks

_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."
_LARGEST_RNG_STATE = 1 << 20


class StatefulOptimizer(Protocol):
    """What a checkpoint needs of an optimizer: its living state as tensors named `optimizer.*`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, allocated even before the first step."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over values laid out like those of `state_dict()`."""


@dataclass
class CheckpointState:
    """What a checkpoint says besides tensors.

    Attributes:
        iteration: where the run continues; 0 after `finetune`.
        folder: the checkpoint that was read.
        extra: what `save_checkpoint` was given (consumed samples, scheduler, ...); empty after `finetune`.
        config: the settings of the run that saved it.
        rng_restored: whether the random number streams continue exactly where they were.
    """

    iteration: int
    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rng_restored: bool = False


def save_checkpoint(
    root: str | Path,
    iteration: int,
    model_chunks: ModelChunks,
    optimizer: StatefulOptimizer | None,
    extra: Mapping[str, Any],
    *,
    config_dict: Mapping[str, Any],
    keep_last: int | None = None,
    retain_interval: int | None = None,
    save_rng: bool = True,
    check_replicas: bool = True,
    background: BackgroundSaver | None = None,
) -> Path:
    """Write a checkpoint and move the tracker to it once every rank's data is durable. Collective over the world.

    If any rank fails, all raise and the previous checkpoint and the tracker stay as they were. With `background` this
    returns as soon as the state is copied to host memory; how the writing ends, that says (`poll`, `finish`).

    Args:
        root: folder of the run's checkpoints, visible to every rank.
        iteration: completed optimizer steps.
        model_chunks: the model of this rank, or its chunks; names are global.
        optimizer: None saves weights without optimizer state.
        extra: any other state of the run, as plain values that JSON can hold.
        config_dict: the run's settings, likewise.
        keep_last: how many of the newest checkpoints to keep; None keeps all.
        retain_interval: checkpoints whose iteration is a multiple of it are kept for good.
        save_rng: store the random number streams of every rank.
        check_replicas: first compare the copies of replicated parameters (`verify_all_replicas`), a few milliseconds.
            If they differ a warning names them and the first copy is saved: losing the run would be worse.
        background: writes while training goes on; no save of its own may be under way.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: with the ranks that failed and why.
    """
    root = Path(root)
    what = f"Saving the checkpoint of iteration {iteration} to {root}"
    how = "" if background is None else ", while training goes on"
    _print_rank_0(f"saving checkpoint at iteration {iteration:7d} to {root} in torch_dist format{how}")
    chunks = as_chunks(model_chunks)
    if check_replicas and parallel_state.model_parallel_is_initialized():
        _warn_of_drift(chunks)
    group = None if background is None else background.group
    assert background is None or not background.is_busy, "finish the save before first"

    def write(folder: Path, tensors: dict[str, Tensor], common: str) -> None:
        checksums = write_tensors(what, folder, tensors, group)
        from_rank_zero(what, lambda: _complete(root, iteration, common, checksums), group)
        _print_rank_0(f"  successfully saved checkpoint from iteration {iteration:7d} to {root}")
        if world()[0] == 0:
            _prune(root, iteration, keep_last, retain_interval)

    def write_or_discard(*content: Any) -> None:
        with _discarding(root, iteration):
            write(*content)

    with _discarding(root, iteration):
        folder = Path(from_rank_zero(what, lambda: str(folders.open_temporary_folder(root, iteration))))
        tensors = agreed(what, lambda: _tensors_to_save(chunks, optimizer, save_rng))
        common = agreed(what, lambda: _common(iteration, current_layout(chunks[0]), extra, config_dict))
        if background is not None:
            tensors = agreed(what, lambda: background.copies(tensors))
    if background is None:
        write_or_discard(folder, tensors, common)
    else:
        background.start(functools.partial(write_or_discard, folder, tensors, common))
    return folders.checkpoint_folder(root, iteration)


@contextmanager
def _discarding(root: Path, iteration: int) -> Iterator[None]:
    """What belongs to one save: if it fails, what it wrote is removed, and the error says what is left."""
    try:
        yield
    except CheckpointError as error:
        if world()[0] == 0:
            folders.discard_temporary_folder(root, iteration)
        raise CheckpointError(f"{error}\n{_what_remains(root)}") from error


def load_checkpoint(
    root: str | Path,
    model_chunks: ModelChunks,
    optimizer: StatefulOptimizer | None = None,
    *,
    load_optimizer: bool = True,
    load_rng: bool = True,
    finetune: bool = False,
    ckpt_step: int | None = None,
    exit_on_missing_checkpoint: bool = False,
    verify: bool = False,
    fallback: bool = True,
) -> CheckpointState | None:
    """Restore a run, in place, at this layout or another. Collective over the world.

    At the layout of the save every random number stream continues bit for bit; at another one they are seeded anew from
    the run's seed and the iteration, and a line says so.

    Args:
        root: folder of checkpoints, with a tracker.
        model_chunks: the model of this rank, or its chunks, already wrapped for data parallelism.
        optimizer: None loads no optimizer state.
        load_optimizer: False leaves the optimizer's state as it is.
        load_rng: False leaves the random number streams as they are.
        finetune: weights only, and the run starts at iteration 0.
        ckpt_step: the iteration to load instead of the one the tracker names.
        exit_on_missing_checkpoint: raise if there is no checkpoint, instead of starting anew.
        verify: first compare every file with its checksum; the ranks share the files.
        fallback: where the checkpoint that the tracker names is damaged, take the newest earlier one that is whole.

    Returns:
        What else the checkpoint holds, or None if there is none.

    Raises:
        CheckpointError: the checkpoint is missing though asked for, damaged, unsafe, or of another model.
    """
    root = Path(root)
    choices = from_rank_zero(f"Finding a checkpoint in {root}", lambda: _choices(root, ckpt_step, fallback))
    if not choices:
        if exit_on_missing_checkpoint:
            raise CheckpointError(f"There is no checkpoint in {root}, and --exit-on-missing-checkpoint is set.")
        _print_rank_0(f"WARNING: could not find {root / folders.TRACKER}; no checkpoint is loaded, starting anew")
        return None
    load = functools.partial(
        _load_one, root, as_chunks(model_chunks), optimizer, load_optimizer, load_rng, finetune, verify
    )
    for iteration, earlier in itertools.pairwise([*choices, None]):
        assert iteration is not None
        try:
            return load(iteration)
        except DamagedCheckpointError as error:
            if earlier is None:
                raise
            _print_rank_0(
                f"WARNING: {error}\nThe checkpoint of iteration {earlier} is loaded instead; the iterations since are "
                "trained again. (--no-fallback stops here.)"
            )
    raise AssertionError("the last choice returns or raises")


def _load_one(
    root: Path,
    chunks: list[nn.Module],
    optimizer: StatefulOptimizer | None,
    load_optimizer: bool,
    load_rng: bool,
    finetune: bool,
    verify: bool,
    iteration: int,
) -> CheckpointState:
    """load_checkpoint, of one iteration."""
    _print_rank_0(f" loading checkpoint from {root} at iteration {iteration}")
    what = f"Finding a checkpoint in {root}"
    folder = Path(from_rank_zero(what, lambda: str(folders.find_checkpoint(root, iteration))))
    if verify:
        _verify(folder)
    # With the seed of this run, that of rank 0, for fresh streams.
    common, seed = from_rank_zero(f"Reading {folder}", lambda: (read_common(folder), torch.initial_seed()))
    reader = agreed(f"Reading {folder}", lambda: SafeFileSystemReader(folder))
    with_optimizer = optimizer is not None and load_optimizer and not finetune
    tensors = _tensors_to_load(chunks, optimizer if with_optimizer else None, reader, folder)
    changes = describe_changes(common["layout"], current_layout(chunks[0])) if common["layout"] else ""
    rng: dict[str, Tensor] = {}
    if load_rng and not finetune and not changes:
        rng = agreed(f"Reading {folder}", lambda: _rng_to_load(reader, folder))
    read_tensors(reader, tensors | rng)
    fill_copies(chunks)

    if with_optimizer:
        assert optimizer is not None
        optimizer.load_state_dict({n: tensor for n, tensor in tensors.items() if n.startswith(_OPTIMIZER)})
    iteration = 0 if finetune else common["iteration"]
    if rng:
        set_rng_state({name.split(".", 2)[2]: state for name, state in rng.items()})
    elif load_rng and not finetune:
        why = f"saved at another layout ({changes})" if changes else "not in the checkpoint"
        _print_rank_0(f" random number streams: {why}; seeded anew with {reseed(seed, iteration)}")
    _print_rank_0(f" successfully loaded checkpoint from {root} at iteration {iteration}")
    extra = {} if finetune else common["extra"]
    return CheckpointState(iteration, folder, extra, common["config"], rng_restored=bool(rng))


def _verify(folder: Path) -> None:
    """Read every file, each rank its share, and compare it with its checksum. Collective over the world."""
    rank, size = world()
    checksums = from_rank_zero(f"Verifying {folder}", lambda: read_checksums(folder))
    mine = {name: checksums[name] for name in sorted(checksums)[rank::size]}
    agreed(f"Verifying {folder}", lambda: verify_files(folder, mine))
    total = sum(length for length, _ in checksums.values())
    _print_rank_0(f" verified the checksums of {len(checksums)} files, {total:,} bytes, in {folder}")


def load_weights(folder: str | Path, model_chunks: ModelChunks) -> None:
    """Fill a model with the weights of one checkpoint folder, at any layout. Collective over the world.

    Raises:
        CheckpointError: the checkpoint is damaged, unsafe, or of another model.
    """
    folder = Path(folder)
    reader = agreed(f"Reading {folder}", lambda: SafeFileSystemReader(folder))
    read_tensors(reader, _tensors_to_load(as_chunks(model_chunks), None, reader, folder))
    fill_copies(model_chunks)


def _warn_of_drift(chunks: list[nn.Module]) -> None:
    try:
        verify_all_replicas(chunks)
    except CheckpointError as error:
        _print_rank_0(
            f"WARNING: {error}\nThe checkpoint holds the copy of the first rank; resuming from it ends the drift."
        )


def _tensors_to_save(chunks: list[nn.Module], optimizer: StatefulOptimizer | None, save_rng: bool) -> dict[str, Tensor]:
    tensors = {_MODEL + name: tensor for name, tensor in model_tensors(chunks).items()}
    if optimizer is not None:
        tensors.update(_optimizer_tensors(optimizer))
    if save_rng:
        rank = world()[0]
        tensors.update({f"{_RNG}{rank:05d}.{name}": state for name, state in get_rng_state().items()})
    return tensors


def _optimizer_tensors(optimizer: StatefulOptimizer) -> dict[str, Tensor]:
    state = dict(optimizer.state_dict())
    for name, value in state.items():
        if not name.startswith(_OPTIMIZER) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"the optimizer's state has {name!r} of type {type(value).__name__}, but a checkpoint stores tensors "
                f"named {_OPTIMIZER}*."
            )
    return state


def _common(
    iteration: int, layout: Mapping[str, int | str], extra: Mapping[str, Any], config_dict: Mapping[str, Any]
) -> str:
    """The content of `common.json`, put together before training goes on and changes it; an import has no layout."""
    common = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "iteration": iteration,
        "torch_version": str(torch.__version__),
        "layout": dict(layout),
        "extra": dict(extra),
        "config": dict(config_dict),
    }
    return json.dumps(common, indent=1)


def _complete(root: Path, iteration: int, common: str, checksums: Checksums) -> str:
    folder = folders.temporary_folder(root, iteration)
    folders.write_durably(folder / COMMON, common.encode())
    folders.write_durably(folder / CHECKSUMS, as_json(checksums | checksums_of(folder, [COMMON])).encode())
    return str(folders.publish(root, iteration))


def _prune(root: Path, iteration: int, keep_last: int | None, retain_interval: int | None) -> None:
    """Delete old checkpoints. The new one is safe already, so a failure here is only worth a line."""
    try:
        folders.prune(root, iteration, keep_last, retain_interval)
    except OSError as error:
        _print_rank_0(f"WARNING: an old checkpoint in {root} could not be deleted: {error}")


def _what_remains(root: Path) -> str:
    iterations = folders.complete_iterations(root)
    if not iterations:
        return f"There is no earlier checkpoint in {root}."
    return f"Earlier checkpoints in {root} are untouched: {', '.join(map(str, iterations))}."


def _choices(root: Path, ckpt_step: int | None, fallback: bool) -> list[int]:
    """The iterations to try, in order; none if there is no checkpoint."""
    if ckpt_step is not None:
        return [ckpt_step]
    complete = folders.complete_iterations(root)[::-1]
    try:
        latest = folders.read_tracker(root)
    except DamagedCheckpointError as error:
        if not fallback or not complete:
            raise
        _print_rank_0(f"WARNING: {error}\nThe newest checkpoint is loaded. (--no-fallback stops here.)")
        return complete
    if latest is None:
        return []
    return [latest, *(iteration for iteration in complete if fallback and iteration < latest)]


def _tensors_to_load(
    chunks: list[nn.Module], optimizer: StatefulOptimizer | None, reader: SafeFileSystemReader, folder: Path
) -> dict[str, Tensor]:
    what = f"Reading {folder}"
    wanted = agreed(what, lambda: _tensors_to_save(chunks, optimizer, save_rng=False))
    wanted_anywhere = union_of_names(wanted)
    shapes = tensor_shapes(reader.metadata)
    kinds = (_MODEL,) if optimizer is None else (_MODEL, _OPTIMIZER)
    stored = {name: shape for name, shape in shapes.items() if name.startswith(kinds)}

    def compare() -> None:
        if optimizer is not None and not any(name.startswith(_OPTIMIZER) for name in stored):
            raise CheckpointError(f"{folder} holds no optimizer state: add --no-load-optim to start with a fresh one.")
        compare_names_and_shapes(wanted, wanted_anywhere, stored, folder)

    agreed(what, compare)
    return wanted


def _rng_to_load(reader: SafeFileSystemReader, folder: Path) -> dict[str, Tensor]:
    prefix = f"{_RNG}{world()[0]:05d}."
    shapes = {name: shape for name, shape in tensor_shapes(reader.metadata).items() if name.startswith(prefix)}
    for name, shape in shapes.items():
        if len(shape) != 1 or shape.numel() > _LARGEST_RNG_STATE:
            raise CheckpointError(f"{name} in {folder} has shape {list(shape)}: not the state of a generator.")
    return {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}


def _print_rank_0(text: str) -> None:
    if world()[0] == 0:
        print(text, flush=True)
