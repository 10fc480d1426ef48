"""torch's symmetric memory operators as products that overlap call them, on one GPU in a group of one rank.

Two ranks would need two GPUs. One rank sends nothing, but takes the same way through the operators: layouts, dtypes and
the workspace are theirs. The ring between two ranks that share a GPU is in test_two_ranks.py. pytest -m gpu
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lite.tensor_parallel.overlapped import (
    choose_way,
    gather_then_multiply,
    has_symmetric_memory,
    multiply_then_reduce_scatter,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """One rank under NCCL, whose GPU can share its memory."""
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        world = dist.group.WORLD
        assert world is not None
        with torch.device("meta"):  # models are built under it
            works = has_symmetric_memory(world)
        if not works:
            pytest.skip("this system does not let processes share GPU memory")
        yield world
    finally:
        del world
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_of_one_rank(group: dist.ProcessGroup, dtype: torch.dtype, with_bias: bool) -> None:
    """Mutations: give the weight not transposed; give the operators what is not contiguous."""
    assert choose_way(group) == "symmetric"
    generator = torch.Generator("cuda").manual_seed(1)
    x, weight, bias = (
        torch.randn(*shape, device="cuda", dtype=dtype, generator=generator) for shape in ((24, 3, 64), (40, 64), (40,))
    )
    x = x.transpose(0, 1)  # [3, 24, 64], not contiguous
    added = bias if with_bias else None
    near = {"rtol": 1.6e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-2}
    for keep in (False, True):
        product, gathered = gather_then_multiply(x, weight, added, group, "symmetric", keep=keep)
        torch.testing.assert_close(product, F.linear(x, weight, added), **near)
        assert gathered is None if not keep else torch.equal(gathered, x)
    scattered = multiply_then_reduce_scatter(x, weight, group, "symmetric")
    torch.testing.assert_close(scattered, F.linear(x, weight), **near)


def test_operators_compile(group: dist.ProcessGroup) -> None:
    """In one graph. Mutation: choose the way inside of it."""
    x, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((32, 2, 64), (64, 64)))

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        product, _ = gather_then_multiply(x, weight, None, group, "symmetric")
        return multiply_then_reduce_scatter(product, weight, group, "symmetric")

    compiled = torch.compile(there_and_back, fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(F.linear(x, weight), weight), rtol=2e-2, atol=1.0)
