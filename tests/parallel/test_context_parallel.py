"""DotProductAttention with the sequence split over ranks, against SDPA on the whole sequence, in float64.

T15, T16, T19.
"""

import functools
import time
import weakref
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.context_parallel import measure_layer
from benchmarks.instruments import count_sent_bytes
from megatron_lite import parallel_state
from megatron_lite.context_parallel import (
    PackedSeqParams,
    split_sequence,
    unsplit_sequence,
)
from megatron_lite.context_parallel.ulysses import order_of_group
from megatron_lite.tensor_parallel import collectives
from megatron_lite.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.enums import AttnMaskType
from megatron_lite.transformer.transformer_config import TransformerConfig

BOUND = 1e-12

# Real and padded lengths differ; a document of one token, one without padding, one shorter than a chunk, one empty.
REAL = torch.tensor([0, 5, 6, 22, 24, 24])
PADDED = torch.tensor([0, 16, 24, 40, 56, 64])
# Documents of any length in two rows of 32 tokens: boundaries inside chunks, one-token documents, padding at the end.
IN_ROWS = torch.tensor([0, 1, 2, 13, 32, 32, 49, 61])

PACKINGS = {
    "plain": None,
    "padded documents": {"cu_seqlens_q": REAL, "cu_seqlens_q_padded": PADDED},
    "documents in rows": {"cu_seqlens_q": IN_ROWS, "cu_seqlens_split": torch.tensor([0, 32, 64])},
}


@dataclass(frozen=True)
class Case:
    """One way of splitting the attention."""

    cp: int
    comm_type: str
    packing: str = "plain"
    hierarchy: tuple[int, int] | None = None
    heads: int = 8
    groups: int = 2
    causal: bool = True
    backend: str = "auto"

    @property
    def name(self) -> str:
        """For the test's id."""
        parts = [f"cp{self.cp}", self.comm_type, self.packing.replace(" ", "-"), f"{self.heads}/{self.groups}"]
        return "-".join([*parts, self.backend] + ["bidirectional"] * (not self.causal))


def packed_params(case: Case) -> PackedSeqParams | None:
    fields = PACKINGS[case.packing]
    return None if fields is None else PackedSeqParams(**fields)


def allowed(case: Case, length: int) -> Tensor:
    """Which key each query may see, [s, s], straight from the definition."""
    fields = PACKINGS[case.packing]
    document = torch.zeros(length, dtype=torch.int64)
    if fields is not None:
        real = fields["cu_seqlens_q"].tolist()
        begin = fields.get("cu_seqlens_q_padded", fields["cu_seqlens_q"]).tolist()
        document.fill_(-1)
        for number in range(len(real) - 1):
            document[begin[number] : begin[number] + real[number + 1] - real[number]] = number
    visible = (document[:, None] == document[None, :]) & (document >= 0)[:, None]
    return visible.tril() if case.causal else visible


def inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Query, key and value of the whole sequence, [64, b, heads, 16], and the weights of the loss."""
    generator = torch.Generator().manual_seed(5)
    batch = 2 if case.packing == "plain" else 1
    shapes = [(64, batch, heads, 16) for heads in (case.heads, case.groups, case.groups, case.heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]


def whole_attention(case: Case) -> list[Tensor]:
    """Output and gradients of the whole attention on one process."""
    (query, key, value), weight = inputs(case)
    visible = allowed(case, query.size(0))
    first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*first, attn_mask=visible, enable_gqa=True).permute(2, 0, 1, 3)
    seen = visible.any(dim=1)
    out = torch.where(seen[:, None, None, None], out, 0.0)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (query, key, value))]


def attention_of_rank(
    rank: int, case: Case, dtype: torch.dtype = torch.float64
) -> tuple[DotProductAttention, list[Tensor], Tensor]:
    """The module on this rank, its part of query, key and value, and of the loss's weights."""
    hierarchy = None if case.hierarchy is None else list(case.hierarchy)
    parallel_state.initialize_model_parallel(
        context_parallel_size=case.cp, hierarchical_context_parallel_sizes=hierarchy
    )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.heads * 16,
        num_attention_heads=case.heads,
        num_query_groups=case.groups,
        context_parallel_size=case.cp,
        hierarchical_context_parallel_sizes=hierarchy,
        cp_comm_type=case.comm_type,
        attention_backend=case.backend,
    )
    mask_type = AttnMaskType.causal if case.causal else AttnMaskType.no_mask
    packed = packed_params(case)
    stretches = None if packed is None else packed.layout.stretches
    whole, weight = inputs(case)
    mine = [split_sequence(x.detach(), 0, case.cp, rank, stretches).to(dtype) for x in (*whole, weight)]
    attention = DotProductAttention(config, layer_number=1, attn_mask_type=mask_type)
    return attention, [x.requires_grad_() for x in mine[:3]], mine[3]


