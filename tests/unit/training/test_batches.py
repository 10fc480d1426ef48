"""From collated samples to this rank's part of them: padding, documents, the split over context parallel ranks."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite.context_parallel import get_padding, zigzag_positions
from megatron_lite.errors import ConfigError
from megatron_lite.training.batches import MicroBatchStream, packed_documents, prepare

NAMES = ("tokens", "labels", "loss_mask", "position_ids")


@pytest.fixture
def world() -> Iterator[None]:
    """Leaves no process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def group_of(rank: int, size: int) -> dist.ProcessGroup:
    """A context parallel group as rank `rank` of it sees it; nothing is communicated."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def samples(batch: int, length: int) -> dict[str, Tensor]:
    """Collated samples whose values are all different and none 0."""
    tokens = torch.arange(1, batch * length + 1).view(batch, length)
    return {
        "tokens": tokens,
        "labels": tokens + 1000,
        "loss_mask": tokens / 1000,
        "position_ids": torch.arange(1, length + 1).repeat(batch, 1),
    }


def starts_of(begins: list[set[int]], length: int) -> Tensor:
    """document_starts [b, length] of sequences whose documents begin at 0 and at the given indices."""
    rows = [[max(b for b in {0} | row if b <= i) for i in range(length)] for row in begins]
    return torch.tensor(rows)


def test_without_context_parallelism_nothing_changes() -> None:
    """And a sample's number in its blend, which is no sequence, does not reach the model."""
    batch = samples(2, 5)
    mine = prepare(batch | {"dataset_id": torch.tensor([0, 1])})
    assert set(mine) == set(NAMES)
    assert all(torch.equal(mine[name], batch[name]) for name in NAMES)


@pytest.mark.usefixtures("world")
@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), cp=st.integers(1, 4), tp=st.sampled_from([1, 2]), data=st.data())
def test_ranks_together_have_the_padded_batch(length: int, cp: int, tp: int, data: st.DataObject) -> None:
    """Each tensor is padded with 0 to a length that splits; rank r has chunks r and 2 cp - 1 - r of it.

    Mutations: padding behind the split instead of before it, padding in front, a loss mask padded with 1.
    """
    batch = samples(2, length)
    padding = get_padding(length, cp, tp, has_sp=tp > 1)
    begins = data.draw(st.lists(st.sets(st.integers(0, length - 1)), min_size=2, max_size=2))
    starts = starts_of(begins, length)
    original = {name: tensor.clone() for name, tensor in batch.items()}
    for rank in range(cp):
        mine = prepare(batch | {"document_starts": starts}, group_of(rank, cp), padding)
        where = zigzag_positions((0, length + padding), cp, rank)
        for name in NAMES:
            padded = torch.zeros(2, length + padding, dtype=batch[name].dtype)
            padded[:, :length] = batch[name]
            assert torch.equal(mine[name], padded[:, where])
        assert mine["tokens"].size(1) % tp == 0
        # The documents are those of all ranks.
        assert mine["packed_seq_params"].cu_seqlens_split.tolist() == [i * (length + padding) for i in range(3)]
    assert all(torch.equal(batch[name], original[name]) for name in NAMES)


@settings(max_examples=150, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 20), padding=st.integers(0, 9), data=st.data())
def test_documents_against_their_definition(batch: int, length: int, padding: int, data: st.DataObject) -> None:
    """Each token is in the document that its start says, each padding token in none, no document in two sequences.

    Mutations: boundaries without the row's offset, padding counted as a token, a row's first document left out.
    """
    begins = data.draw(st.lists(st.sets(st.integers(0, length - 1)), min_size=batch, max_size=batch))
    starts = starts_of(begins, length)
    packed = packed_documents(starts, padding)
    padded = length + padding
    document = torch.full((batch * padded,), -1)
    for begin, end in packed.layout.documents:
        document[begin:end] = begin
    expected = torch.full((batch, padded), -1)
    expected[:, :length] = starts + torch.arange(batch)[:, None] * padded
    assert document.tolist() == expected.flatten().tolist()
    assert packed.layout.stretches == tuple(range(0, batch * padded + 1, padded))
    assert packed.max_seqlen_q == max(end - begin for begin, end in packed.layout.documents)
    assert packed.is_packed
    assert packed.cu_seqlens_q is not None
    assert packed.cu_seqlens_q.dtype == torch.int32


def test_boundaries_are_read_on_the_host() -> None:
    """A stream for a device without storage sends tensors there, and keeps the documents where they can be read."""
    batch = samples(2, 6) | {"document_starts": starts_of([{2}, set()], 6)}
    stream = MicroBatchStream([batch], torch.device("meta"), padding=2)
    (mine,) = stream.next_global_batch(1)
    assert {mine[name].device.type for name in NAMES} == {"meta"}
    assert mine["tokens"].shape == (2, 8)
    packed = mine["packed_seq_params"]
    assert packed.cu_seqlens_q.tolist() == [0, 2, 6, 12]
    assert packed.cu_seqlens_q_padded.tolist() == [0, 2, 8, 16]
    assert packed.layout.documents == ((0, 2), (2, 6), (8, 14))


@pytest.mark.usefixtures("world")
def test_a_length_that_does_not_split() -> None:
    with pytest.raises(ConfigError, match=r"divisible by cp_size \* 2 \(4\): use 4 or 8, or pad with --pad-to-mul"):
        prepare(samples(1, 6), group_of(0, 2))


def test_data_that_end_too_early() -> None:
    stream = MicroBatchStream([samples(1, 4)], torch.device("cpu"))
    with pytest.raises(RuntimeError, match="ended before training"):
        stream.next_global_batch(2)
