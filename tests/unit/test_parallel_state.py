"""parallel_state: getters, meshes, overrides, and leaving nothing behind."""

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite import parallel_state
from megatron_lite.process_groups import ProcessGroupCollection, device_type_of, group_rank, group_size
from megatron_lite.rank_generator import ParallelLayoutError
from megatron_lite.training.initialize import training_device
from tests.parallel.pool import WorkerPool


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    parallel_state.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()


def fake_world(rank: int, world_size: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher may show each process only some GPUs. Mutation: take LOCAL_RANK as it is; gloo computes on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parallel_state.local_cuda_device() == training_device() == torch.device("cuda", 1)
    assert training_device("gloo") == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert parallel_state.local_cuda_device() == torch.device("cuda", 1)


def test_a_single_process_needs_no_environment() -> None:
    parallel_state.initialize_model_parallel()
    assert dist.get_world_size() == 1
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert parallel_state.get_dense_mesh().mesh_dim_names == ("pp", "dp_replicate", "dp_shard", "tp")
    parallel_state.shutdown()
    assert not dist.is_initialized()


def test_shutdown_leaves_a_process_group_it_did_not_make() -> None:
    fake_world(0, 2)
    parallel_state.initialize_model_parallel(2)
    parallel_state.shutdown()
    assert dist.is_initialized()


def test_getters_assert_before_initialization_and_after_destruction() -> None:
    for _ in range(2):
        assert not parallel_state.is_initialized()
        with pytest.raises(AssertionError, match="tensor model parallel group is not initialized"):
            parallel_state.get_tensor_model_parallel_group()
        with pytest.raises(AssertionError, match="not initialized"):
            parallel_state.get_data_parallel_rank()
        assert parallel_state.get_tensor_model_parallel_group(check_initialized=False) is None
        assert parallel_state.get_mesh_of_group(None) is None
        assert ProcessGroupCollection.use_mpu_process_groups() == ProcessGroupCollection()
        parallel_state.initialize_model_parallel()
        parallel_state.destroy_model_parallel()


def test_initializing_twice_is_refused() -> None:
    parallel_state.initialize_model_parallel()
    with pytest.raises(AssertionError, match="already initialized"):
        parallel_state.initialize_model_parallel()


def test_a_refused_layout_leaves_no_state() -> None:
    fake_world(0, 6)
    with pytest.raises(ParallelLayoutError, match=r"world_size \(6\) is not divisible by 4"):
        parallel_state.initialize_model_parallel(4)
    assert not parallel_state.is_initialized()
    parallel_state.initialize_model_parallel(3)


def test_ranks_sizes_and_neighbours() -> None:
    fake_world(13, 16)  # tp 1, cp 0, dp 1, pp 1 of tp2 x cp2 x dp2 x pp2
    parallel_state.initialize_model_parallel(2, 2, context_parallel_size=2, expert_model_parallel_size=2)
    state = parallel_state
    assert state.get_all_ranks() == "1_1_0_1_0"
    assert state.get_tensor_model_parallel_src_rank() == 12
    assert state.get_model_parallel_src_rank() == 4
    assert state.get_data_parallel_src_rank() == 9
    assert state.get_data_parallel_src_rank(with_context_parallel=True) == 9
    assert state.get_expert_model_parallel_src_rank() == 13
    assert state.get_context_parallel_global_ranks() == [13, 15]
    assert (state.get_data_parallel_world_size(), state.get_data_parallel_world_size(True)) == (2, 4)
    assert (state.get_data_parallel_rank(), state.get_data_parallel_rank(with_context_parallel=True)) == (1, 2)
    assert state.get_tensor_and_context_parallel_world_size() == 4
    assert state.get_expert_tensor_and_model_parallel_world_size() == 4
    assert (state.get_expert_data_parallel_world_size(), state.get_expert_data_parallel_rank()) == (2, 1)
    assert (state.get_pipeline_model_parallel_first_rank(), state.get_pipeline_model_parallel_last_rank()) == (5, 13)
    assert (state.get_pipeline_model_parallel_next_rank(), state.get_pipeline_model_parallel_prev_rank()) == (5, 5)
    assert state.is_pipeline_last_stage()
    assert not state.is_pipeline_first_stage()
    assert state.is_rank_in_embedding_group()
    assert not state.is_rank_in_position_embedding_group()
    assert state.get_position_embedding_group(check_initialized=False) is None
    assert dist.get_process_group_ranks(state.get_embedding_group()) == [5, 13]


def test_virtual_stages() -> None:
    fake_world(1, 2)
    parallel_state.initialize_model_parallel(1, 2, virtual_pipeline_model_parallel_size=3)
    assert parallel_state.get_virtual_pipeline_model_parallel_rank() == 0
    assert parallel_state.is_pipeline_last_stage()
    assert parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=2)
    assert not parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=1)
    assert not parallel_state.is_rank_in_embedding_group(ignore_virtual=False, vp_stage=0)
    with pytest.raises(AssertionError, match="vp_stage"):
        parallel_state.is_pipeline_last_stage(ignore_virtual=False)


def test_overrides_win_until_taken_back() -> None:
    parallel_state.set_tensor_model_parallel_world_size(8)
    parallel_state.set_tensor_model_parallel_rank(3)
    assert parallel_state.get_tensor_model_parallel_world_size() == 8
    parallel_state.initialize_model_parallel()
    assert parallel_state.get_tensor_model_parallel_rank() == 3
    parallel_state.set_tensor_model_parallel_world_size(None)
    parallel_state.set_tensor_model_parallel_rank(None)
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert parallel_state.get_tensor_model_parallel_rank() == 0


