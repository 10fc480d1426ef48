"""Saving and loading in one process: what is restored, what is refused, and what a crash leaves behind."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import megatron_lite.checkpoint.rng
import megatron_lite.tensor_parallel.random
from megatron_lite.checkpoint import (
    CheckpointError,
    CheckpointState,
    folders,
    load_checkpoint,
    load_weights,
    read_common,
    read_tracker,
    save_checkpoint,
)
from megatron_lite.checkpoint.model_state import compare_names_and_shapes
from megatron_lite.checkpoint.rng import get_rng_state, set_rng_state
from megatron_lite.checkpoint.safe_reader import read_metadata, tensor_shapes
from megatron_lite.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from tests.unit.checkpoint.tiny import TinyModel, TinyOptimizer, equal, fill, snapshot

CONFIG = {"transformer": {"num_layers": 2, "layernorm_epsilon": 1e-5}}


def save(root: Path, iteration: int, start: float, **options: Any) -> tuple[TinyModel, TinyOptimizer]:
    model = TinyModel(start)
    optimizer = TinyOptimizer(model, start)
    extra = {"consumed": iteration * 8, "lr": 0.1 + start}
    save_checkpoint(root, iteration, model, optimizer, extra, config_dict=CONFIG, **options)
    return model, optimizer


def load(root: Path, **options: Any) -> tuple[CheckpointState | None, TinyModel, TinyOptimizer]:
    model = TinyModel(-1000.0)
    optimizer = TinyOptimizer(model, -1000.0)
    return load_checkpoint(root, model, optimizer, **options), model, optimizer


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    model_parallel_cuda_manual_seed(seed)


def draw() -> list[Any]:
    """One number of every stream."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(2).tolist()
    return [random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist(), tracked]


def test_round_trip_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = save(tmp_path, 100, 0.1)
    state, loaded_model, loaded_optimizer = load(tmp_path)
    assert equal(snapshot(model, optimizer), snapshot(loaded_model, loaded_optimizer))
    assert state is not None
    assert (state.iteration, state.extra, state.config) == (100, {"consumed": 800, "lr": 0.1 + 0.1}, CONFIG)
    assert state.folder == tmp_path / "iter_0000100"
    output = capsys.readouterr().out
    assert f"saving checkpoint at iteration     100 to {tmp_path} in torch_dist format" in output
    assert f"  successfully saved checkpoint from iteration     100 to {tmp_path}" in output
    assert f" successfully loaded checkpoint from {tmp_path} at iteration 100" in output


def test_the_folder_holds_no_pickled_objects_and_no_path_of_this_machine(tmp_path: Path) -> None:
    save(tmp_path, 3, 0.0)
    folder = tmp_path / "iter_0000003"
    files = [".metadata", "__0_0.distcp", "checksums.json", "common.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()
    common = json.loads((folder / "common.json").read_text())
    assert common["format"] == "megatron_lite"
    assert common["layout"]["world_size"] == 1


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.0)
    _, model, _ = load(tmp_path)
    assert model.output.weight is model.embedding.weight
    stored = tensor_shapes(read_metadata(tmp_path / "iter_0000001"))
    assert [name for name in stored if name.startswith("model.")] == [
        "model.counts",
        "model.embedding.weight",
        "model.norm.weight",
        "model.norm.bias",
    ]


def test_every_random_stream_continues(tmp_path: Path) -> None:
    seed_all(5)
    draw()
    save(tmp_path, 1, 0.0)
    expected = [draw(), draw()]
    seed_all(7)
    state, *_ = load(tmp_path)
    assert state is not None
    assert state.rng_restored
    assert [draw(), draw()] == expected


