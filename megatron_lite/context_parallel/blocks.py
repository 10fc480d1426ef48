"""The plan of an attention: which rectangles of the score matrix this rank computes, and in which order.

A document's tokens on one rank are neighbours: an early piece A (in chunk r) and, right behind it, a late piece B (in
chunk 2 cp - 1 - r). Under a causal mask this leaves one rectangle, without any mask inside, for each other rank:

    keys of an earlier rank        its A stands before our A and B, its B behind them:  (A, B) x their A
    keys of a later rank           both stand between our A and our B:                  B x (their A, their B)
    our own keys                   the triangle of (A, B)

So no block that is hidden as a whole is ever computed, a mask is never stored, and every rank has the same work.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.context_parallel.sharding import SequenceLayout, chunk_length


class Block(NamedTuple):
    """Queries [q_start, q_end) look at keys [k_start, k_end), all of them or, if causal, those up to their own place.

    The keys are those of rank (cp_rank - step) % cp_size, counted in that rank's row.
    """

    step: int
    q_start: int
    q_end: int
    k_start: int
    k_end: int
    causal: int

    @property
    def scores(self) -> int:
        """Query-key pairs it computes."""
        queries, keys = self.q_end - self.q_start, self.k_end - self.k_start
        return queries * (queries + 1) // 2 if self.causal else queries * keys


class Piece(NamedTuple):
    """A document's tokens on one rank, [start, end) of the rank's row; the late piece begins at `middle`."""

    start: int
    middle: int
    end: int

    @property
    def size(self) -> int:
        """Tokens."""
        return self.end - self.start


def piece_on_rank(place: tuple[int, int, int, int], cp_size: int, cp_rank: int) -> Piece:
    """One document's tokens on one rank; empty where it has none there.

    Args:
        place: one of SequenceLayout.documents_with_stretch.
        cp_size: number of ranks the row is split over.
        cp_rank: this one.
    """
    start, end, low, high = place
    if cp_size == 1:
        return Piece(start, end, end)
    chunk = chunk_length(high - low, cp_size)
    early, late = low + cp_rank * chunk, low + (2 * cp_size - 1 - cp_rank) * chunk
    middle = low // cp_size + chunk  # where, on every rank, the late chunk of this stretch begins
    before = max(min(end, early + chunk) - max(start, early), 0)
    after = max(min(end, late + chunk) - max(start, late), 0)
    first = middle - chunk + max(start - early, 0) if before else middle + max(start - late, 0)
    return Piece(first, first + before, first + before + after)


def attention_blocks(layout: SequenceLayout, cp_size: int, cp_rank: int, causal: bool = True) -> list[Block]:
    """The plan of one rank, in the order of the ring: its own keys, then those of the rank before it, and so on.

    Args:
        layout: the whole row.
        cp_size: number of ranks it is split over.
        cp_rank: this one.
        causal: tokens see their document up to themselves; otherwise all of it.
    """
    # Most of many documents have no token here; only for those that have some are other ranks' pieces looked up.
    places = layout.documents_with_stretch()
    own = [(piece, place) for place in places if (piece := piece_on_rank(place, cp_size, cp_rank)).size > 0]
    plan = []
    for step in range(cp_size):
        source = (cp_rank - step) % cp_size
        for q, place in own:
            k = piece_on_rank(place, cp_size, source)
            if step == 0 or not causal:
                block = Block(step, q.start, q.end, k.start, k.end, int(causal))
            elif source < cp_rank:
                block = Block(step, q.start, q.end, k.start, k.middle, 0)
            else:
                block = Block(step, q.middle, q.end, k.start, k.end, 0)
            plan.append(block)
    return [block for block in plan if block.scores > 0]


def as_tensor(blocks: list[Block]) -> Tensor:
    """A plan as int64 [blocks, 6] on the CPU, the form in which compiled code can carry it."""
    with torch.inference_mode(False):  # an operator keeps it for backward, and plans outlive an evaluation
        return torch.tensor(blocks, dtype=torch.int64, device="cpu").view(-1, 6)


def as_blocks(plan: Tensor) -> list[Block]:
    """The inverse of as_tensor."""
    return [Block(*row) for row in plan.tolist()]