def split_attention(rank: int, world_size: int, case: Case) -> list[Tensor]:
    """The same by DotProductAttention on `cp` ranks; this rank's parts of output and gradients."""
    attention, mine, weight = attention_of_rank(rank, case)
    out = attention(*mine, packed_seq_params=packed_params(case)).view(*mine[0].shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), mine)]


CASES = [
    *(Case(cp, kind, packing) for cp in (2, 4) for kind in ("p2p", "all_gather", "a2a") for packing in PACKINGS),
    *(Case(4, "a2a+p2p", packing, hierarchy=(2, 2)) for packing in PACKINGS),
    Case(1, "p2p", "padded documents"),
    Case(1, "p2p", "documents in rows", backend="unfused"),
    Case(4, "a2a", heads=4, groups=1),  # one key/value head, four ranks
    Case(4, "a2a", heads=8, groups=8),
    Case(4, "a2a+p2p", hierarchy=(4, 1)),
    Case(4, "a2a+p2p", hierarchy=(1, 4)),
    *(Case(2, kind, packing, backend="unfused") for kind in ("p2p", "all_gather") for packing in PACKINGS),
    *(Case(2, kind, packing, causal=False) for kind in ("p2p", "all_gather", "a2a") for packing in PACKINGS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_split_attention_equals_whole(pool, case):
    """T15, T16, T19: output and gradients of query, key and value, equal to SDPA with the mask written out.

    Mutations: take a later rank's keys for an earlier one's; merge without rescaling; drop the key gradients that come
    home; cut chunks cp + r instead of 2 cp - 1 - r; padded lengths or real starts for the documents; no reordering
    behind the all-to-all; gathered gradients not summed.
    """
    packed = packed_params(case)
    stretches = None if packed is None else packed.layout.stretches
    found = pool.run(split_attention, case, world_size=case.cp)
    for name, parts, expected in zip(
        ("output", "query", "key", "value"), zip(*found, strict=True), whole_attention(case), strict=True
    ):
        actual = unsplit_sequence(parts, 0, stretches)
        assert torch.isfinite(actual).all(), name
        error = (actual - expected).abs().max().item()
        assert error <= BOUND, f"{name}: {error}"


def expected_bytes(case: Case, tokens: int, batch: int, head_size: int, width: int, wide: int) -> tuple[int, int]:
    """What docs/context_parallel.md says one rank sends in one layer's attention: (forward, backward).

    K, the keys and values of one rank, are 2 s/cp b g d numbers of w bytes; gradients travel in `wide` bytes.
    """
    local = tokens // case.cp * batch * head_size
    inner, outer = {"a2a": (case.cp, 1), "a2a+p2p": case.hierarchy}.get(case.comm_type, (1, case.cp))
    groups = max(case.groups, inner)  # repeated for the all-to-all
    exchanged = local * (2 * case.heads + 2 * groups) * width * (inner - 1) // inner
    keys = 2 * local * groups
    forward = exchanged + (outer - 1) * keys * width
    return forward, exchanged + (outer - 1) * keys * (width + wide)


def sent_in_attention(rank: int, world_size: int, case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes sent by this rank forward and backward."""
    attention, mine, _ = attention_of_rank(rank, case, dtype)
    with count_sent_bytes() as forward:
        out = attention(*mine)
    with count_sent_bytes() as backward:
        out.sum().backward()
    return forward.total(), backward.total()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, "p2p"),
        Case(4, "p2p"),
        Case(4, "all_gather"),
        Case(2, "a2a"),
        Case(4, "a2a"),
        Case(4, "a2a", groups=1),
        Case(4, "a2a+p2p", hierarchy=(2, 2)),
    ],
    ids=lambda case: case.name,
)
def test_bytes_sent_equal_the_formula(pool, case, dtype):
    """Counted at the collectives, on each rank.

    Mutations: send keys and values once more after the last step; gather in backward what forward could have kept.
    """
    width, wide = dtype.itemsize, max(dtype.itemsize, 4)
    expected = expected_bytes(case, tokens=64, batch=2, head_size=16, width=width, wide=wide)
    assert set(pool.run(sent_in_attention, case, dtype, world_size=case.cp)) == {expected}


def foreign_blocks_held(rank: int, world_size: int, case: Case) -> int:
    """Most received key/value blocks alive at once during the ring's forward and backward."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def watched(tensor: Tensor, group: object) -> Tensor:
        nonlocal most
        received = collectives.start_shift(tensor, group)  # type: ignore[arg-type]
        if tensor.dtype == torch.bfloat16:  # keys and values; their gradients travel in float32
            alive.add(received)
            patience = 100
            while len(alive) > 2 and patience:  # gloo's thread may let go of what it has sent a moment later
                time.sleep(0.01)
                patience -= 1
            most = max(most, len(alive))
        return received

    attention, mine, _ = attention_of_rank(rank, case, torch.bfloat16)
    with mock.patch("megatron_lite.context_parallel.ring.start_shift", watched):
        attention(*mine).sum().backward()
    return most


def test_ring_holds_two_foreign_blocks(pool):
    """The one in use and the one that arrives. Mutation: keep each received block in a list."""
    assert pool.run(foreign_blocks_held, Case(4, "p2p"), world_size=4) == [2] * 4


def orders_kept(rank: int, world_size: int) -> int:
    """How many tensors two all-to-all layers keep for backward to reorder their rows, after an evaluation."""
    attention, mine, _ = attention_of_rank(rank, Case(2, "a2a"), torch.float64)
    order_of_group.cache_clear()
    with torch.inference_mode():
        attention(*mine)
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int64:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [attention(*mine) for _ in range(2)]
    sum(outputs).sum().backward()
    return len(kept)


def test_layers_share_the_order_of_rows(pool):
    """Mutations: sort anew in _Reorder; order_of_group without its inference_mode(False), whose result an evaluation
    then makes unfit for training."""
    assert pool.run(orders_kept, world_size=2) == [1, 1]


def dropped(rank: int, world_size: int) -> list[list[bool]]:
    """Which of 64 elements the default and the model parallel stream drop on this rank."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    model_parallel_cuda_manual_seed(7)
    masks = [F.dropout(torch.ones(64), 0.5) == 0]
    with get_cuda_rng_tracker().fork():
        masks.append(F.dropout(torch.ones(64), 0.5) == 0)
    return [mask.tolist() for mask in masks]


def test_dropout_differs_between_context_parallel_ranks(pool):
    """T12: ranks hold other tokens, so they drop others; tensor parallel ranks share the default stream only.

    Mutation: seed by the rank in the data parallel group without context parallelism.
    """
    first, second, third, fourth = pool.run(dropped, world_size=4)  # tp varies fastest, then cp
    assert first[0] == second[0]
    assert third[0] == fourth[0]
    assert first[0] != third[0]
    assert len({tuple(masks[1]) for masks in (first, second, third, fourth)}) == 4


@functools.cache
def memory_per_token(pool, cp: int, kind: str) -> float:
    """Peak bytes a token of the whole sequence costs rank 0 in one layer, beside the kernels' fixed workspace.

    The less of two, as gloo's thread may let go of what it has sent a moment late.
    """
    low, high = (
        min(pool.run(measure_layer, kind, length, world_size=cp)[0].peak_bytes for _ in range(2))
        for length in (4096, 8192)
    )
    return (high - low) / 4096


@pytest.mark.full
@pytest.mark.parametrize(
    ("cp", "kind"), [(2, "p2p"), (2, "all_gather"), (4, "p2p"), (2, "a2a"), (4, "a2a"), (4, "a2a+p2p")]
)
def test_activation_memory_falls_with_the_ranks(pool, cp, kind):
    """1/cp of one rank's, measured at the allocator, in forward and backward.

    Mutations: compute the blocks eagerly, scores and all; keep float32 copies of what each step received.
    """
    assert memory_per_token(pool, cp, kind) <= 1.1 / cp * memory_per_token(pool, 1, "p2p")