class StandIn:
    """A GPU's generator in a process without one. The run computes on it where `used` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used = False
        self.generator = torch.Generator()
        of_cpu = torch.manual_seed

        def manual_seed(seed: int) -> torch.Generator:
            self.generator.manual_seed(seed)
            return of_cpu(seed)

        monkeypatch.setattr(torch, "manual_seed", manual_seed)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.generator.get_state)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.generator.set_state)
        for module in (megatron_lite.checkpoint.rng, megatron_lite.tensor_parallel.random):
            monkeypatch.setattr(module, "computes_on_gpu", lambda: self.used)

    def draw(self) -> list[float]:
        """Numbers of the default stream and of the model-parallel one."""
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand((), generator=self.generator).item()
        return [torch.rand((), generator=self.generator).item(), tracked]


def test_states_of_cpus_leave_the_streams_of_a_gpu_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: streams of the tracker without the GPU's part, which draw from the default one and rewind it."""
    gpu = StandIn(monkeypatch)
    seed_all(7)
    states = get_rng_state()
    expected = draw()
    gpu.used = True
    seed_all(5)
    numbers = gpu.draw() + gpu.draw()
    assert len(set(numbers)) == 4
    seed_all(5)
    set_rng_state(states)
    assert gpu.draw() + gpu.draw() == numbers
    set_rng_state(states)
    assert draw() == expected


def test_every_stream_of_a_gpu_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutations: a stream of the GPU that is not saved, or not restored."""
    gpu = StandIn(monkeypatch)
    gpu.used = True
    seed_all(5)
    gpu.draw()
    save(tmp_path, 1, 0.0)
    expected = gpu.draw(), draw()
    seed_all(7)
    load(tmp_path)
    assert (gpu.draw(), draw()) == expected
    assert "seeded anew" not in capsys.readouterr().out


def test_the_states_of_a_gpu_are_left_out_on_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would keep every state it is given for the GPU that is not there, or make a context on one not in use.

    Mutations: the streams of the GPU set all the same, default or tracked; kept for the next checkpoint.
    """
    with monkeypatch.context() as patch:
        gpu = StandIn(patch)
        gpu.used = True
        seed_all(5)
        save(tmp_path, 1, 0.0)
        expected = draw()
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: pytest.fail("a state set, or kept, for a GPU"))
    load(tmp_path)
    save(tmp_path / "next", 1, 0.0)
    assert draw() == expected
    stored = tensor_shapes(read_metadata(tmp_path / "next" / "iter_0000001"))
    assert not [name for name in stored if "cuda" in name]


def test_saving_draws_nothing(tmp_path: Path) -> None:
    seed_all(5)
    expected = draw()
    seed_all(5)
    save(tmp_path, 1, 0.0)
    assert draw() == expected


def test_another_layout_seeds_the_streams_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed_all(5)
    save(tmp_path, 1, 0.0)
    path = tmp_path / "iter_0000001" / "common.json"
    common = json.loads(path.read_text())
    common["layout"] |= {"device": "cuda", "world_size": 4, "tp": 2}
    path.write_text(json.dumps(common))
    draws = []
    for _ in range(2):
        seed_all(5)
        state, *_ = load(tmp_path)
        assert state is not None
        assert not state.rng_restored
        draws.append(draw())
    assert draws[0] == draws[1]
    seed_all(5)
    assert draw() != draws[0]
    assert (
        "saved at another layout (device cuda -> cpu, tp 2 -> ?, world_size 4 -> 1); seeded anew"
        in capsys.readouterr().out
    )


def test_no_load_rng_and_no_load_optim_leave_these_alone(tmp_path: Path) -> None:
    seed_all(5)
    model, _ = save(tmp_path, 9, 0.5)
    expected = draw()
    seed_all(6)
    other = draw()
    seed_all(6)
    state, loaded, optimizer = load(tmp_path, load_optimizer=False, load_rng=False)
    assert state is not None
    assert state.iteration == 9
    assert equal(snapshot(loaded), snapshot(model))
    assert equal(optimizer.state, TinyOptimizer(model, -1000.0).state)
    assert draw() == other != expected


def test_finetune_takes_weights_only_and_starts_at_zero(tmp_path: Path) -> None:
    model, _ = save(tmp_path, 9, 0.5)
    state, loaded, optimizer = load(tmp_path, finetune=True)
    assert state is not None
    assert (state.iteration, state.extra, state.rng_restored) == (0, {}, False)
    assert equal(snapshot(loaded), snapshot(model))
    assert equal(optimizer.state, TinyOptimizer(model, -1000.0).state)


