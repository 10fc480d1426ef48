"""Checkpoints of every axis of parallelism load at every other: all numbers bit for bit, and the next step to rounding.

The model has latent attention, multi-token prediction, tied embeddings, shared and routed experts with a bias. By
default three layouts read what the two others saved; --full-matrix takes all ordered pairs. Mutations that make it
fail: moments saved without their placements; the copy of the embeddings not filled in the V-shaped layout; the expert
bias left out; layers counted within their stage.
"""

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.checkpoint import folders, load_checkpoint, save_checkpoint
from megatron_lite.checkpoint.model_state import model_tensors
from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader, tensor_shapes
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron_lite.pipeline_parallel import get_forward_backward_func
from megatron_lite.tensor_parallel.parameters import _shard_of, local
from megatron_lite.training.batches import names_read
from megatron_lite.training.step import train_step
from tests.parallel.layouts import Layout, build, initialize, micro_batches, transformer_config
from tests.parallel.pool import WorkerPool

MODEL: dict[str, Any] = {"moe": "bias", "variant": "deepseek", "positions": "rope", "swiglu": True, "layers": 4}
LAYOUTS = [
    Layout(**MODEL, accumulation=6),
    Layout(**MODEL, tp=2, accumulation=6),
    Layout(**MODEL, tp=2, sp=True, ep=2, etp=1, accumulation=6),
    Layout(**MODEL, cp=2, ep=2, accumulation=6, strategy="optim_grads"),
    Layout(**MODEL, dp=2, ep=2, accumulation=3),
    Layout(**MODEL, dp=3, strategy="optim_grads_params", accumulation=2),
    Layout(**MODEL, dp=4, ep=4, strategy="optim", accumulation=3),
    Layout(**MODEL, dp=4, etp=2, ep=2, strategy="optim_grads_params", accumulation=3),
    Layout(**MODEL, dp=4, ep=2, strategy="optim_grads", replicas=2, accumulation=3),
    Layout(**MODEL, pp=2, accumulation=6),
    Layout(**MODEL, pp=2, schedule="interleaved", chunks=2, accumulation=6),
    Layout(**MODEL, pp=2, schedule="zbv", dp=2, ep=2, strategy="optim_grads_params", accumulation=3),
    Layout(**MODEL, tp=2, sp=True, cp=2, pp=2, accumulation=6),
]
STEP = 2
BY_DEFAULT = (2, 11)


def make(layout: Layout) -> tuple[list[nn.Module], MegatronOptimizer]:
    """The chunks of this rank, and Adam."""
    initialize(layout)
    chunks, _ = build(layout)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.01, clip_grad=1.0), chunks)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return chunks, optimizer


def one_step(chunks: list[nn.Module], optimizer: MegatronOptimizer, layout: Layout, step: int) -> list[float]:
    """Train; returns loss, norm and the losses of multi-token prediction."""
    names = names_read(chunks)
    output = train_step(
        chunks,
        optimizer,
        micro_batches(layout, step, parallel_state.get_data_parallel_rank(), names),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        cp_group=parallel_state.get_context_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        mtp_loss_weights=transformer_config(layout).mtp_loss_weights,
        forward_backward_func=get_forward_backward_func(transformer_config(layout)),
    )
    return [output.loss.item(), output.grad_norm.item(), *output.mtp_losses.tolist()]


def train_and_save(rank: int, world_size: int, layout: Layout, root: str) -> list[float]:
    """Two steps, a checkpoint, and the numbers of a third."""
    chunks, optimizer = make(layout)
    for step in range(STEP):
        one_step(chunks, optimizer, layout, step)
    save_checkpoint(root, STEP, chunks, optimizer, {}, config_dict={}, save_rng=False)
    return one_step(chunks, optimizer, layout, STEP)


def whole_tensors(root: str) -> dict[str, Tensor]:
    """Everything a checkpoint holds, read by this process alone."""
    reader = SafeFileSystemReader(folders.checkpoint_folder(root, STEP))
    tensors = {
        name: torch.empty(shape, dtype=reader.metadata.state_dict_metadata[name].properties.dtype)  # type: ignore[union-attr]
        for name, shape in tensor_shapes(reader.metadata).items()
    }
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    return tensors


def load_and_step(rank: int, world_size: int, layout: Layout, roots: list[str]) -> list[tuple[list[str], list[float]]]:
    """Of each checkpoint: the names of tensors that arrived wrong, and the numbers of the next step."""
    chunks, optimizer = make(layout)
    results = []
    for root in roots:
        with torch.no_grad():
            held = model_tensors(chunks) | optimizer.state_dict()
            for tensor in held.values():
                local(tensor).fill_(-1)
        assert load_checkpoint(root, chunks, optimizer, load_rng=False) is not None
        stored, wrong = whole_tensors(root), []
        held = {f"model.{n}": t for n, t in model_tensors(chunks).items()} | optimizer.state_dict()
        for name, tensor in held.items():
            if not torch.equal(local(tensor), _shard_of(stored[name], tensor)):
                wrong.append(name)
        results.append((wrong, one_step(chunks, optimizer, layout, STEP)))
    return results


def chosen(config: pytest.Config) -> list[int]:
    """Numbers of the layouts that take part."""
    return list(range(len(LAYOUTS)) if config.getoption("--full-matrix") else BY_DEFAULT)


@pytest.fixture(scope="module")
def saved(
    pool: WorkerPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[str, list[float]]]:
    """A checkpoint of every layout, and what its run computes next."""
    found = {}
    for number in chosen(request.config):
        root, layout = str(tmp_path_factory.mktemp("layout")), LAYOUTS[number]
        found[number] = root, pool.run(train_and_save, layout, root, world_size=layout.world_size)[0]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The layouts that read."""
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", chosen(metafunc.config), ids=lambda number: LAYOUTS[number].name)


def test_every_layout_reads_every_other(
    pool: WorkerPool, request: pytest.FixtureRequest, saved: dict[int, tuple[str, list[float]]], target: int
) -> None:
    """Weights, moments, step counts and expert biases, on every rank; then loss, norm and further losses of a step."""
    numbers = chosen(request.config)
    if not request.config.getoption("--full-matrix"):
        place = numbers.index(target)
        numbers = [numbers[(place + shift) % len(numbers)] for shift in (1, 2)]
    layout, roots = LAYOUTS[target], [saved[source][0] for source in numbers]
    for results in pool.run(load_and_step, layout, roots, world_size=layout.world_size):
        for source, (wrong, found) in zip(numbers, results, strict=True):
            assert wrong == [], LAYOUTS[source].name
            assert found == pytest.approx(saved[source][1], rel=1e-9), LAYOUTS[source].name


def test_all_axes_are_there() -> None:
    for axis, size in {"tp": 2, "cp": 2, "pp": 2, "chunks": 2, "ep": 4, "etp": 2, "dp": 3}.items():
        assert any(getattr(layout, axis) == size for layout in LAYOUTS), axis
    assert {layout.strategy for layout in LAYOUTS} == {"no_shard", "optim", "optim_grads", "optim_grads_params"}
