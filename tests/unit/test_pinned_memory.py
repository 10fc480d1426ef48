"""Memory of the host to the byte: what lies in it, how much of it there is, and when it goes or is used again.

Without a GPU the same memory is plain. What would be asked of CUDA is recorded here, and done in tests/gpu.
"""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite import pinned_memory
from megatron_lite.errors import ConfigError
from megatron_lite.pinned_memory import ALIGNMENT, HostBytes, host_tensors, piece_sizes

CPU = torch.device("cpu")
LIKE: dict[str, tuple[Tensor, torch.dtype]] = {
    "odd": (torch.empty(7, 3), torch.bfloat16),
    "turned": (torch.empty(5, 4).t(), torch.float32),
    "none": (torch.empty(0, 9), torch.float32),
    "scalar": (torch.empty(()), torch.float64),
    "bytes": (torch.empty(ALIGNMENT, dtype=torch.uint8), torch.uint8),
    "parameter": (torch.nn.Parameter(torch.ones(3, 2)), torch.float32),
}


def test_tensors_lie_side_by_side() -> None:
    """Mutations: begins not aligned; begins counted in elements; one begin for all; strides of a contiguous tensor."""
    made = host_tensors(LIKE, pinned=False)
    assert list(made) == list(LIKE)
    for number, (name, one) in enumerate(made.items()):
        like, dtype = LIKE[name]
        assert (one.shape, one.stride(), one.dtype, one.device) == (like.shape, like.stride(), dtype, CPU)
        assert not one.requires_grad
        assert not one.any()
        one.fill_(number + 1)
    there = [one for one in made.values() if one.numel()]
    assert all((one == number + 1).all() for number, one in enumerate(made.values()))
    assert [one.data_ptr() - there[0].data_ptr() for one in there] == [place * ALIGNMENT for place in range(5)]
    assert there[0].data_ptr() % ALIGNMENT == 0


def test_what_is_saved_of_one_is_no_more_than_it() -> None:
    """torch.save writes whole storages, and DCP copies tensors that do not fill theirs. Mutation: views of one."""
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in host_tensors(LIKE, pinned=False).values())


class Runtime:
    """CUDA's, as far as it is asked: pins what it is told to, and says in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool = False) -> None:
        self.asked: list[Any] = []
        self.refuses = refuses
        cudart = SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.unregister)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(torch.cuda, "check_error", self.check)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.asked.append("wait"))

    def register(self, address: int, size: int, flags: int) -> int:
        self.asked.append(("pin", address, size))
        return 2 if self.refuses else 0

    def unregister(self, address: int) -> int:
        if sys.platform.startswith("linux"):  # it must still be mapped, not merely have been
            maps = Path("/proc/self/maps").read_text().splitlines()
            ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
            assert any(first <= address < last for first, last in ranges)
        self.asked.append(("unpin", address))
        return 0

    def check(self, status: int) -> None:
        if status:
            raise Refused


class Refused(torch.cuda.CudaError):
    def __init__(self) -> None:
        RuntimeError.__init__(self, "out of memory")


def test_all_of_it_is_pinned_once_until_the_last_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 600 MiB. Mutations: each tensor for itself; unpinned with the first, before the wait, or unmapped."""
    runtime = Runtime(monkeypatch)
    like = {"a": (torch.empty(400, 2**20, device="meta"), torch.uint8), "b": (torch.empty(50, 2**20), torch.float32)}
    made = host_tensors(like, pinned=True)
    address = made["a"].data_ptr()
    assert runtime.asked == [("pin", address, 600 * 2**20)]
    state = made.pop("b").view(-1)
    del made
    gc.collect()
    assert len(runtime.asked) == 1
    state[-1] = 1.0
    del state
    gc.collect()
    assert runtime.asked[1:] == ["wait", ("unpin", address)]


def test_nothing_is_pinned_where_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    host_tensors(LIKE, pinned=False)
    assert host_tensors({}, pinned=True) == {}
    assert host_tensors({"none": LIKE["none"]}, pinned=True)["none"].shape == (0, 9)
    assert runtime.asked == []


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the answer not looked at; copies would then wait, and no figure would say why."""
    runtime = Runtime(monkeypatch, refuses=True)
    with pytest.raises(ConfigError, match=r"^3\.00 GiB .* pinned \(out of memory\).* --optimizer-offload-fraction"):
        host_tensors({"large": (torch.empty(3, 2**30, device="meta"), torch.uint8)}, pinned=True)
    gc.collect()
    assert [one[0] for one in runtime.asked] == ["pin"]

    def no_memory(*arguments: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pinned_memory, "_Mapping", no_memory)
    with pytest.raises(ConfigError, match=r"cannot be allocated \(.*Cannot allocate memory\)"):
        host_tensors(LIKE, pinned=False)


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 127, 4095, 4097, 600 * 2**20, 2**30 - 1, 2**30 + 1])
def test_pieces_are_powers_of_two(count: int) -> None:
    """torch's rounding adds nothing to them. Mutations: the rest cut off; one piece too many."""
    sizes = piece_sizes(count)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sizes == sorted(set(sizes), reverse=True)
    assert len(sizes) <= 8
    assert count <= sum(sizes) < count * (1 + 1 / 128) + 1
    assert sum(sizes[:-1]) < count
    if count == 600 * 2**20:
        assert sum(sizes) == count


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that are made in this test."""
    pinned_memory._free_pieces.cache_clear()
    made: list[Tensor] = []
    make = pinned_memory._piece

    def counted(size: int, device: torch.device) -> Tensor:
        made.append(make(size, device))
        return made[-1]

    monkeypatch.setattr(pinned_memory, "_piece", counted)
    return made


@pytest.mark.parametrize("count", [1, 77, 4096, 10007])
def test_bytes_come_back(count: int, pieces: list[Tensor]) -> None:
    """Mutations: all pieces from the first byte; the bytes of the last piece that are too many."""
    whole = torch.randint(256, (count,), dtype=torch.uint8)
    room, back = HostBytes(count, CPU), torch.zeros_like(whole)
    room.copy_from(whole)
    expected = whole.clone()
    whole.zero_()
    room.copy_to(back)
    assert torch.equal(back, expected)
    assert sum(map(len, pieces)) == sum(piece_sizes(count))


def test_room_is_used_again_when_nobody_holds_it(pieces: list[Tensor]) -> None:
    """And not before, whatever the counts were. Mutations: given back at once, or never; the pieces of one count."""
    values = [torch.randint(256, (count,), dtype=torch.uint8) for count in (96, 64, 32, 96)]
    rooms = [HostBytes(len(one), CPU) for one in values]
    for room, one in zip(rooms, values, strict=True):
        room.copy_from(one)
    for room, one in zip(rooms, values, strict=True):
        room.copy_to(found := torch.empty_like(one))
        assert torch.equal(found, one)
    assert sorted(map(len, pieces)) == [32] * 3 + [64] * 3
    del room, rooms
    gc.collect()
    again = [HostBytes(32, CPU) for _ in range(3)] + [HostBytes(64, CPU) for _ in range(3)]
    assert len(pieces) == 6
    again.append(HostBytes(32, CPU))
    assert len(pieces) == 7
