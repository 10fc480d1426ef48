"""Moments in the host's memory, from a GPU: the same bits, less memory, and checkpoints that either side reads.

pytest -m gpu
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.checkpoint import load_checkpoint, save_checkpoint
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, host_moments
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.training.step import train_step
from tests.gpu.test_training_step import LOW_MOMENTS, MUON, batch, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
HOST = {"optimizer_cpu_offload": True}
HALF = HOST | {"optimizer_offload_fraction": 0.5}
OPTIMIZERS: dict[str, dict[str, Any]] = {"adam": {}, "low": LOW_MOMENTS, "sgd": {"optimizer": "sgd"}, "muon": MUON}


@pytest.fixture
def groups() -> Iterator[dict[str, Any]]:
    """A world of one process on NCCL."""
    parallel_state.initialize_model_parallel()
    yield {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    parallel_state.shutdown()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def bits(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """Weights and state of this rank, on the host."""
    everything = {**optimizer.named_parameters, **optimizer.state_dict()}
    return {name: local(tensor.detach()).cpu().clone() for name, tensor in everything.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, one in expected.items() if not torch.equal(found[name], one)] == []


@pytest.mark.parametrize("host", [HOST, HALF], ids=["all", "half"])
@pytest.mark.parametrize("chosen", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_same_bits(host: dict[str, Any], chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty updates that the host queues while the device is busy, in many parts, the tenth with an infinite gradient.

    Mutations: leave out a wait of a stream for another; give the parts' memory away before the copies out are done.
    """
    monkeypatch.setattr(host_moments, "AT_A_TIME", 2**20)
    shapes = [(1024, 512), (2048, 1024), (999,), (4096, 1024), (3, 7), (1024, 1024)] * 3

    def train(more: dict[str, Any]) -> MegatronOptimizer:
        generator = torch.Generator(device()).manual_seed(1)
        draw = [torch.randn(shape, generator=generator, device=device()) for shape in shapes]
        parameters = {f"layers.{number}.weight": nn.Parameter(one) for number, one in enumerate(draw)}
        optimizer = MegatronOptimizer(OptimizerConfig(lr=0.01, clip_grad=1.0, **chosen, **more), parameters)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        for step in range(20):
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator, device=device())
            if step == 10:
                parameters["layers.0.weight"].grad.view(-1)[:1].fill_(torch.inf)  # type: ignore[union-attr]
            optimizer.step()
        return optimizer

    expected, optimizer = bits(train({})), train(host)
    assert_equal(bits(optimizer), expected)
    on_host = [one for state in optimizer.state.values() for one in state.values() if one.device.type == "cpu"]
    assert all(one.is_pinned() for one in on_host)
    kept = sum(one.numel() for state in optimizer.state.values() for key, one in state.items() if key != "step")
    assert sum(one.numel() for one in on_host) >= (0.5 if host is HALF else 1.0) * kept > 0


@pytest.mark.parametrize("host", [HOST, HALF], ids=["all", "half"])
def test_less_memory(host: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """16 matrices of 16 MiB have 512 MiB of moments. During the update three parts of a matrix are here, 96 MiB.

    Mutations: moments on the device; all parts at once; a part's memory kept to the end of the step.
    """
    monkeypatch.setattr(host_moments, "AT_A_TIME", 2**22)
    size, mib = 2**22, 2**20

    def peaks(more: dict[str, Any]) -> tuple[int, int]:
        gc.collect()
        before = torch.cuda.memory_allocated()
        parameters = {
            f"layers.{number}.weight": nn.Parameter(torch.zeros(2048, size // 2048, device=device()))
            for number in range(16)
        }
        optimizer = MegatronOptimizer(OptimizerConfig(lr=0.01, **more), parameters)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        between = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        return between, torch.cuda.max_memory_allocated() - before

    plain, peak_of_plain = peaks({})
    between, peak = peaks(host)
    moved = 512 * mib if host is HOST else 256 * mib
    assert between == pytest.approx(plain - moved, abs=mib)
    assert peak <= peak_of_plain - moved + 100 * mib


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("chosen", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("source", "target"), [(HOST, {}), ({}, HOST), (HALF, HOST)], ids=["out", "in", "more"])
def test_a_checkpoint_is_read_by_either_side(
    groups: dict[str, Any],
    chosen: dict[str, Any],
    source: dict[str, Any],
    target: dict[str, Any],
    background: bool,
    tmp_path: Path,
) -> None:
    """Saved right behind a step, while copies to the host may be under way; the run goes on as the other one does.

    Mutations: state_dict() does not wait for the device; moments as plain tensors; shards moved to the mesh's device.
    """
    saved_model, saved = small_model(device(), False, {**chosen, **source}, bf16=True)
    loaded_model, loaded = small_model(device(), False, {**chosen, **target}, bf16=True)
    for step in range(3):
        train_step(saved_model, saved, [batch(step, device())], **groups)
    saver = BackgroundSaver() if background else None
    save_checkpoint(tmp_path, 3, saved_model, saved, {}, config_dict={}, background=saver)
    expected = bits(saved)
    if saver is not None:
        saver.finish()
        saver.close()
    assert load_checkpoint(tmp_path, loaded_model, loaded, load_rng=False) is not None
    assert_equal(bits(loaded), expected)
    for optimizer in (saved, loaded):
        for number, parameter in enumerate(optimizer.named_parameters.values()):
            generator = torch.Generator(device()).manual_seed(number)
            parameter.grad = torch.zeros_like(parameter)
            shard = local(parameter.grad.detach())
            shard.copy_(torch.randn(shard.shape, generator=generator, device=device()))
        optimizer.step()
    assert_equal(bits(loaded), bits(saved))
