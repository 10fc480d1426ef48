"""Memory of the host that CUDA has pinned, to the byte.

pytest -m gpu
"""

import gc

import pytest
import torch

from megatron_lite.pinned_memory import HostBytes, host_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
MIB = 2**20


def from_torchs_allocator() -> int:
    return torch.cuda.host_memory_stats()["allocated_bytes.current"]


def test_tensors_are_pinned_while_they_are_there() -> None:
    """Pinning the same pages a second time is an error of CUDA, so they were unpinned. Mutations: neither, either."""
    torch.zeros(1, device="cuda")
    before = from_torchs_allocator()
    for _ in range(2):
        like = {f"{n}": (torch.empty(size, device="cuda"), torch.float32) for n, size in enumerate((3, 7 * MIB, 999))}
        made = host_tensors(like, pinned=True)
        assert all(one.is_pinned() for one in made.values())
        expected = torch.randn(7 * MIB, device="cuda")
        torch.cuda._sleep(100_000_000)
        made["1"].copy_(expected, non_blocking=True)
        back = made["1"].to("cuda", non_blocking=True)
        assert torch.equal(back, expected)
        address = made["1"].data_ptr() - made["0"].data_ptr()
        assert address == 256
        del made
        gc.collect()
    assert from_torchs_allocator() == before


def test_bytes_that_travel_take_what_they_are() -> None:
    """600 MiB and 129 MiB take that; torch alone takes 1,024 and 256."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    before = from_torchs_allocator()
    whole = torch.randint(256, (129 * MIB,), dtype=torch.uint8, device=device)
    rooms = [HostBytes(count * MIB, device) for count in (600, 129)]
    assert from_torchs_allocator() - before <= 732 * MIB
    rooms[1].copy_from(whole)
    back = torch.empty_like(whole)
    rooms[1].copy_to(back)
    assert torch.equal(back, whole)
