"""Which tokens a context parallel rank holds: T14, T16, T18.

Mutations are of megatron_lite/context_parallel/sharding.py; each was tried and made the test that names it fail.
"""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite import parallel_state
from megatron_lite.context_parallel import (
    SequenceLayout,
    get_batch_on_this_cp_rank,
    split_sequence,
    unsplit_sequence,
    zigzag_positions,
)
from megatron_lite.context_parallel.sharding import SEQUENCE_DIMS, chunk_length
from megatron_lite.errors import ConfigError
from tests.unit.context_parallel.layouts import splits


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


def batch_of(length: int, batch: int = 2) -> dict[str, Tensor]:
    """What a data loader gives, with labels shifted in the whole sequence: tokens [b, s] and the rest."""
    text = torch.arange(100, 100 + batch * (length + 1)).view(batch, length + 1)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": torch.rand(batch, length, generator=torch.Generator().manual_seed(2)),
        "position_ids": torch.arange(length).repeat(batch, 1),
        "attention_mask": torch.ones(batch, 1, length, length, dtype=torch.bool).triu(1),
    }


def by_definition(whole: Tensor, dim: int, cp: int, rank: int, stretches: tuple[int, ...]) -> Tensor:
    """Chunks `rank` and 2 cp - 1 - rank of each stretch, cut with torch.chunk."""
    parts = []
    for start, end in pairwise(stretches):
        chunks = whole.narrow(dim, start, end - start).chunk(2 * cp, dim=dim)
        parts += [chunks[rank], chunks[2 * cp - 1 - rank]] if cp > 1 else [whole.narrow(dim, start, end - start)]
    return torch.cat(parts, dim=dim)


@settings(max_examples=80, deadline=None)
@given(split=splits())
def test_unsplit_is_the_inverse_of_split(split: tuple[int, tuple[int, ...]]) -> None:
    """T14: tokens, labels, masks (of [b, 1, s, s] the rows) and positions, in any number of stretches.

    Mutations: chunk rank + 1 instead of rank; chunk 2 cp - 2 - rank for the late one; the late chunk left out;
    positions counted from each stretch's start; unsplit without sorting, or for one stretch only.
    """
    cp, stretches = split
    for name, whole in batch_of(stretches[-1]).items():
        dim = SEQUENCE_DIMS.get(name, 1)
        parts = [split_sequence(whole, dim, cp, rank, stretches) for rank in range(cp)]
        for rank, part in enumerate(parts):
            assert torch.equal(part, by_definition(whole, dim, cp, rank, stretches)), name
            assert part.size(dim) == whole.size(dim) // cp
        assert torch.equal(unsplit_sequence(parts, dim, stretches), whole), name


