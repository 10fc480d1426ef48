"""Checkpoints that Megatron-LM itself has written (tests/data/megatron): what they compute here, and how they are read.

Mutations: gates and ups not exchanged, or in another order; the first layer of a stack for all; pieces without their
offset, in the target or in the file; norms exchanged; masters ignored; the count of updates not taken over; tensors or
the state of the run unpickled.
"""

import argparse
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_lite.checkpoint import CheckpointError, read_common
from megatron_lite.checkpoint.errors import DamagedCheckpointError
from megatron_lite.checkpoint.megatron import MegatronCheckpoint, find_megatron, settings_of
from megatron_lite.checkpoint.megatron.folder import COMMON, COMMON_STATE, MegatronTensors
from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader, read_metadata
from megatron_lite.errors import ConfigError
from megatron_lite.inference.load_model import load_model
from tests.e2e.commands import REPOSITORY
from tools import convert_checkpoint

DATA = REPOSITORY / "tests" / "data" / "megatron"
NAMES = ("experts", "latent", "learned")


def convert(source: Path, target: Path) -> int:
    return convert_checkpoint.main(
        ["--from", "megatron", "--to", "megatron_lite", "--load", str(source), "--save", str(target)]
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The folder of one checkpoint, to be changed."""
    return Path(shutil.copytree(find_megatron(DATA / "experts"), tmp_path / "theirs"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_megatrons(name: str, tmp_path: Path) -> None:
    """In float32, from what the converter writes."""
    assert convert(DATA / name, tmp_path) == 0
    reference = np.load(DATA / name / "logits.npz")
    tokens, expected = torch.from_numpy(reference["tokens"]), torch.from_numpy(reference["logits"])
    model = load_model(tmp_path).model
    positions = torch.arange(tokens.size(1)).repeat(tokens.size(0), 1)
    with torch.no_grad():
        found = model(tokens, positions)
    assert found.shape == expected.shape
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 3e-6


def test_what_is_taken_over(tmp_path: Path) -> None:
    """Position, schedule and optimizer of the run; its settings; and weights alone where there is no more."""
    assert convert(DATA / "experts", tmp_path / "run") == 0
    common = read_common(tmp_path / "run" / "iter_0000003")
    assert common["iteration"] == 3
    assert common["extra"]["progress"] == {"iteration": 3, "consumed_train_samples": 12, "consumed_valid_samples": 0}
    assert common["extra"]["scheduler"]["num_steps"] == 12
    transformer = common["config"]["transformer"]
    assert (transformer["num_query_groups"], transformer["moe_layer_freq"]) == (2, [0, 1])
    names = read_metadata(tmp_path / "run" / "iter_0000003").state_dict_metadata
    assert "model.decoder.layers.1.mlp.router.expert_bias" in names
    assert "optimizer.state.decoder.layers.1.mlp.experts.weight1.exp_avg" in names
    step = torch.zeros(())
    name = "optimizer.state.decoder.layers.1.mlp.experts.weight1.step"
    dcp.load(
        {name: step}, storage_reader=SafeFileSystemReader(tmp_path / "run" / "iter_0000003"), no_dist=True,
        planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
    )  # fmt: skip
    assert step.item() == 3.0

    assert convert(DATA / "learned", tmp_path / "weights") == 0
    weights = tmp_path / "weights" / "iter_0000000"
    assert read_common(weights)["extra"] == {}
    assert all(name.startswith("model.") for name in read_metadata(weights).state_dict_metadata)
    assert convert(DATA / "learned", tmp_path / "weights") == 2


def test_slices_of_stacks(tmp_path: Path) -> None:
    """Any box of any layer, read from one piece."""
    stack = torch.arange(3 * 4 * 5.0).view(3, 4, 5)
    tensors = {"decoder.layers.mlp.linear_fc2.weight": stack, "decoder.final_layernorm.weight": stack[0]}
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    theirs = MegatronTensors(tmp_path, read_metadata(tmp_path, with_bytes=True), {name: name for name in tensors})
    assert theirs.shapes["decoder.layers.2.mlp.linear_fc2.weight"] == (4, 5)
    box = (slice(1, 3), slice(2, 5))
    assert torch.equal(theirs.read("decoder.layers.2.mlp.linear_fc2.weight", box), stack[2][box])
    assert torch.equal(theirs.read("decoder.final_layernorm.weight", box), stack[0][box])


def test_slices_over_pieces() -> None:
    """Of a weight that four ranks have written, in pieces along either dimension."""
    theirs = MegatronCheckpoint(find_megatron(DATA / "learned")).weights
    for name in ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc2.weight"):
        rows, columns = theirs.shapes[name]
        whole = theirs.read(name, (slice(0, rows), slice(0, columns)))
        assert whole.abs().min() > 0
        box = (slice(3, rows - 1), slice(5, columns - 2))
        assert torch.equal(theirs.read(name, box), whole[box])


def test_masters_stand_for_weights(tmp_path: Path) -> None:
    """What bfloat16 has lost is in the optimizer's copy."""
    master = torch.randn(4, 3)
    tensors = {"output_layer.weight": master.bfloat16(), "optimizer.state.fp32_param.output_layer.weight": master}
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    pickled = io.BytesIO()
    torch.save({"args": argparse.Namespace(num_layers=1), "iteration": 7}, pickled)
    (tmp_path / COMMON).write_bytes(pickled.getvalue())
    theirs = MegatronCheckpoint(tmp_path)
    assert torch.equal(theirs.weights.read("output_layer.weight", (slice(0, 4), slice(0, 3))), master)
    assert theirs.dtypes == {torch.bfloat16}
    assert (theirs.arguments, theirs.iteration, theirs.updates) == ({"num_layers": 1}, 7, None)


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_run(copied: Path, tmp_path: Path) -> None:
    """A pickle made to run code, in the metadata, the state of the run, or a tensor. Mutation: torch.load of any."""
    trap = tmp_path / "trap"
    torch.save([{"args": Exploit(trap)}], tmp_path / "common")
    content = (tmp_path / "common").read_bytes()
    assert b"mkdir" in zipfile.ZipFile(io.BytesIO(content)).read("common/data.pkl")
    metadata = read_metadata(copied, with_bytes=True)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == COMMON_STATE)
    path = copied / place.relative_path
    original = path.read_bytes()
    assert len(content) <= place.length
    # Zip files are found from their end.
    path.write_bytes(
        original[: place.offset] + content.rjust(place.length, b"\0") + original[place.offset + place.length :]
    )
    with pytest.raises(CheckpointError, match="does not hold the arguments"):
        MegatronCheckpoint(copied)
    path.write_bytes(original)

    first = next(place for index, place in metadata.storage_data.items() if index.fqn == "output_layer.weight")
    bad = pickle.dumps(Exploit(trap)).ljust(first.length, b"\0")
    path.write_bytes(original[: first.offset] + bad + original[first.offset + first.length :])
    theirs = MegatronCheckpoint(copied)
    with pytest.raises(DamagedCheckpointError, match=r"output_layer.weight .* cannot be read"):
        theirs.weights.read("output_layer.weight", (slice(0, 1), slice(0, 1)))

    (copied / ".metadata").write_bytes(pickle.dumps(Exploit(trap)))
    with pytest.raises(CheckpointError):
        MegatronCheckpoint(copied)
    assert not trap.exists()


