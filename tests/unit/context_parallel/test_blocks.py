"""The plan of an attention, against the visibility of every pair of tokens written out.

Mutations are of megatron_lite/context_parallel/blocks.py; each was tried and made the test that names it fail.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.context_parallel import SequenceLayout, zigzag_positions
from megatron_lite.context_parallel.blocks import Block, as_blocks, as_tensor, attention_blocks, piece_on_rank
from megatron_lite.errors import ConfigError
from tests.unit.context_parallel.layouts import layouts


def visible_pairs(layout: SequenceLayout, causal: bool) -> Tensor:
    """int64 [t, t]: 1 where the query (row) sees the key (column)."""
    document = layout.document_of_token()
    visible = (document[:, None] == document[None, :]) & (document >= 0)[:, None]
    return (visible.tril() if causal else visible).long()


def computed_pairs(layout: SequenceLayout, cp: int, causal: bool) -> Tensor:
    """int64 [t, t]: how many blocks of all ranks compute each pair."""
    length = layout.stretches[-1]
    count = torch.zeros(length, length, dtype=torch.int64)
    positions = [zigzag_positions(layout.stretches, cp, rank) for rank in range(cp)]
    for rank in range(cp):
        for block in attention_blocks(layout, cp, rank, causal):
            queries = positions[rank][block.q_start : block.q_end]
            keys = positions[(rank - block.step) % cp][block.k_start : block.k_end]
            assert not block.causal or len(queries) == len(keys)
            part = torch.ones(len(queries), len(keys), dtype=torch.int64)
            count[queries[:, None], keys] += part.tril() if block.causal else part
    return count


@settings(max_examples=300, deadline=None)
@given(drawn=layouts(), causal=st.booleans())
def test_blocks_are_the_visible_pairs(drawn: tuple[int, SequenceLayout], causal: bool) -> None:
    """Each pair that may be seen is computed by one block of one rank, and no other pair by any.

    So no block is hidden in part or as a whole. Documents of any length in any stretches: of one token, of none,
    shorter than a chunk, across a chunk's boundary, and padding anywhere. Mutations: < and > swapped in
    attention_blocks; keys of an earlier rank up to k.end; queries for a later rank from q.start; the causal flag of the
    own block dropped, or set in all steps; `middle` computed without the stretches before; pieces that begin where
    their chunk does instead of where the document does, early or late; the source as rank + step.
    """
    cp, layout = drawn
    assert torch.equal(computed_pairs(layout, cp, causal), visible_pairs(layout, causal))


@settings(max_examples=100, deadline=None)
@given(drawn=layouts(), causal=st.booleans())
def test_a_step_has_each_token_once(drawn: tuple[int, SequenceLayout], causal: bool) -> None:
    """In one step no query and no key is in two blocks, and all blocks have the same mask.

    So the blocks of a step can go to the kernel together, and results be written and gradients added in any order.
    Steps come in order, no block is empty. Mutations: blocks without scores kept; own keys, or those of a later rank,
    planned in two blocks; blocks of one pair called causal.
    """
    cp, layout = drawn
    for rank in range(cp):
        plan = attention_blocks(layout, cp, rank, causal)
        assert [block.step for block in plan] == sorted(block.step for block in plan)
        assert all(block.scores > 0 for block in plan)
        for step in range(cp):
            blocks = [block for block in plan if block.step == step]
            queries = [i for block in blocks for i in range(block.q_start, block.q_end)]
            keys = [i for block in blocks for i in range(block.k_start, block.k_end)]
            assert len(queries) == len(set(queries))
            assert len(keys) == len(set(keys))
            assert {block.causal for block in blocks} <= {int(causal and step == 0)}


@settings(max_examples=100, deadline=None)
@given(drawn=layouts())
def test_pieces_are_the_documents(drawn: tuple[int, SequenceLayout]) -> None:
    """The pieces of all ranks are the document's tokens; the late piece begins at `middle`.

    Mutations: a document with only a late piece given the middle of its chunk's start; pieces of empty documents.
    """
    cp, layout = drawn
    documents = [place for place in layout.documents if place[1] > place[0]]
    found: list[list[int]] = [[] for _ in documents]
    for rank in range(cp):
        positions = zigzag_positions(layout.stretches, cp, rank).tolist()
        for number, place in enumerate(layout.documents_with_stretch()):
            piece, (_, _, low, high) = piece_on_rank(place, cp, rank), place
            assert piece.start <= piece.middle <= piece.end
            half = (low + high) / 2
            assert all(position < half for position in positions[piece.start : piece.middle]) or cp == 1
            assert all(position >= half for position in positions[piece.middle : piece.end])
            found[number] += positions[piece.start : piece.end]
    assert [sorted(tokens) for tokens in found] == [list(range(*place)) for place in documents]


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_every_rank_has_the_same_work(cp: int, chunk: int) -> None:
    """One causal document in chunks of c tokens: 2 c^2 + c pairs with a rank's own keys and 2 c^2 in each other step.

    Exactly, the diagonal included: cp (2 c^2 cp + c) is s (s + 1) / 2 with s = 2 cp c. And one block a step, so that
    no rank waits for another in any step of the ring. Mutations: keys of an earlier rank up to k.end; queries for a
    later rank from q.start; own keys without a mask; two blocks where a later rank's keys are its early and late piece.
    """
    layout = SequenceLayout.whole(2 * cp * chunk)
    for rank in range(cp):
        plan = attention_blocks(layout, cp, rank)
        assert [block.scores for block in plan] == [2 * chunk**2 + chunk] + [2 * chunk**2] * (cp - 1)
        assert [block.step for block in plan] == list(range(cp))
        whole = attention_blocks(layout, cp, rank, causal=False)
        assert [block.scores for block in whole] == [(2 * chunk) ** 2] * cp


def test_padded_documents_have_balanced_work_each() -> None:
    """Two documents split one by one: each rank has 2 c^2 cp + c pairs of each. Mutation: stretches ignored."""
    layout = SequenceLayout((0, 8, 24), ((0, 8), (8, 24)))
    for rank in (0, 1):
        plan = attention_blocks(layout, 2, rank)
        assert len(plan) == 4
        assert sum(block.scores for block in plan) == (2 * 2**2 * 2 + 2) + (2 * 4**2 * 2 + 4)


def test_a_document_shorter_than_its_chunks() -> None:
    """16 tokens of room over 4 ranks, 3 real ones: ranks 0 and 1 hold them, ranks 2 and 3 padding only, without error.

    Mutation: lengths of pieces not held at 0, which gives ranks 2 and 3 negative ones.
    """
    layout = SequenceLayout((0, 16), ((0, 3),))
    plans = [attention_blocks(layout, 4, rank) for rank in range(4)]
    assert plans[0] == [Block(0, 0, 2, 0, 2, 1)]
    assert plans[1] == [Block(0, 0, 1, 0, 1, 1), Block(1, 0, 1, 0, 2, 0)]
    assert plans[2] == plans[3] == []
    (place,) = layout.documents_with_stretch()
    assert [piece_on_rank(place, 4, rank).size for rank in range(4)] == [2, 1, 0, 0]


def test_a_row_of_padding_only() -> None:
    """No documents, or documents without tokens: an empty plan of the usual shape."""
    for documents in ((), ((0, 0), (4, 4))):
        plan = attention_blocks(SequenceLayout((0, 8), documents), 2, 1)
        assert plan == []
        assert as_tensor(plan).shape == (0, 6)
        assert as_blocks(as_tensor(plan)) == []


def test_a_plan_travels_as_a_tensor() -> None:
    plan = attention_blocks(SequenceLayout((0, 8, 16), ((0, 5), (8, 16))), 2, 0)
    assert as_tensor(plan).dtype == torch.int64
    assert as_blocks(as_tensor(plan)) == plan


@pytest.mark.parametrize(
    ("documents", "named"),
    [(((0, 6),), "tokens 0 to 6"), (((2, 4), (5, 9)), "tokens 5 to 9"), (((4, 8), (0, 4)), "tokens 0 to 4")],
    ids=["across", "beyond the end", "out of order"],
)
def test_documents_outside_of_their_stretch(documents: tuple[tuple[int, int], ...], named: str) -> None:
    """Across two stretches, beyond the last, or behind one that comes later. Mutation: the check left out."""
    with pytest.raises(ConfigError, match=named) as raised:
        attention_blocks(SequenceLayout((0, 4, 8), documents), 2, 0)
    assert "not inside one stretch" in str(raised.value)


def test_a_plan_made_by_an_evaluation_serves_training() -> None:
    """Mutation: as_tensor without inference_mode(False), whose result an operator cannot keep for backward."""
    with torch.inference_mode():
        plan = as_tensor([Block(0, 0, 2, 0, 2, 1)])
    assert not plan.is_inference()
