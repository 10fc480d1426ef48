"""Moments in the host's memory where ranks hold shards: the same bits, and checkpoints that do not depend on it.

Mutations that make a test here fail (tried by hand): state is presented as plain tensors, or as DTensors made by
DTensor.from_local, which moves a shard to the device of its mesh; nothing is copied back.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from megatron_lite import parallel_state
from megatron_lite.checkpoint import load_checkpoint, save_checkpoint
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader
from megatron_lite.checkpoint.tensor_files import read_tensors, write_tensors
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, host_moments
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.training.step import train_step
from tests.parallel.layouts import Layout, build, initialize, micro_batches, whole
from tests.parallel.pool import WorkerPool

MODEL: dict[str, Any] = {"swiglu": True, "normalization": "RMSNorm", "query_groups": 4}
SHARDED = Layout(dp=2, strategy="optim_grads_params", **MODEL)
TENSOR = Layout(tp=2, sp=True, accumulation=2, **MODEL)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "bf16": {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
    "sgd": {"optimizer": "sgd"},
    "muon": {"optimizer": "muon"},
}


def config(optimizer: str, fraction: float) -> OptimizerConfig:
    return OptimizerConfig(
        lr=0.01,
        clip_grad=0.5,
        adam_eps=1e-3,
        optimizer_cpu_offload=fraction > 0,
        optimizer_offload_fraction=fraction,
        **OPTIMIZERS[optimizer],
    )


def one_step(chunks: list[nn.Module], optimizer: MegatronOptimizer, layout: Layout, step: int) -> float:
    return train_step(
        chunks,
        optimizer,
        micro_batches(layout, step, parallel_state.get_data_parallel_rank()),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    ).loss.item()


def everything(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    return {**optimizer.named_parameters, **optimizer.state_dict()}


def differing(rank: int, world_size: int, layout: Layout, optimizer_name: str, fraction: float) -> list[str]:
    """Shards of weights and state that are not the same bits after three steps."""
    initialize(layout)
    at_a_time, host_moments.AT_A_TIME = host_moments.AT_A_TIME, 1000
    try:
        found = []
        for part in (0.0, fraction):
            chunks, optimizer = build(layout, optimizer_config=config(optimizer_name, part))
            for step in range(3):
                one_step(chunks, optimizer, layout, step)
            found.append({name: local(tensor.detach()).clone() for name, tensor in everything(optimizer).items()})
    finally:
        host_moments.AT_A_TIME = at_a_time
    assert found[0].keys() == found[1].keys()
    return [name for name, one in found[0].items() if not torch.equal(one, found[1][name])]


@pytest.mark.parametrize("layout", [SHARDED, TENSOR], ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    ("optimizer", "fraction"),
    [
        ("bf16", 0.5),
        ("muon", 1.0),
        *(pytest.param(*how, marks=pytest.mark.full) for how in (("adam", 1.0), ("muon", 0.5))),
    ],
)
def test_shards_are_the_same_bits(pool: WorkerPool, layout: Layout, optimizer: str, fraction: float) -> None:
    assert pool.run(differing, layout, optimizer, fraction, world_size=2) == [[], []]


def save(
    rank: int, world_size: int, layout: Layout, optimizer_name: str, fraction: float, root: str, wait: bool
) -> Any:
    """Whole weights and state after two steps, which are saved, and the loss of the third step."""
    initialize(layout)
    chunks, optimizer = build(layout, optimizer_config=config(optimizer_name, fraction))
    for step in range(2):
        one_step(chunks, optimizer, layout, step)
    saver = None if wait else BackgroundSaver()
    save_checkpoint(root, 2, chunks, optimizer, {}, config_dict={}, background=saver)
    saved = {name: whole(tensor.detach()).clone() for name, tensor in everything(optimizer).items()}
    loss = one_step(chunks, optimizer, layout, 2)
    if saver is not None:
        saver.finish()
        saver.close()
    return saved, loss


def load(rank: int, world_size: int, layout: Layout, optimizer_name: str, fraction: float, root: str) -> Any:
    initialize(layout)
    chunks, optimizer = build(layout, optimizer_config=config(optimizer_name, fraction))
    addresses = {name: local(tensor).data_ptr() for name, tensor in optimizer.state_dict().items()}
    assert load_checkpoint(root, chunks, optimizer) is not None
    assert addresses == {name: local(tensor).data_ptr() for name, tensor in optimizer.state_dict().items()}
    loaded = {name: whole(tensor.detach()).clone() for name, tensor in everything(optimizer).items()}
    return loaded, one_step(chunks, optimizer, layout, 2)


@pytest.mark.parametrize(
    ("optimizer", "source", "saved_fraction", "target", "loaded_fraction", "wait"),
    [
        ("adam", TENSOR, 0.0, SHARDED, 1.0, True),
        ("muon", SHARDED, 0.0, TENSOR, 0.5, False),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("adam", SHARDED, 1.0, TENSOR, 0.0, True),
                ("bf16", SHARDED, 0.5, TENSOR, 0.0, False),
                ("sgd", TENSOR, 1.0, SHARDED.model, 0.0, True),
            )
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else str(value),
)
def test_a_checkpoint_changes_layout_with_one_side_on_the_host(
    pool: WorkerPool,
    tmp_path: Path,
    optimizer: str,
    source: Layout,
    saved_fraction: float,
    target: Layout,
    loaded_fraction: float,
    wait: bool,
) -> None:
    """All bits arrive, in place, and the next step is that of the run that saved, to the rounding of float64."""
    saved, loss = pool.run(save, source, optimizer, saved_fraction, str(tmp_path), wait, world_size=2)[0]
    results = pool.run(load, target, optimizer, loaded_fraction, str(tmp_path), world_size=target.world_size)
    for loaded, next_loss in results:
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], one) and loaded[name].dtype == one.dtype for name, one in saved.items())
        assert next_loss == pytest.approx(loss, rel=1e-6 if optimizer == "bf16" else 1e-12)


SHAPES = {"decoder.weight": (5, 4), "decoder.bias": (5,)}


def on_another_device(rank: int, world_size: int, folder: str) -> list[list[float]]:
    """Save and load moments whose parameters are on a second device: torch's meta device, for want of one.

    It has no values, so a shard that is moved there cannot be saved. Returns what one rank reads, and what stays.
    """
    mesh = DeviceMesh("meta", torch.arange(world_size), mesh_dim_names=("dp",))
    momentum = OptimizerConfig(optimizer="sgd", optimizer_cpu_offload=True)

    def build_sharded() -> MegatronOptimizer:
        parameters = {}
        for name, shape in SHAPES.items():
            shard = torch.empty(shape, device="meta").chunk(world_size)[rank]
            stride = torch.empty(shape, device="meta").stride()
            sharded = DTensor.from_local(
                shard, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
            parameters[name] = nn.Parameter(sharded)
        return MegatronOptimizer(momentum, parameters, dense_mesh=None)

    saving, loading = build_sharded(), build_sharded()
    assert saving.device.type == "meta"
    for name, state in saving.state.items():
        buffer = state["momentum_buffer"]
        assert buffer.device.type == "cpu"
        assert isinstance(saving.state_dict()[f"optimizer.state.{name}.momentum_buffer"], DTensor)
        buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) + 100 * rank)
    write_tensors("Saving", Path(folder), saving.state_dict())
    whole_tensors = {f"optimizer.state.{name}.momentum_buffer": torch.empty(shape) for name, shape in SHAPES.items()}
    read_tensors(SafeFileSystemReader(folder), whole_tensors)
    read_tensors(SafeFileSystemReader(folder), loading.state_dict())
    for name, state in loading.state.items():
        assert torch.equal(state["momentum_buffer"], saving.state[name]["momentum_buffer"])
    return [tensor.flatten().tolist() for tensor in whole_tensors.values()]


def test_moments_stay_on_the_host_though_the_mesh_is_of_another_device(pool: WorkerPool, tmp_path: Path) -> None:
    expected = [[*map(float, range(12)), *map(float, range(100, 108))], [0.0, 1.0, 2.0, 100.0, 101.0]]
    assert pool.run(on_another_device, str(tmp_path), world_size=2) == [expected] * 2
