"""Padding and packed sequences, with Megatron's names and formulas.

Mutations are of megatron_lite/context_parallel/packed_seq_params.py; each was tried and made the test that names it
fail.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.context_parallel import PackedSeqParams, SequenceLayout, get_packed_seq_params, get_padding
from megatron_lite.context_parallel.blocks import as_blocks, attention_blocks
from megatron_lite.errors import ConfigError


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def listed(tensor: Tensor | None) -> list[int]:
    assert tensor is not None
    assert tensor.dtype == torch.int32
    return tensor.tolist()


PADDINGS = [
    # seq_len, cp, tp, SP, further arguments, expected
    ("nothing splits", 1001, 1, 1, False, {}, 0),
    ("TP alone asks for nothing", 1001, 1, 8, False, {}, 0),
    ("SP: multiple of tp", 1001, 1, 8, True, {}, 7),
    ("CP: multiple of 2 cp", 1001, 4, 1, False, {}, 7),
    ("CP and TP without SP: multiple of 2 cp", 1001, 4, 8, False, {}, 7),
    ("CP and SP: multiple of 2 cp tp", 1001, 4, 8, True, {}, 23),
    ("an odd cp", 1001, 3, 2, True, {}, 7),
    ("it fits already", 8192, 4, 8, True, {}, 0),
    ("an empty sequence", 0, 4, 8, True, {}, 0),
    ("fp8", 1001, 1, 1, False, {"fp8_enabled": True}, 7),
    ("fp8 in blocks of 32", 1001, 1, 1, False, {"fp8_enabled": True, "fp8_recipe": "mxfp8"}, 23),
    ("another fp8 recipe", 1001, 1, 1, False, {"fp8_enabled": True, "fp8_recipe": "tensorwise"}, 7),
    ("a recipe without fp8", 1001, 1, 1, False, {"fp8_recipe": "mxfp8"}, 0),
    ("CP goes before fp8", 1002, 3, 1, False, {"fp8_enabled": True}, 0),
    ("SP goes before fp8", 1002, 1, 2, True, {"fp8_enabled": True}, 0),
    ("overlap: to decoder_seq_len", 1001, 4, 8, True, {"decoder_tp_comm_overlap": True, "decoder_seq_len": 2000}, 999),
    ("overlap that fits", 1001, 1, 8, True, {"decoder_tp_comm_overlap": True, "decoder_seq_len": 1001}, 0),
    ("overlap without SP", 1001, 4, 8, False, {"decoder_tp_comm_overlap": True}, 7),
]


@pytest.mark.parametrize("case", PADDINGS, ids=lambda case: case[0])
def test_padding(case: tuple) -> None:
    """Mutations: tp without SP, cp instead of 2 cp, fp8 before CP or SP, 16 for mxfp8, overlap without SP."""
    _, seq_len, cp_size, tp_size, has_sp, further, expected = case
    assert get_padding(seq_len, cp_size, tp_size, has_sp, **further) == expected


@given(seq_len=st.integers(0, 200), cp=st.integers(1, 4), tp=st.integers(1, 4), has_sp=st.booleans())
def test_padding_is_the_least_that_fits(seq_len: int, cp: int, tp: int, has_sp: bool) -> None:
    """Mutation: a whole factor more where the length fits already (factor - seq_len % factor)."""
    factor = (2 * cp if cp > 1 else 1) * (tp if has_sp else 1)
    fitting = next(length for length in range(seq_len, seq_len + factor) if length % factor == 0)
    assert get_padding(seq_len, cp, tp, has_sp) == fitting - seq_len


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 1, False), "seq_len is -1, cp_size 1 and tp_size 1"),
        ((8, 0, 1, False), "cp_size 0"),
        ((8, 1, 0, True), "tp_size 0"),
        ((8, 1, 2, True, True), "decoder_seq_len is None"),
        ((8, 1, 2, True, True, 7), "decoder_seq_len is 7"),
    ],
)
def test_padding_of_impossible_sizes(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_padding(*arguments)


def test_packed_seq_params_of_a_batch() -> None:
    """Two sequences of 12 tokens, 3 of them padding: real lengths in one, padded lengths in the other.

    Megatron gives the padded form only where there is padding. Mutations: real lengths with the padding counted; padded
    ones without it; the image's tokens left out.
    """
    packed = get_packed_seq_params(torch.zeros(2, 12), img_seq_len=0, padding_needed=3, cp_size=2)
    assert packed.qkv_format == "thd"
    assert listed(packed.cu_seqlens_q) == listed(packed.cu_seqlens_kv) == [0, 9, 18]
    assert listed(packed.cu_seqlens_q_padded) == listed(packed.cu_seqlens_kv_padded) == [0, 12, 24]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 9
    assert packed.layout == SequenceLayout((0, 12, 24), ((0, 9), (12, 21)))
    with_image = get_packed_seq_params(torch.zeros(3, 12), img_seq_len=4, padding_needed=3, cp_size=2)
    assert listed(with_image.cu_seqlens_q) == [0, 13, 26, 39]
    assert listed(with_image.cu_seqlens_q_padded) == [0, 16, 32, 48]


@pytest.mark.parametrize(
    ("cp_size", "use_packed_sequence", "expected"),
    [(1, False, "sbhd"), (1, True, "thd"), (2, False, "thd"), (2, True, "thd")],
)
def test_format(cp_size: int, use_packed_sequence: bool, expected: str) -> None:
    """Mutations: `and` for `or`; use_packed_sequence ignored; thd always."""
    packed = get_packed_seq_params(torch.zeros(1, 8), 0, 0, cp_size, use_packed_sequence)
    assert packed.qkv_format == expected
    assert packed.is_packed is (expected == "thd")


def test_a_sequence_of_padding_only() -> None:
    packed = get_packed_seq_params(torch.zeros(2, 8), 0, 8, 2)
    assert packed.layout.documents == ((0, 0), (8, 8))
    assert len(packed.plan(2, 0, True)) == 0


@pytest.mark.parametrize("padding_needed", [-1, 9])
def test_more_padding_than_tokens(padding_needed: int) -> None:
    with pytest.raises(ConfigError, match=f"padding_needed is {padding_needed}, but .* 8 tokens"):
        get_packed_seq_params(torch.zeros(2, 8), 0, padding_needed, 2)


def test_layout_of_padded_documents() -> None:
    """Documents begin at their padded offsets and have their real lengths; each is a stretch of its own.

    Mutations: documents at their real offsets; documents as long as their room; stretches at the real offsets.
    """
    packed = PackedSeqParams(cu_seqlens_q=lengths(0, 3, 3, 9), cu_seqlens_q_padded=lengths(0, 4, 8, 16))
    assert packed.layout == SequenceLayout((0, 4, 8, 16), ((0, 3), (4, 4), (8, 14)))


def test_layout_of_documents_without_padding() -> None:
    """An empty document makes no stretch of its own. Mutation: boundaries kept twice."""
    assert PackedSeqParams(cu_seqlens_q=lengths(0, 4, 4, 12)).layout == SequenceLayout(
        (0, 4, 12), ((0, 4), (4, 4), (4, 12))
    )


def test_layout_of_documents_in_whole_rows() -> None:
    """With cu_seqlens_split the documents may have any length. Mutation: cu_seqlens_split ignored."""
    packed = PackedSeqParams(cu_seqlens_q=lengths(0, 1, 8, 13), cu_seqlens_split=lengths(0, 8, 16))
    assert packed.layout == SequenceLayout((0, 8, 16), ((0, 1), (1, 8), (8, 13)))


def test_a_plan_is_worked_out_once_for_each_place() -> None:
    """Mutations: the place left out of the key, so that all ranks, or both kinds of mask, get the first one's plan."""
    packed = PackedSeqParams(cu_seqlens_q=lengths(0, 4, 12))
    for place in [(2, 0, True), (2, 1, True), (2, 0, False), (1, 0, True)]:
        assert as_blocks(packed.plan(*place)) == attention_blocks(packed.layout, *place)
        assert packed.plan(*place) is packed.plan(*place)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qkv_format": "bshd", "cu_seqlens_q": lengths(0, 4)}, "qkv_format is 'bshd'"),
        ({}, "cu_seqlens_q, which says where the documents are, is None"),
    ],
    ids=["unknown format", "no documents"],
)
def test_parameters_refused_at_once(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackedSeqParams(**fields)


def test_plain_batches_need_no_lengths() -> None:
    assert not PackedSeqParams(qkv_format="sbhd").is_packed


REFUSED = {
    "other keys": ({"cu_seqlens_kv": lengths(0, 8)}, "cu_seqlens_kv differs"),
    "other padded keys": (
        {"cu_seqlens_q_padded": lengths(0, 4, 8), "cu_seqlens_kv_padded": lengths(0, 5, 8)},
        "cu_seqlens_kv_padded differs",
    ),
    "padded keys alone": ({"cu_seqlens_kv_padded": lengths(0, 4, 8)}, "cu_seqlens_kv_padded differs"),
    "not from 0": ({"cu_seqlens_q": lengths(1, 4, 8), "cu_seqlens_q_padded": lengths(0, 4, 8)}, "must begin with 0"),
    "padded not from 0": ({"cu_seqlens_q_padded": lengths(1, 5, 9)}, "must begin with 0"),
    "falling": ({"cu_seqlens_q": lengths(0, 8, 4)}, "never fall"),
    "falling padded": ({"cu_seqlens_q": lengths(0, 4, 4), "cu_seqlens_q_padded": lengths(0, 8, 4)}, "Document 1"),
    "another number of documents": ({"cu_seqlens_q_padded": lengths(0, 8)}, "one entry more"),
    "nothing": ({"cu_seqlens_q": lengths()}, "must begin with 0"),
    "split not from 0": ({"cu_seqlens_split": lengths(4, 8)}, r"cu_seqlens_split is \[4, 8\]"),
    "falling split": ({"cu_seqlens_split": lengths(0, 8, 4)}, r"cu_seqlens_split is \[0, 8, 4\]"),
    "split of fewer tokens": ({"cu_seqlens_split": lengths(0)}, "hold all 8 tokens"),
    "a document longer than its room": (
        {"cu_seqlens_q_padded": lengths(0, 3, 8)},
        "Document 0 has 4 tokens in cu_seqlens_q, but only 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lengths_that_do_not_fit_each_other(name: str) -> None:
    """The lengths are read, and judged, when the layout is first asked for. Mutation: each check left out."""
    fields, message = REFUSED[name]
    given_fields: dict[str, Any] = {"cu_seqlens_q": lengths(0, 4, 8), **fields}
    packed = PackedSeqParams(**given_fields)
    with pytest.raises(ConfigError, match=message):
        _ = packed.layout


def test_a_document_across_two_rows() -> None:
    """cu_seqlens_split says where the rows end; no document may go on in the next."""
    packed = PackedSeqParams(cu_seqlens_q=lengths(0, 10, 16), cu_seqlens_split=lengths(0, 8, 16))
    with pytest.raises(ConfigError, match="tokens 0 to 10 is not inside one stretch"):
        packed.plan(2, 0, True)