@pytest.mark.usefixtures("world")
@settings(max_examples=40, deadline=None)
@given(cp=st.integers(1, 4), chunk=st.integers(1, 4))
def test_batch_on_this_rank(cp: int, chunk: int) -> None:
    """T14, T18: every tensor of a batch is split the same way, and each token keeps its label, weight and mask row.

    The label of the last token of a chunk is the first token of the next chunk, which another rank holds: so labels
    are shifted before the split. Mutations: one dimension for all tensors (a mask's columns are split, or its batch);
    the group's rank left out, so that all ranks hold the same; labels left unsplit.
    """
    length = chunk * 2 * cp
    whole = batch_of(length)
    text = torch.cat([whole["tokens"], whole["labels"][:, -1:]], dim=1)
    seen = []
    for rank in range(cp):
        mine = get_batch_on_this_cp_rank(whole, group_of(rank, cp))
        positions = mine["position_ids"]
        assert positions.shape == (2, length // cp)
        assert torch.equal(mine["tokens"], text.gather(1, positions))
        assert torch.equal(mine["labels"], text.gather(1, positions + 1))
        assert torch.equal(mine["loss_mask"], whole["loss_mask"].gather(1, positions))
        assert torch.equal(mine["attention_mask"], whole["attention_mask"][:, :, positions[0]])
        seen += positions[0].tolist()
    assert sorted(seen) == list(range(length))


@pytest.mark.usefixtures("world")
def test_batch_is_split_over_the_global_group_unless_told_otherwise() -> None:
    """As Megatron's users call it: without a group, and with masks that are None.

    Mutations: a missing group taken for one rank, so that each rank silently keeps all tokens; None split too.
    """
    group_of(3, 4)
    parallel_state.initialize_model_parallel(context_parallel_size=4)
    try:
        mine = get_batch_on_this_cp_rank({"tokens": torch.arange(16).view(1, 16), "attention_mask": None})
    finally:
        parallel_state.destroy_model_parallel()
    assert mine["tokens"] is not None
    assert mine["tokens"].tolist() == [[6, 7, 8, 9]]
    assert mine["attention_mask"] is None


@pytest.mark.usefixtures("world")
def test_labels_shifted_after_the_split_would_be_wrong() -> None:
    """T18: at the end of each early chunk the next token of the rank's row is not the next token of the sequence."""
    mine = get_batch_on_this_cp_rank(batch_of(8, batch=1), group_of(0, 2))
    assert mine["tokens"].tolist() == [[100, 101, 106, 107]]
    assert mine["labels"].tolist() == [[101, 102, 107, 108]]


@pytest.mark.parametrize(
    ("stretches", "expected"),
    [((0, 8), [[0, 1, 6, 7], [2, 3, 4, 5]]), ((0, 4, 8), [[0, 3, 4, 7], [1, 2, 5, 6]])],
    ids=["one sequence", "two documents"],
)
def test_positions_of_eight_tokens(stretches: tuple[int, ...], expected: list[list[int]]) -> None:
    """T16: positions are those of the whole row; packed documents are split one by one.

    Mutations: stretches ignored, so that two documents are split like one sequence; a rank's chunks counted from 0.
    """
    assert [zigzag_positions(stretches, 2, rank).tolist() for rank in (0, 1)] == expected


def test_one_rank_holds_everything() -> None:
    """Also lengths that 2 does not divide, and the tensor itself is handed back."""
    whole = torch.arange(7)
    assert split_sequence(whole, 0, 1, 0) is whole
    assert unsplit_sequence([whole], 0) is whole
    assert zigzag_positions((0, 3, 7), 1, 0).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("length", "cp", "remedy"), [(6, 2, "use 4 or 8"), (3, 2, "use 4, or pad"), (100, 8, "use 96 or 112")]
)
def test_a_length_that_does_not_fit(length: int, cp: int, remedy: str) -> None:
    """The message names the rule and the sizes that would do. Mutation: the check divides by cp instead of 2 cp."""
    with pytest.raises(ConfigError) as raised:
        chunk_length(length, cp)
    message = str(raised.value)
    assert f"The sequence length is {length}" in message
    assert f"sequence length must be divisible by cp_size * 2 ({2 * cp})" in message
    assert remedy in message
    assert "--pad-to-multiple" in message


def test_stretches_of_another_row_are_refused() -> None:
    """Mutation: without the check, tokens behind the last stretch are lost."""
    for cp in (1, 3):
        with pytest.raises(ConfigError, match="stretches end at 6, but dimension 0 has 12 tokens"):
            split_sequence(torch.arange(12), 0, cp, 0, stretches=(0, 6))


def test_each_stretch_must_fit() -> None:
    """Though the whole row would."""
    with pytest.raises(ConfigError, match="sequence length is 6"):
        zigzag_positions((0, 6, 16), 2, 0)


def test_layout_of_a_row() -> None:
    """Documents by token, padding as -1; rows only where all stretches have one length."""
    layout = SequenceLayout((0, 4, 8), ((0, 3), (4, 4), (4, 8)))
    assert layout.document_of_token().tolist() == [0, 0, 0, -1, 2, 2, 2, 2]
    assert layout.equal_rows() == 2
    assert SequenceLayout((0, 4, 12), ()).equal_rows() == 1
    assert SequenceLayout.whole(5) == SequenceLayout((0, 5), ((0, 5),))
