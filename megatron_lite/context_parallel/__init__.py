"""Context parallelism: each sequence split over ranks, attention by ring, gather or all-to-all."""

from typing import TYPE_CHECKING

from megatron_lite.lazy import names_from

if TYPE_CHECKING:
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

_HOMES = {
    "PackedSeqParams": "packed_seq_params",
    "SequenceLayout": "sharding",
    "get_batch_on_this_cp_rank": "sharding",
    "get_packed_seq_params": "packed_seq_params",
    "get_padding": "packed_seq_params",
    "split_sequence": "sharding",
    "unsplit_sequence": "sharding",
    "zigzag_positions": "sharding",
}
__getattr__ = names_from(__name__, _HOMES)
