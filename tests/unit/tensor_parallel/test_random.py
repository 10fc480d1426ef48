"""Random streams in one process."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel import checkpoint, get_cuda_rng_tracker, model_parallel_cuda_manual_seed


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    get_cuda_rng_tracker().reset()


def test_a_stream_goes_on_where_it_stopped_and_leaves_the_default_alone() -> None:
    tracker = get_cuda_rng_tracker()
    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    draws = [torch.rand(1)]
    with tracker.fork():
        first = torch.rand(1)
    draws.append(torch.rand(1))
    with tracker.fork():
        second = torch.rand(1)
    assert torch.equal(torch.cat(draws), expected)
    generator = torch.Generator().manual_seed(5 + 2718)
    assert torch.equal(torch.cat([first, second]), torch.rand(2, generator=generator))


def test_ranks_given_by_hand_move_the_seeds() -> None:
    drawn = []
    for ranks in ({"tp_rank": 0}, {"tp_rank": 1}, {"ep_rank": 1}, {"etp_rank": 1}):
        model_parallel_cuda_manual_seed(5, **ranks)
        for stream in ("model-parallel-rng", "expert-parallel-rng"):
            with get_cuda_rng_tracker().fork(stream):
                drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 2 + 3  # one more model-parallel stream, two more expert-parallel ones


def test_saved_streams_resume() -> None:
    tracker = get_cuda_rng_tracker()
    model_parallel_cuda_manual_seed(5)
    saved = tracker.get_states()
    with tracker.fork():
        first = torch.rand(3)
    tracker.set_states(saved)
    with tracker.fork():
        assert torch.equal(torch.rand(3), first)


def test_refusals() -> None:
    tracker = get_cuda_rng_tracker()
    with pytest.raises(ConfigError, match="no random stream 'model-parallel-rng'"), tracker.fork():
        pass
    tracker.add("mine", 1)
    with pytest.raises(ConfigError, match="mine exists already"):
        tracker.add("mine", 2)


def test_recompute_without_a_process_group() -> None:
    model_parallel_cuda_manual_seed(5)
    x = torch.randn(4, 4, requires_grad=True)

    def function(hidden: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            return F.dropout(hidden.exp(), 0.5)

    output = checkpoint(function, True, x)
    output.sum().backward()
    assert torch.allclose(x.grad, output.detach())
