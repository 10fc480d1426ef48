"""Which stage holds what: always a partition of the model."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.errors import ConfigError
from megatron_lite.pipeline_layout import PipelineLayout, Stage, even_layout, parse_layout


def sizes(layout: PipelineLayout) -> list[int]:
    return [len(stage.layers) for stage in layout.stages]


@given(st.integers(1, 6), st.integers(1, 3), st.integers(2, 4), st.booleans(), st.booleans())
def test_every_layer_is_held_once(ranks, chunks, each, embedding, loss):
    """ML#468: 80 layers silently became 64. Mutation: leave the remainder of a division out."""
    num_layers = ranks * chunks * each - embedding - loss
    layout = even_layout(num_layers, ranks, chunks, account_for_embedding=embedding, account_for_loss=loss)
    assert list(itertools.chain.from_iterable(stage.layers for stage in layout.stages)) == list(range(num_layers))
    held = [stage for rank in range(ranks) for stage in layout.stages_of(rank)]
    assert sorted(held) == list(range(ranks * chunks))
    assert all(layout.rank_of(stage) == rank for rank in range(ranks) for stage in layout.stages_of(rank))


def test_even_stages_go_round_the_ranks():
    layout = even_layout(8, 2, 2)
    assert [stage.layers for stage in layout.stages] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.stages_of(0) == [0, 2]
    assert layout.stages_of(1) == [1, 3]
    assert [(stage.embedding, stage.loss) for stage in layout.stages] == [
        (True, False),
        *[(False, False)] * 2,
        (False, True),
    ]


def test_a_v_goes_down_the_ranks_and_up():
    """Mutation: place a V round and round; the loss would be looked for on the last rank."""
    layout = even_layout(8, 4, 2, v_shaped=True)
    assert [layout.stages_of(rank) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert layout.rank_of(7) == 0


def test_embedding_and_loss_count_as_layers():
    """Megatron's rule: 14 layers and two more make four fours."""
    layout = even_layout(14, 4, account_for_embedding=True, account_for_loss=True)
    assert sizes(layout) == [3, 4, 4, 3]
    assert sizes(even_layout(15, 4, account_for_loss=True)) == [4, 4, 4, 3]


def test_first_and_last_rank_may_differ():
    """With chunks each round has the ranks' shares, as in Megatron."""
    assert sizes(even_layout(10, 4, first=1, last=3)) == [1, 3, 3, 3]
    assert sizes(even_layout(9, 4, last=3)) == [2, 2, 2, 3]
    assert sizes(even_layout(20, 3, 2, first=4, last=6)) == [2, 5, 3, 2, 5, 3]
    assert sizes(even_layout(5, 2, first=2, last=3)) == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((80, 64), {}, "80 must be a multiple of the 64 pipeline stages: write --num-layers 64 or 128"),
        ((15, 4), {"account_for_embedding": True, "account_for_loss": True}, "write --num-layers 14 or 18"),
        ((10, 4), {"first": 2}, "the 8 others must be shared alike by 3 ranks"),
        ((10, 2), {"first": 2, "last": 2}, "the 6 others must be shared alike by 0 ranks"),
        ((10, 4), {"first": 9, "last": 9}, "the -8 others"),
        ((9, 3, 2), {"first": 3}, "holds 3 layers, but they must be shared alike by its 2 model chunks"),
        ((8, 2, 2), {"first": 2, "v_shaped": True}, "the first rank holds both ends"),
        ((8, 2), {"first": 2, "account_for_loss": True}, "keep one of the two"),
    ],
)
def test_what_does_not_divide_is_told_with_numbers(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        even_layout(*arguments, **options)


@pytest.mark.parametrize(
    ("stages", "ranks", "v_shaped", "message"),
    [
        ((Stage((0,), True), Stage((2,), loss=True)), 2, False, r"layers \[0, 2\], but each must be held once"),
        ((Stage((0, 1), True), Stage((1,), loss=True)), 2, False, "held once"),
        ((Stage((1,), True), Stage((0,), loss=True)), 2, False, "in order"),
        ((Stage((0,)), Stage((1,), loss=True)), 2, False, "the first pipeline stage, and no other"),
        ((Stage((0,), True), Stage((1,))), 2, False, "the last one the loss"),
        ((Stage((0,), True), Stage(()), Stage((1,), loss=True)), 3, False, r"the pipeline stages \[1\] hold nothing"),
        ((Stage((0,), True), Stage((1,)), Stage((2,), loss=True)), 2, False, "3 pipeline stages for 2 ranks"),
        ((Stage((0,), True), Stage((1,), loss=True)), 2, True, "in a V-shaped schedule two"),
    ],
)
def test_what_is_no_partition_is_refused(stages, ranks, v_shaped, message):
    with pytest.raises(ConfigError, match=message):
        PipelineLayout(stages, ranks, v_shaped)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Et|tL", [1, 1]),
        ("E|(t|)*3t|t*2L", [0, 1, 1, 1, 1, 2]),
        ("Ett|tt|t|L", [2, 2, 1, 0]),
        ("E t*3 | (tt|)*2, tL", [3, 2, 2, 1]),
        ("E|((t|)*2tt|)*2L", [0, 1, 1, 2, 1, 1, 2, 0]),
    ],
)
def test_layout_strings(text, expected):
    """Megatron's notation; Megatron-LM writes "E|(t|)*3,m|m||L". Mutation: expand the outer repetition first."""
    layout = parse_layout(text, sum(expected), len(expected))
    assert sizes(layout) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et|tLx", "whose stage 1 is 'tLx'"),
        ("tE|tL", "stage 0 is 'tE'"),
        ("Et|m|tL", r"multi-token prediction \(m\) stand before L in its stage: write for example 'Et\|\(t\|\)\*2tmL'"),
        ("Et|tmL", "has 1 layers of multi-token prediction"),
        ("Et|t|tL", "which has 3 layers"),
        ("Et|t", "the last one the loss"),
        ("E|(t|L", "whose stage 1"),
        ("Et*2|*3L", "whose stage 1"),
        ("E|(t*999|)*999|tL", "too long when written out"),
        ("((((t*999)*999)*999)*999)*999", "too long when written out"),
        ("Ett||L", "hold nothing"),
    ],
)
def test_layout_strings_that_make_no_sense(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_layout(text, 2, 2)


@given(st.text("Et|L()*,m 0123456789", max_size=40))
def test_any_layout_string_is_read_or_refused(text):
    """No crash other than a clean error, and no endless expansion."""
    try:
        layout = parse_layout(text, 2, 2)
    except ConfigError:
        return
    assert layout.num_layers == 2


def test_description():
    assert parse_layout("E|t|tt|L", 3, 2).describe() == [
        "pipeline rank 0: stage 0 (embedding); stage 2 (layers 2 to 3)",
        "pipeline rank 1: stage 1 (layer 1); stage 3 (loss)",
    ]


@pytest.mark.parametrize("text", ["Et|tmmL", "Et|tL"])
def test_multi_token_prediction_stands_in_the_last_stage(text):
    """Said or not. Mutation: layers of multi-token prediction in every stage."""
    layouts = [parse_layout(text, 2, 2, mtp_num_layers=2), even_layout(2, 2, mtp_num_layers=2)]
    assert layouts[0] == layouts[1]
    assert [stage.mtp_layers for stage in layouts[0].stages] == [0, 2]
    assert layouts[0].stages[1].describe() == "layer 2, multi-token prediction, loss"
    assert parse_layout("Et|t|mL", 2, 3, mtp_num_layers=1).stages[2].describe() == "multi-token prediction, loss"