def test_an_override_of_the_data_parallel_rank_does_not_leak() -> None:
    parallel_state.initialize_model_parallel()
    parallel_state.set_data_parallel_rank(5)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    assert parallel_state.get_data_parallel_rank() == 0


def test_meshes_are_slices_of_two_roots() -> None:
    fake_world(5, 8)
    parallel_state.initialize_model_parallel(
        2, expert_model_parallel_size=2, expert_tensor_parallel_size=1, num_distributed_optimizer_instances=2
    )
    dense, expert = parallel_state.get_dense_mesh(), parallel_state.get_expert_mesh()
    assert dense.shape == (1, 2, 2, 2)
    assert expert.mesh_dim_names == ("pp", "edp_replicate", "edp_shard", "ep", "etp")
    assert expert.shape == (1, 2, 2, 2, 1)
    assert list(dense.get_coordinate() or ()) == [0, 1, 0, 1]
    tp, ep = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_model_parallel_group()
    assert tp is not ep  # the same ranks, yet each knows its mesh
    assert dist.get_process_group_ranks(tp) == dist.get_process_group_ranks(ep) == [4, 5]
    meshes = [parallel_state.get_mesh_of_group(group) for group in (tp, ep)]
    assert [mesh.mesh_dim_names for mesh in meshes if mesh is not None] == [("tp",), ("ep",)]
    assert parallel_state.get_mesh_of_group(parallel_state.get_data_parallel_group()) is None
    assert dense["dp_replicate", "dp_shard"].mesh.flatten().tolist() == [1, 3, 5, 7]


def test_order_is_honoured_by_groups_and_meshes() -> None:
    fake_world(3, 8)
    parallel_state.initialize_model_parallel(2, 2, order="tp-cp-ep-pp-dp")
    assert parallel_state.get_all_ranks() == "1_0_0_1_0"
    assert list(parallel_state.get_dense_mesh().get_coordinate() or ()) == [1, 0, 0, 1]


def test_hierarchical_context_groups() -> None:
    fake_world(6, 8)
    parallel_state.initialize_model_parallel(context_parallel_size=8, hierarchical_context_parallel_sizes=[2, 4])
    inner, outer = parallel_state.get_hierarchical_context_parallel_groups()
    assert dist.get_process_group_ranks(inner) == [6, 7]
    assert dist.get_process_group_ranks(outer) == [0, 2, 4, 6]
    assert ProcessGroupCollection.use_mpu_process_groups(["hcp"]).hcp == [inner, outer]


def test_process_group_collection() -> None:
    fake_world(1, 4)
    parallel_state.initialize_model_parallel(2)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    assert groups.tp is parallel_state.get_tensor_model_parallel_group()
    assert (group_size(groups.dp), group_rank(groups.tp)) == (2, 1)
    assert (group_size(None), group_rank(None)) == (1, 0)
    assert ProcessGroupCollection.use_mpu_process_groups(["dp"]).tp is None
    with pytest.raises(ValueError, match="tensor: no such process group"):
        ProcessGroupCollection.use_mpu_process_groups(["tensor"])


def test_4096_ranks_in_seconds() -> None:
    fake_world(17, 4096)
    begin = time.perf_counter()
    parallel_state.initialize_model_parallel(8, 8)
    assert time.perf_counter() - begin < 5
    assert parallel_state.get_data_parallel_world_size() == 64


def sums_over_groups(rank: int, world_size: int, sizes: dict[str, int]) -> dict[str, int]:
    found = {}
    for _ in range(2):  # the second time proves that nothing of the first is left in the way
        parallel_state.initialize_model_parallel(**sizes)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for name in ("tp", "pp", "cp", "dp", "dp_cp", "ep", "expt_dp", "tp_ep_pp", "embd"):
            total = torch.tensor([2**rank])
            if getattr(groups, name) is not None:
                dist.all_reduce(total, group=getattr(groups, name))
            found[name] = int(total)
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "ep"), [sizes for sizes in product((1, 2), repeat=4) if 2 <= math.prod(sizes) <= 4]
)
def test_groups_communicate_among_exactly_their_ranks(pool: WorkerPool, tp: int, pp: int, cp: int, ep: int) -> None:
    """Mutation: share groups between kinds that merely have as many of them."""
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
    }
    layout = parallel_state.ParallelLayout.from_sizes(4, tp=tp, pp=pp, cp=cp, ep=ep).groups()
    for rank, found in enumerate(pool.run(sums_over_groups, sizes, world_size=4)):
        for name in found.keys() - {"embd"}:
            own = next(ranks for ranks in layout[name] if rank in ranks)
            assert found[name] == sum(2**member for member in own), (name, rank)


def test_the_interpreter_exits_cleanly() -> None:
    code = (
        "from megatron_lite import parallel_state as p; p.initialize_model_parallel();"
        "import torch; torch.distributed.all_reduce(torch.ones(1)); p.shutdown(); print('done')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout.strip()) == (0, "done"), finished.stderr


@pytest.mark.parametrize(
    ("backend", "with_gpu", "device"),
    [
        ("nccl", True, "cuda"),
        ("cpu:gloo,cuda:nccl", True, "cuda"),
        ("cpu:gloo,cuda:gloo", True, "cuda"),
        ("gloo", True, "cpu"),
        ("undefined", True, "cuda"),
        ("undefined", False, "cpu"),
    ],
)
def test_device_of_a_backend(monkeypatch, backend, with_gpu, device):
    """All ways in which a user can have initialized torch.distributed. Mutation: "undefined" is a CPU."""
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: with_gpu)
    assert device_type_of() == device