def test_what_cannot_be_expressed_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = MegatronCheckpoint(copied)
    theirs.arguments |= {"linear_attention_freq": 4, "use_mup": True, "hidden_size": "wide"}
    with pytest.raises(ConfigError) as caught:
        settings_of(theirs)
    for part in ("linear_attention_freq is 4", "use_mup is True", "hidden_size is 'wide'"):
        assert part in str(caught.value)


def test_folders_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with what it is, and what to do."""
    with pytest.raises(ConfigError, match=r"holds no Megatron-LM checkpoint .* iterations there: none"):
        find_megatron(tmp_path)
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(ConfigError, match="save it with --ckpt-format torch_dist"):
        find_megatron(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    shutil.copytree(find_megatron(DATA / "learned"), tmp_path / "release")
    assert find_megatron(tmp_path) == tmp_path / "release"
    assert (
        convert_checkpoint.main(["--from", "megatron", "--to", "hf", "--load", "a", "--save", str(tmp_path / "b")]) == 2
    )
    assert "convert to megatron_lite first" in capsys.readouterr().err
    # A checkpoint of ours has no arguments of theirs.
    dcp.save({"a": torch.zeros(2)}, checkpoint_id=tmp_path / "ours", no_dist=True)
    with pytest.raises(CheckpointError, match=f"neither {COMMON_STATE} nor {COMMON}"):
        MegatronCheckpoint(tmp_path / "ours")


def test_tensors_that_do_not_fit_are_listed(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of theirs is dropped silently, and nothing of ours left unfilled."""
    metadata = pickle.loads((copied / ".metadata").read_bytes())  # written by ourselves, or nearly
    state = metadata.state_dict_metadata
    state["decoder.layers.0.mlp.linear_fc3.weight"] = state.pop("decoder.layers.0.mlp.linear_fc2.weight")
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == "decoder.layers.0.mlp.linear_fc2.weight":
            changed = type(index)("decoder.layers.0.mlp.linear_fc3.weight", index.offset)
            metadata.storage_data[changed] = place
    (copied / ".metadata").write_bytes(pickle.dumps(metadata))
    assert convert(copied, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "not in the folder (1):" in message
    assert "decoder.layers.0.mlp.linear_fc2.weight (closest counterpart: decoder.layers.0.mlp.linear_fc3" in message
    assert "of no use (1):" in message