def test_a_checkpoint_without_optimizer_says_which_flag_helps(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, TinyModel(), None, {}, config_dict={}, save_rng=False)
    with pytest.raises(CheckpointError, match="no optimizer state: add --no-load-optim"):
        load(tmp_path)
    state, *_ = load(tmp_path, load_optimizer=False)
    assert state is not None
    assert not state.rng_restored


def test_ckpt_step_chooses_and_load_weights_needs_no_tracker(tmp_path: Path) -> None:
    first, _ = save(tmp_path, 10, 0.1)
    second, _ = save(tmp_path, 20, 0.2)
    assert equal(snapshot(load(tmp_path)[1]), snapshot(second))
    assert equal(snapshot(load(tmp_path, ckpt_step=10)[1]), snapshot(first))
    model = TinyModel(-1.0)
    load_weights(tmp_path / "iter_0000010", model)
    assert equal(snapshot(model), snapshot(first))
    with pytest.raises(CheckpointError, match="Complete checkpoints here: 10, 20"):
        load(tmp_path, ckpt_step=15)


def test_nothing_to_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(tmp_path / "new")[0] is None
    assert "no checkpoint is loaded, starting anew" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="--exit-on-missing-checkpoint"):
        load(tmp_path / "new", exit_on_missing_checkpoint=True)


def test_other_names_are_listed_with_their_closest_counterparts(tmp_path: Path) -> None:
    class Renamed(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.final_norm = self.norm
            del self.norm

    save(tmp_path, 1, 0.0)
    model = Renamed()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, model)
    message = str(caught.value)
    assert "not in the checkpoint (2):" in message
    assert "model.final_norm.weight (closest counterpart: model.norm.weight)" in message
    assert "in the checkpoint only (2):" in message
    assert "model.norm.bias (closest counterpart: model.final_norm.bias)" in message
    assert equal(before, snapshot(model))


def test_other_shapes_are_listed(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.0)
    with pytest.raises(CheckpointError, match=r"model\.embedding\.weight: \[6, 4\] in the checkpoint, \[6, 5\] "):
        load_checkpoint(tmp_path, TinyModel(width=5))


def test_another_optimizer_comes_with_the_remedy() -> None:
    wanted = {"model.w": torch.zeros(2), "optimizer.state.w.momentum_buffer": torch.zeros(2)}
    stored = {"model.w": torch.Size([2]), "optimizer.state.w.exp_avg": torch.Size([2])}
    with pytest.raises(CheckpointError, match=r"load them alone with --no-load-optim, or as a new run with --finetune"):
        compare_names_and_shapes(wanted, wanted, stored, "folder")


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, nn.Linear(2, 2), None, {}, config_dict={})
    with pytest.raises(CheckpointError, match=r"not in the checkpoint \(60\):(\n.*){10}\n    \.\.\. and 50 more"):
        load_checkpoint(tmp_path, nn.Sequential(*[nn.Linear(2, 2) for _ in range(30)]))


