"""Muon does at every kind of layout what it does in one process, in float64; its state resumes and moves.

Mutations that each make a test here fail (tried by hand): every rank orthogonalizes its own shard; queries, keys and
values as one matrix where query groups are fewer than ranks; the momentum of a skipped step kept; tensor parallel
shards joined before FSDP's; equal lengths of all FSDP shards.
"""

import collections
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_lite import parallel_state
from megatron_lite.checkpoint import load_checkpoint, save_checkpoint
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig
from megatron_lite.optimizer.whole_matrices import in_rounds, matrix_splits, work_on_whole
from megatron_lite.tensor_parallel.parameters import _shard_of, local, stored_indices
from megatron_lite.training.step import train_step
from tests.parallel.layouts import (
    Layout,
    build,
    deviations,
    initialize,
    micro_batches,
    run_layout,
    whole,
)
from tests.parallel.pool import WorkerPool

STEPS = 3
# A large epsilon, or AdamW makes steps of the rounding noise of gradients that are zero in exact arithmetic.
MUON = OptimizerConfig(
    optimizer="muon",
    lr=0.02,
    weight_decay=0.1,
    clip_grad=0.5,
    adam_eps=1e-3,
    muon_nesterov=True,
    muon_extra_scale_factor=0.2,
)
MODEL: dict[str, Any] = {"swiglu": True, "normalization": "RMSNorm"}
LAYOUTS = [
    Layout(tp=2, query_groups=4, **MODEL),
    Layout(dp=3, strategy="optim_grads_params", query_groups=4, **MODEL),
    Layout(tp=2, sp=True, dp=2, strategy="optim", query_groups=1, tied=False, positions="rope"),
    Layout(pp=2, tp=2, sp=True, positions="rope", variant="deepseek", accumulation=2),
    Layout(tp=2, sp=True, dp=2, ep=2, etp=2, moe="gated", strategy="optim", **MODEL),
    *(
        pytest.param(layout, marks=pytest.mark.full)
        for layout in (
            Layout(dp=4, replicas=2, strategy="optim", query_groups=4, **MODEL),
            Layout(pp=2, dp=2, strategy="optim", accumulation=2, layers=4, **MODEL),
            Layout(tp=2, dp=2, strategy="optim", tied=False, positions="rope", variant="gates"),
            Layout(tp=2, sp=True, dp=2, ep=2, etp=1, moe="gmlp", strategy="optim_grads_params", **MODEL),
            Layout(dp=6, ep=2, moe="bias", strategy="optim", **MODEL),
        )
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_equals_one_process(pool: WorkerPool, layout: Layout) -> None:
    expected = pool.run(run_layout, layout.model, STEPS, None, MUON, world_size=1)[0]
    found = pool.run(run_layout, layout, STEPS, None, MUON, world_size=layout.world_size)[0]
    differences = deviations(found, expected)
    assert differences.pop("tied") == differences.pop("choices") == 0
    assert max(differences.values()) < 1e-10, differences


# [rows, columns] or [experts, rows, columns] and how the mesh ("dp", "tp") of 3 x 2 ranks splits them.
SPLIT_EVENLY_OR_NOT = [
    ((12, 4), (_StridedShard(0, split_factor=2), Shard(0))),
    ((12, 4), (_StridedShard(0, split_factor=2), Shard(0))),
    ((10, 4), (_StridedShard(0, split_factor=2), Shard(0))),
    ((2, 4), (_StridedShard(0, split_factor=2), Shard(0))),
    ((7, 6), (Shard(0), Shard(1))),
    ((5, 9, 4), (Shard(1), Shard(2))),
    ((5, 9, 4), (Shard(0), Shard(2))),
    ((5, 9, 4), (Shard(0), Shard(0))),
    ((9, 4), (Shard(0), Replicate())),
    ((9, 4), (Replicate(), Replicate())),
]


def whole_matrices(rank: int, world_size: int) -> list[tuple[str, bool]]:
    """The tensors that this rank owned, and whether each was whole; checks what comes back."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    parameters, shards, logical = {}, {}, {}
    for number, (shape, placements) in enumerate(SPLIT_EVENLY_OR_NOT):
        full = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        like = DTensor.from_local(full, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())
        name = str(number)
        logical[name], shards[name], parameters[name] = full, _shard_of(full, like).contiguous(), like
    splits = {name: matrix_splits(parameter) for name, parameter in parameters.items()}
    owned = []

    def work(name: str, tensor: Tensor) -> Tensor:
        experts = logical[name][stored_indices(parameters[name])[0]] if tensor.dim() == 3 else logical[name]
        owned.append((name, torch.equal(tensor, experts)))
        return 2.0 * tensor

    rounds = list(in_rounds(splits, {name: tensor.numel() for name, tensor in logical.items()}))
    assert sorted(itertools.chain(*rounds)) == sorted(logical)
    for names in rounds:
        for name, found in work_on_whole({name: shards[name] for name in names}, splits, work).items():
            assert torch.equal(found, 2.0 * shards[name]), name
    return owned


def test_each_matrix_is_worked_on_once_and_whole(pool: WorkerPool) -> None:
    """Uneven and empty shards, stacks, more and fewer matrices than ranks; copies are worked on by each who holds one.

    Ranks that hold other experts of a stack work on those.
    """
    everywhere = [one for owned in pool.run(whole_matrices, world_size=6) for one in owned]
    assert all(is_whole for _, is_whole in everywhere)
    counts = collections.Counter(name for name, _ in everywhere)
    assert [counts[str(number)] for number in range(len(SPLIT_EVENLY_OR_NOT))] == [1, 1, 1, 1, 1, 1, 3, 6, 2, 6]


def everything(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """This rank's shards of weights and state."""
    tensors = {**optimizer.named_parameters, **optimizer.state_dict()}
    return {name: local(tensor.detach()) for name, tensor in tensors.items()}


def skipped(rank: int, world_size: int, layout: Layout) -> bool:
    """Whether a step with a bad number in one rank's shard of a matrix leaves everything as it was."""
    initialize(layout)
    _, optimizer = build(layout, optimizer_config=MUON)
    for step in range(2):
        for parameter in optimizer.named_parameters.values():
            parameter.grad = torch.ones_like(parameter)
        before = {name: tensor.clone() for name, tensor in everything(optimizer).items()}
        if step == 1 and rank == world_size - 1:
            local(optimizer.named_parameters["decoder.layers.0.mlp.linear_fc1.weight"].grad.detach())[0, 0] = torch.nan
        result = optimizer.step()
    after = everything(optimizer)
    return bool(result.found_inf == 1.0 and all(torch.equal(after[name], value) for name, value in before.items()))


def test_all_ranks_skip_a_non_finite_shard(pool: WorkerPool) -> None:
    layout = Layout(tp=2, dp=2, strategy="optim", **MODEL)
    assert pool.run(skipped, layout, world_size=4) == [True] * 4


def train(rank: int, world_size: int, layout: Layout, root: str, steps: range) -> Any:
    """Losses and weights; from the checkpoint in `root` on if it is there, else one is written after two steps."""
    initialize(layout)
    model, optimizer = build(layout, optimizer_config=MUON)
    if steps.start:
        assert load_checkpoint(root, model, optimizer) is not None
    how: dict[str, Any] = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    losses = []
    for step in steps:
        if step == 2 and not steps.start:
            save_checkpoint(root, step, model, optimizer, {}, config_dict={})
        batches = micro_batches(layout, step, parallel_state.get_data_parallel_rank())
        losses.append(train_step(model, optimizer, batches, **how).loss.item())
    return losses, {name: whole(parameter) for name, parameter in optimizer.named_parameters.items()}


@pytest.mark.full
def test_a_run_resumes_bit_for_bit_and_moves_to_other_layouts(pool: WorkerPool, tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more. Fails if the momentum stays behind or lands on other experts."""
    first = Layout(tp=2, sp=True, dp=2, strategy="optim", ep=2, etp=1, moe="aux", **MODEL)
    others = [
        Layout(dp=2, strategy="optim_grads_params", moe="aux", **MODEL),
        Layout(tp=2, ep=2, etp=1, moe="aux", accumulation=2, **MODEL),
    ]
    losses, weights = pool.run(train, first, str(tmp_path), range(4), world_size=4)[0]
    resumed, found = pool.run(train, first, str(tmp_path), range(2, 4), world_size=4)[0]
    assert resumed == losses[2:]
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    for layout in others:
        moved, found = pool.run(train, layout, str(tmp_path), range(2, 4), world_size=layout.world_size)[0]
        assert moved == pytest.approx(losses[2:], rel=1e-10)
        for name, weight in weights.items():
            assert (found[name] - weight).abs().max() < 1e-10, name
