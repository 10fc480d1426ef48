"""Rank arithmetic against groups worked out by hand, and properties of all layouts."""

import math
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.errors import ConfigError
from megatron_lite.rank_generator import ParallelLayout, ParallelLayoutError, RankGenerator, hierarchical_ranks

ORDERS = ["-".join(names) for names in permutations(("tp", "cp", "ep", "dp", "pp"))]


def groups(text: str) -> list[list[int]]:
    """Groups from "0,1 2,3"; "0..3" is a range."""
    found = []
    for group in text.split():
        first, _, last = group.partition("..")
        found.append(list(range(int(first), int(last) + 1)) if last else [int(rank) for rank in group.split(",")])
    return found


def test_tensor_context_pipeline_on_16_ranks() -> None:
    layout = ParallelLayout.from_sizes(16, tp=2, cp=2, pp=2)
    expected = {
        "tp": "0,1 2,3 4,5 6,7 8,9 10,11 12,13 14,15",
        "cp": "0,2 1,3 4,6 5,7 8,10 9,11 12,14 13,15",
        "dp": "0,4 1,5 2,6 3,7 8,12 9,13 10,14 11,15",
        "dp_cp": "0,2,4,6 1,3,5,7 8,10,12,14 9,11,13,15",
        "pp": "0,8 1,9 2,10 3,11 4,12 5,13 6,14 7,15",
        "mp": "0,1,8,9 2,3,10,11 4,5,12,13 6,7,14,15",
        "tp_cp": "0..3 4..7 8..11 12..15",
        "tp_dp": "0,1,4,5 2,3,6,7 8,9,12,13 10,11,14,15",
        "tp_dp_cp": "0..7 8..15",
        "ep": " ".join(str(rank) for rank in range(16)),
        "expt_tp": "0,1 2,3 4,5 6,7 8,9 10,11 12,13 14,15",
        "tp_ep_pp": "0,1,8,9 2,3,10,11 4,5,12,13 6,7,14,15",
        "expt_dp": "0,2,4,6 1,3,5,7 8,10,12,14 9,11,13,15",
    }
    made = layout.groups()
    assert {name: made[name] for name in expected} == {name: groups(text) for name, text in expected.items()}


def test_experts_fold_onto_the_tensor_parallel_ranks() -> None:
    made = ParallelLayout.from_sizes(8, tp=2, pp=2, ep=2, etp=1).groups()
    expected = {
        "tp": "0,1 2,3 4,5 6,7",
        "dp": "0,2 1,3 4,6 5,7",
        "pp": "0,4 1,5 2,6 3,7",
        "mp": "0,1,4,5 2,3,6,7",
        "tp_dp_cp": "0..3 4..7",
        "ep": "0,1 2,3 4,5 6,7",
        "expt_tp": "0 1 2 3 4 5 6 7",
        "tp_ep": "0,1 2,3 4,5 6,7",
        "tp_ep_pp": "0,1,4,5 2,3,6,7",
        "expt_dp": "0,2 1,3 4,6 5,7",
    }
    assert {name: made[name] for name in expected} == {name: groups(text) for name, text in expected.items()}


def test_more_expert_than_data_parallel_ranks() -> None:
    made = ParallelLayout.from_sizes(16, tp=2, cp=2, ep=8, etp=1).groups()
    assert made["ep"] == groups("0..7 8..15")
    assert made["expt_dp"] == groups("0,8 1,9 2,10 3,11 4,12 5,13 6,14 7,15")
    assert made["dp"] == groups("0,4,8,12 1,5,9,13 2,6,10,14 3,7,11,15")
    assert made["cp"][:2] == groups("0,2 1,3")


def test_experts_over_context_parallel_ranks() -> None:
    made = ParallelLayout.from_sizes(8, cp=2, pp=2, ep=4).groups()
    expected = {
        "cp": "0,1 2,3 4,5 6,7",
        "dp": "0,2 1,3 4,6 5,7",
        "pp": "0,4 1,5 2,6 3,7",
        "ep": "0..3 4..7",
        "tp_ep_pp": "0..7",
        "expt_dp": "0 1 2 3 4 5 6 7",
    }
    assert {name: made[name] for name in expected} == {name: groups(text) for name, text in expected.items()}


def test_order_with_pipeline_before_data() -> None:
    made = ParallelLayout.from_sizes(8, tp=2, pp=2, ep=2, etp=1, order="tp-cp-ep-pp-dp").groups()
    expected = {
        "pp": "0,2 1,3 4,6 5,7",
        "dp": "0,4 1,5 2,6 3,7",
        "mp": "0..3 4..7",
        "expt_dp": "0,4 1,5 2,6 3,7",
    }
    assert {name: made[name] for name in expected} == {name: groups(text) for name, text in expected.items()}


def test_optimizer_instances_split_the_data_parallel_group() -> None:
    layout = ParallelLayout.from_sizes(8, tp=1, cp=2, num_distributed_optimizer_instances=2)
    made = layout.groups()
    assert made["intra_dp_cp"] == groups("0..3 4..7")
    assert made["inter_dp_cp"] == groups("0,4 1,5 2,6 3,7")
    assert made["intra_dist_opt"] == groups("0..3 4..7")
    assert layout.dense_mesh().shape == (1, 2, 4, 1)
    assert layout.expert_mesh().shape == (1, 2, 4, 1, 1)


