"""Context parallelism: each sequence split over ranks, attention by ring, gather or all-to-all."""

from megatron_lite.context_parallel.packed_seq_params import PackedSeqParams, get_packed_seq_params, get_padding
from megatron_lite.context_parallel.sharding import (
    SequenceLayout,
    get_batch_on_this_cp_rank,
    split_sequence,
    unsplit_sequence,
    zigzag_positions,
)

__all__ = [
    "PackedSeqParams",
    "SequenceLayout",
    "get_batch_on_this_cp_rank",
    "get_packed_seq_params",
    "get_padding",
    "split_sequence",
    "unsplit_sequence",
    "zigzag_positions",
]