def test_an_unknown_format_or_a_damaged_common_file_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.0)
    path = tmp_path / "iter_0000001" / "common.json"
    common = json.loads(path.read_text())
    for content, complaint in (
        (json.dumps(common | {"format_version": 2}), "reads 'megatron_lite', version 1"),
        (json.dumps(common | {"iteration": "1"}), "damaged: iteration"),
        (json.dumps([]), "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=complaint):
            load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read_common(path.parent)


def test_values_that_json_cannot_hold_fail_the_save_cleanly(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.0)
    with pytest.raises(CheckpointError, match=r"not JSON serializable[\s\S]*Earlier checkpoints .* are untouched: 1\."):
        save_checkpoint(tmp_path, 2, TinyModel(), None, {"bad": object()}, config_dict={})
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", folders.TRACKER]
    assert read_tracker(tmp_path) == 1


def test_an_optimizer_state_that_is_not_tensors_is_refused(tmp_path: Path) -> None:
    optimizer = TinyOptimizer(TinyModel())
    optimizer.state["optimizer.scale"] = 3.0  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"'optimizer\.scale' of type float"):
        save_checkpoint(tmp_path, 2, TinyModel(), optimizer, {}, config_dict={})


def test_old_checkpoints_are_pruned_after_the_tracker_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in (1, 2, 3):
        save(tmp_path, iteration, 0.0, keep_last=2)
    assert folders.complete_iterations(tmp_path) == [2, 3]
    trackers: list[int | None] = []

    def watch(*arguments: Any) -> list[int]:
        trackers.append(read_tracker(tmp_path))
        raise OSError("busy")

    monkeypatch.setattr(folders, "prune", watch)
    save(tmp_path, 4, 0.0, keep_last=1)
    assert trackers == [4]


# What happens to a process that is killed in the middle of a save. The child below ends without any clean-up (no
# exception, no finally) at the n-th step that touches the disk. Mutations that fail it: the tracker written before the
# rename; the final folder written directly; the old folder deleted before the new one is renamed; pruning first.

STEPS = [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "open"), (shutil, "rmtree")]


def die_at(step: int, action: Callable[[], Any]) -> bool:
    """Run `action` in a forked process that dies at its n-th step on disk; True if it came to its end alive."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return original(*arguments, **options)

            return wrapped

        for module, name in STEPS:
            setattr(module, name, deadly(getattr(module, name)))
        torch.set_num_threads(1)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    return status == 0


@pytest.mark.parametrize("again", [False, True], ids=["next iteration", "same iteration again"])
def test_a_kill_at_any_step_leaves_a_complete_checkpoint(tmp_path: Path, again: bool) -> None:
    deaths = 0
    trackers = set()
    for step in range(1, 200):
        root = tmp_path / str(step)
        old = snapshot(*save(root, 10, 0.1))
        iteration = 10 if again else 20
        model = TinyModel(0.7)
        new = snapshot(model, TinyOptimizer(model, 0.7))
        alive = die_at(step, lambda root=root, iteration=iteration: save(root, iteration, 0.7, keep_last=1))  # type: ignore

        tracker = read_tracker(root)
        trackers.add(tracker)
        state, loaded_model, loaded_optimizer = load(root)
        assert state is not None
        found = snapshot(loaded_model, loaded_optimizer)
        if again:
            assert equal(found, old) or equal(found, new), step
        else:
            assert equal(found, new if tracker == 20 else old), step
        # The next save clears whatever was left.
        save(root, 30, 0.9)
        assert not [name for name in os.listdir(root) if name.startswith(".")], step
        shutil.rmtree(root)
        if alive:
            assert equal(found, new)
            break
        deaths += 1
    assert deaths >= 10
    assert trackers == ({10} if again else {10, 20})


@pytest.mark.parametrize("step", ["fsync", "rename", "replace"])
def test_an_error_at_any_step_is_reported_and_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old = snapshot(*save(tmp_path, 10, 0.1))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(CheckpointError, match=r"iteration 20 .*failed[\s\S]*No space left[\s\S]*untouched: 10"):
        save(tmp_path, 20, 0.7)
    monkeypatch.undo()
    assert read_tracker(tmp_path) == 10
    assert not folders.temporary_folder(tmp_path, 20).exists()
    _, model, optimizer = load(tmp_path)
    assert equal(snapshot(model, optimizer), old)
    new = snapshot(*save(tmp_path, 20, 0.7))
    _, model, optimizer = load(tmp_path)
    assert equal(snapshot(model, optimizer), new)


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Saving the checkpoint of iteration 1 to .*failed"):
        save(tmp_path / "file", 1, 0.0)


def test_fill_makes_every_number_unique_within_a_kind() -> None:
    tensors = {"a": torch.zeros(5), "b": torch.zeros(2, 3)}
    fill(tensors, 0.5)
    assert len({value for tensor in tensors.values() for value in tensor.flatten().tolist()}) == 11