def test_rank_generator_takes_megatrons_arguments() -> None:
    generator = RankGenerator(2, 1, 2, 2, 1, "tp-dp-pp", rank_offset=8)
    assert generator.world_size == 8
    assert generator.get_ranks("dp") == groups("8,10 9,11 12,14 13,15")
    assert generator.get_ranks("pp-tp") == generator.get_ranks("tp-pp")
    assert generator.get_ranks("tp-cp-ep-dp-pp") == groups("8..15")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp": 1, "ep": 2, "dp": 1, "pp": 1, "cp": 2, "order": "tp-cp-ep-dp-pp"}, "ep is 2 and cp is 2"),
        ({"tp": 2, "ep": 1, "dp": 1, "pp": 1, "cp": 2, "order": "tp-dp"}, "size of cp is 2"),
        ({"tp": 2, "ep": 1, "dp": 1, "pp": 1, "cp": 1, "order": "tp-dpp"}, "'dpp'.*not a parallel axis"),
        ({"tp": 2, "ep": 1, "dp": 1, "pp": 1, "cp": 1, "order": "tp-tp-dp"}, "twice"),
    ],
)
def test_rank_generator_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RankGenerator(**arguments)


def test_sizes_that_do_not_fit_are_all_reported_with_numbers_and_remedies() -> None:
    with pytest.raises(ConfigError) as refused:
        ParallelLayout.from_sizes(12, tp=4, pp=2, ep=5, etp=1)
    text = str(refused.value)
    assert "world_size (12) is not divisible by 8 = tensor (4) x pipeline (2) x context (1)" in text
    assert "start 8 or 16 processes" in text
    assert "world_size (12) is not divisible by 10 = expert tensor (1) x expert (5) x pipeline (2)" in text
    assert isinstance(refused.value, RuntimeError)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tensor parallel size is 0"),
        ({"virtual_pp": 2}, "greater than 1 with interleaved schedule"),
        ({"num_distributed_optimizer_instances": 3}, r"must divide the data x context parallel size \(8\); use (2|4)"),
        ({"tp": 2, "pp": 2, "etp": 1, "order": "tp-cp-ep-pp-dp"}, "put pp last"),
    ],
)
def test_layout_refuses(sizes: dict, message: str) -> None:
    with pytest.raises(ParallelLayoutError, match=message):
        ParallelLayout.from_sizes(8, **sizes)


def test_hierarchy_of_a_context_parallel_group() -> None:
    inner, outer = hierarchical_ranks([0, 2, 4, 6, 8, 10, 12, 14], [2, 4])
    assert inner == groups("0,2 4,6 8,10 12,14")
    assert outer == groups("0,4,8,12 2,6,10,14")
    with pytest.raises(ParallelLayoutError, match="must multiply to"):
        hierarchical_ranks([0, 1, 2], [2, 2])


sizes = st.integers(min_value=1, max_value=3)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tp, cp, pp, etp, ep = (draw(sizes) for _ in range(5))
    world = math.lcm(tp * cp * pp, etp * ep * pp) * draw(sizes)
    order = draw(st.sampled_from([order for order in ORDERS if order.endswith("pp")]))
    return ParallelLayout.from_sizes(world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, order=order)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_the_groups_of_every_kind_partition_the_world(layout: ParallelLayout) -> None:
    world = list(range(layout.dense.world_size))
    for name, rank_lists in layout.groups().items():
        assert sorted(rank for ranks in rank_lists for rank in ranks) == world, name
        assert len({len(ranks) for ranks in rank_lists}) == 1, name
        assert all(ranks == sorted(ranks) for ranks in rank_lists), name


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_two_groups_of_different_axes_meet_in_one_rank(layout: ParallelLayout) -> None:
    made = layout.groups()
    pairs = [
        ("tp", "cp"),
        ("tp", "dp"),
        ("tp", "pp"),
        ("cp", "dp"),
        ("dp_cp", "mp"),
        ("ep", "expt_dp"),
        ("ep", "expt_tp"),
    ]
    for one, other in pairs:
        assert all(len(set(a) & set(b)) <= 1 for a in made[one] for b in made[other]), (one, other)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, sizes, st.sampled_from(ORDERS))
def test_a_rank_is_the_sum_of_its_coordinates_times_strides(tp: int, cp: int, dp: int, pp: int, order: str) -> None:
    generator = RankGenerator(tp, 1, dp, pp, cp, order)
    stride = 1
    for name in order.split("-"):
        size = generator.name_to_size[name]
        assert generator.get_ranks(name)[0] == list(range(0, stride * size, stride))
        stride *= size


def test_experts_are_not_split_where_dense_parameters_are_not():
    """As many instances as data parallel ranks (no_shard) fit every number of expert data parallel ranks."""
    for ep, replicas in ((1, 4), (2, 2), (4, 1)):
        layout = ParallelLayout.from_sizes(4, ep=ep, num_distributed_optimizer_instances=4)
        assert layout.dense_mesh().shape == (1, 4, 1, 1)
        assert layout.expert_mesh().shape == (1, replicas, 1, ep, 1)
