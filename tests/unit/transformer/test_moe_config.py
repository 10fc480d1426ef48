"""The knobs of a mixture of experts: which layers have experts, what follows from what, and every rule."""

import shlex
from typing import Any

import pytest

from megatron_lite.arguments import build_run_config, parse_args, read_settings
from megatron_lite.arguments.validation import all_violations
from megatron_lite.errors import ConfigError
from megatron_lite.transformer.moe.moe_config import is_moe_layer
from megatron_lite.transformer.transformer_config import TransformerConfig

LINE = shlex.split(
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32 "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
)


def config_of(**changes: Any) -> TransformerConfig:
    """A small model with 8 experts."""
    settings = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_moe_experts": 8}
    return TransformerConfig(**(settings | changes))


def layers_with_experts(*words: str) -> list[int]:
    """0 or 1 for each layer of a command line."""
    run = parse_args([*LINE, "--num-experts", "8", *words])
    return [int(is_moe_layer(run.transformer, number)) for number in range(1, 5)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1", [1, 1, 1, 1]),
        ("2", [1, 0, 1, 0]),
        ("3", [1, 0, 0, 1]),
        ("[0,1,1,1]", [0, 1, 1, 1]),
        ("([0]*1+[1]*3)", [0, 1, 1, 1]),
        ("[0, 1] * (1 + 1)", [0, 1, 0, 1]),
    ],
)
def test_which_layers_have_experts(text: str, wanted: list[int]) -> None:
    """Mutation: counting layers from 1 in the rule of every N-th gives [0, 1, 0, 1] for 2."""
    assert layers_with_experts("--moe-layer-freq", text) == wanted


@pytest.mark.parametrize("text", ["__import__('os')", "[1]*10**9", "[x]", "1.5", "[1.5]", "[0]-[1]", "2*2"])
def test_an_expression_computes_lists_only(text: str) -> None:
    with pytest.raises(ConfigError, match="moe_layer_freq"):
        layers_with_experts("--moe-layer-freq", text)


def test_no_layer_of_a_dense_model_has_experts() -> None:
    assert not is_moe_layer(config_of(num_moe_experts=None), 1)
    assert config_of(num_moe_experts=None).num_moe_layers == 0
    assert config_of(moe_layer_freq=[0, 1, 1, 0]).num_moe_layers == 2


def test_what_follows_from_what() -> None:
    config = config_of(ffn_hidden_size=96, tensor_model_parallel_size=2)
    assert (config.moe_ffn_hidden_size, config.expert_tensor_parallel_size) == (96, 2)
    assert config_of(num_moe_experts=None).moe_ffn_hidden_size is None
    assert config_of(moe_enable_deepep=True).moe_token_dispatcher_type == "flex"
    # An error may have told the user to write alltoall. Mutation: turn whatever was given into flex.
    given = config_of(moe_enable_deepep=True, moe_token_dispatcher_type="alltoall")
    assert given.moe_token_dispatcher_type == "alltoall"


def test_several_balance_losses_each_with_its_coefficient() -> None:
    words = "--num-experts 8 --moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1e-2 1e-3"
    config = parse_args([*LINE, *words.split()]).transformer
    assert config.balance_types == ["aux_loss", "seq_aux_loss"]
    assert config.balance_coefficients == {"aux_loss": 1e-2, "seq_aux_loss": 1e-3}
    one = parse_args([*LINE, *shlex.split("--num-experts 8 --moe-aux-loss-coeff 1e-2")]).transformer
    assert one.moe_aux_loss_coeff == 1e-2
    assert one.balance_coefficients == {"aux_loss": 1e-2}
    assert config_of().balance_coefficients == {}
    assert config_of(moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.1).balance_coefficients == {}


def test_sizes_of_deep_ep_are_those_of_several_ranks() -> None:
    """Mutations: a single rank judged, which sends nothing; the largest token of a node beyond it; no limit beyond."""
    odd = {"hidden_size": 72, "num_moe_experts": 33, "moe_router_topk": 33}
    assert config_of(**FLEX, **odd).violations() == []
    for ranks in (16, 24, 96, 160):
        sizes = {"num_moe_experts": 480, "expert_model_parallel_size": ranks}
        assert config_of(**DEEP_EP | sizes, hidden_size=8160).violations() == []
        (problem,) = config_of(**DEEP_EP | sizes, hidden_size=8192).violations()
        assert "up to 16384 bytes, and one would take 16424" in problem


def test_recomputation_of_experts() -> None:
    by_old_name = parse_args([*LINE, "--num-experts", "8", "--moe-layer-recompute"]).transformer
    assert by_old_name.recompute_granularity == "selective"
    assert by_old_name.recompute_modules == ["moe"]
    both = config_of(recompute_granularity="selective", recompute_modules=["core_attn"], moe_layer_recompute=True)
    assert both.recompute_modules == ["core_attn", "moe"]
    words = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "moe_act"]
    assert parse_args([*LINE, "--num-experts", "8", *words]).transformer.recompute_modules == ["core_attn", "moe_act"]


SIGMOID = {"moe_router_score_function": "sigmoid"}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn"}
FLEX = {"moe_token_dispatcher_type": "flex"}
DEEP_EP = FLEX | {"bf16": True, "expert_model_parallel_size": 2}
PADDED = {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0}
PARTS = {"moe_use_upcycling": True, "moe_upcycling_granularity": 4}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
# changed settings, and what the one sentence must hold: the value, the rule, the remedy
BROKEN: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_moe_experts": 0}, ["num_moe_experts is 0", "at least 1"]),
    ({"num_moe_experts": None, "expert_model_parallel_size": 2}, ["expert_model_parallel_size is 2", "--num-experts"]),
    ({"expert_model_parallel_size": 3}, ["num_moe_experts is 8", "(3)", "6 or 9", "1, 2, 4, 8"]),
    ({"moe_ffn_hidden_size": 66, "expert_tensor_parallel_size": 4}, ["moe_ffn_hidden_size is 66", "(4)", "64 or 68"]),
    ({"moe_ffn_hidden_size": 0}, ["moe_ffn_hidden_size is 0", "positive"]),
    ({"moe_router_topk": 9}, ["moe_router_topk is 9", "num_moe_experts (8)", "--moe-router-topk 8"]),
    ({"moe_router_topk": 0}, ["moe_router_topk is 0", "--moe-router-topk 1"]),
    ({"moe_router_topk": 1}, ["moe_router_topk is 1", "--moe-router-pre-softmax"]),
    ({"moe_router_num_groups": 4}, ["moe_router_num_groups is set", "--moe-router-group-topk N"]),
    ({"moe_router_group_topk": 4}, ["moe_router_group_topk is set", "--moe-router-num-groups N"]),
    (GROUPS | {"moe_router_num_groups": 3}, ["moe_router_num_groups is 3", "(8)", "1, 2, 4, 8"]),
    (GROUPS | {"moe_router_group_topk": 5}, ["moe_router_group_topk is 5", "4 groups"]),
    (GROUPS | {"moe_router_topk": 3}, ["moe_router_topk is 3", "moe_router_group_topk (2)", "--moe-router-topk 2"]),
    (GROUPS | {"moe_router_topk": 6}, ["moe_router_topk is 6", "2 experts", "--moe-router-topk 2"]),
    (
        {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": 0.1},
        ["moe_aux_loss_coeff has 1 values", "has 2", "one coefficient for each"],
    ),
    ({"moe_aux_loss_coeff": [0.1, 0.2]}, ["moe_aux_loss_coeff has 2 values", "has 1"]),
    ({"moe_aux_loss_coeff": -0.1}, ["moe_aux_loss_coeff is -0.1", "0 or more"]),
    ({"moe_z_loss_coeff": -0.1}, ["moe_z_loss_coeff is -0.1", "0 or more"]),
    ({"moe_router_load_balancing_type": "auxloss"}, ["moe_router_load_balancing_type is 'auxloss'", "seq_aux_loss"]),
    (
        {"moe_router_load_balancing_type": ["aux_loss", "aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]},
        ["counts once", "leave out"],
    ),
    (
        {"moe_router_load_balancing_type": ["none", "aux_loss"], "moe_aux_loss_coeff": [0.0, 0.1]},
        ["none cannot be combined", "keep it alone"],
    ),
    ({"moe_router_enable_expert_bias": True}, ["moe_router_enable_expert_bias", "softmax", "sigmoid or sqrtsoftplus"]),
    ({"moe_pad_expert_input_to_capacity": True}, ["moe_pad_expert_input_to_capacity", "--moe-expert-capacity-factor"]),
    ({"moe_expert_capacity_factor": 0.0}, ["moe_expert_capacity_factor is 0.0", "positive"]),
    (
        PADDED | {"moe_enable_deepep": True},
        ["flex", "--moe-token-dispatcher-type alltoall and leave out --moe-enable-deepep,"],
    ),
    (PADDED | FLEX, ["flex", "write --moe-token-dispatcher-type alltoall, or leave it out"]),
    (
        {"moe_enable_deepep": True, "moe_token_dispatcher_type": "alltoall"},
        ["moe_enable_deepep is set", "type alltoall", "type flex, or leave out --moe-enable-deepep"],
    ),
    (
        FLEX | {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2},
        ["flex over 8 ranks", "float32", "bfloat16 only", "--bf16", "--moe-token-dispatcher-type alltoall"],
    ),
    (FLEX | {"expert_tensor_parallel_size": 2, "fp16": True}, ["flex over 2 ranks", "float16", "--bf16"]),
    (
        DEEP_EP | {"num_moe_experts": 12, "expert_model_parallel_size": 3, "expert_tensor_parallel_size": 2},
        ["flex over 6 ranks", "3", "2, 4, 8, 16,", "one of these", "--moe-token-dispatcher-type alltoall"],
    ),
    (DEEP_EP | {"hidden_size": 72}, ["flex with hidden_size 72", "multiple of 16", "type alltoall"]),
    (DEEP_EP | {"hidden_size": 8192}, ["flex with hidden_size 8192 over 2 ranks", "8176", "type alltoall"]),
    (
        DEEP_EP | {"num_moe_experts": 40, "moe_router_topk": 17, "expert_tensor_parallel_size": 2},
        ["flex with moe_router_topk 17", "expert_tensor_parallel_size 2", "32", "type alltoall"],
    ),
    ({"moe_shared_expert_gate": True}, ["moe_shared_expert_gate is set", "--moe-shared-expert-intermediate-size N"]),
    (
        {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 64},
        ["allgather", "--moe-token-dispatcher-type alltoall"],
    ),
    (
        {"moe_shared_expert_intermediate_size": 66, "tensor_model_parallel_size": 4, "ffn_hidden_size": 64},
        ["moe_shared_expert_intermediate_size is 66", "(4)", "64 or 68"],
    ),
    (SINKHORN | {"moe_aux_loss_coeff": 0.1}, ["moe_aux_loss_coeff is 0.1", "sinkhorn", "leave it out"]),
    (SINKHORN | GROUPS, ["moe_router_num_groups is 4", "sinkhorn"]),
    (SINKHORN | {"moe_expert_capacity_factor": 1.0}, ["moe_expert_capacity_factor is 1.0", "sinkhorn"]),
    (SINKHORN | {"moe_router_topk_scaling_factor": 2.5}, ["moe_router_topk_scaling_factor is 2.5", "sinkhorn"]),
    ({"moe_layer_freq": 0}, ["moe_layer_freq is 0", "at least 1"]),
    ({"moe_layer_freq": [0, 1]}, ["moe_layer_freq is [0, 1]", "4 layers", "[1]*4"]),
    ({"moe_layer_freq": [0, 1], "num_layers": 1}, ["moe_layer_freq is [0, 1]", "1 layers", "[1]*1"]),
    ({"moe_layer_freq": [0, 1, 2, 1]}, ["moe_layer_freq is [0, 1, 2, 1]", "0 (dense) or 1 (experts)"]),
    ({"moe_layer_freq": [0, 0, 0, 0]}, ["no layer has experts", "--num-experts"]),
    (PARTS | {"moe_upcycling_granularity": 3}, ["moe_upcycling_granularity is 3", "1, 2, 4, 8"]),
    (PARTS, ["moe_router_topk is 2", "moe_upcycling_granularity (4)", "--moe-router-topk 4."]),
    (PARTS | {"moe_router_topk": 7}, ["moe_router_topk is 7", "all 4 parts", "--moe-router-topk 4 or 8."]),
    # An MLP is divided between groups of 3; or it is two groups, of which a token may get one.
    (
        PARTS | GROUPS | {"moe_upcycling_granularity": 2, "num_moe_experts": 12},
        ["moe_router_num_groups is 4", "groups of 3 experts", "2 parts", "use one of 1, 2, 3, 6."],
    ),
    (
        PARTS
        | {"num_moe_experts": 24, "moe_upcycling_granularity": 6, "moe_router_topk": 6}
        | {"moe_router_num_groups": 8, "moe_router_group_topk": 3},
        ["moe_router_num_groups is 8", "groups of 3 experts", "6 parts", "use one of 1, 2, 4."],
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "moe_act"]},
        ["moe and moe_act", "keep one"],
    ),
    (
        {
            "moe_layer_recompute": True,
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 1,
        },
        ["moe_layer_recompute is set", "full", "leave out one"],
    ),
]


@pytest.mark.parametrize(("changes", "said"), BROKEN)
def test_a_broken_rule_is_told_once_with_its_remedy(changes: dict[str, Any], said: list[str]) -> None:
    """Mutation: each sentence of moe_rules left out is missed by its own case."""
    found = config_of(**changes).violations()
    assert len(found) == 1, found
    assert [part for part in said if part not in found[0]] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GROUPS | {"moe_router_topk": 4},
        SIGMOID | {"moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "none"},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        SIGMOID | {"moe_router_topk": 1},
        SINKHORN | {"moe_router_topk": 1},
        {"moe_router_type": "gmlp"},
        {"moe_expert_capacity_factor": 1.25, "moe_token_drop_policy": "position"},
        {"expert_model_parallel_size": 8, "expert_tensor_parallel_size": 4},
        FLEX | {"expert_model_parallel_size": 8, "bf16": True},
        FLEX,
        PARTS | {"moe_router_topk": 8},
        PARTS | GROUPS | {"moe_router_topk": 4},  # two groups make up one MLP, and two are chosen
        PARTS | GROUPS | {"moe_upcycling_granularity": 2},
        {"moe_upcycling_granularity": 3},
    ],
)
def test_what_breaks_no_rule(changes: dict[str, Any]) -> None:
    assert config_of(**changes).violations() == []


def run_violations(*words: str) -> list[str]:
    """What a whole run with 8 experts breaks."""
    settings = read_settings([*LINE, "--num-experts", "8", *words])
    assert not settings.problems
    return all_violations(build_run_config(settings))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--moe-aux-loss-coeff 0.1", "the balance losses (aux_loss)"),
        ("--moe-z-loss-coeff 0.1", "moe_z_loss_coeff"),
        ("--moe-expert-capacity-factor 1", "moe_expert_capacity_factor"),
        ("--moe-router-load-balancing-type sinkhorn", "sinkhorn"),
        ("--moe-router-enable-expert-bias --moe-router-score-function sigmoid", "moe_router_enable_expert_bias"),
    ],
)
def test_padding_is_refused_where_it_would_be_counted(words: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: without the rule, the 2 tokens of padding would count as tokens of some expert."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    padded = "--context-parallel-size 2 --seq-length 30 --pad-to-multiple"
    found = run_violations(*padded.split(), *words.split())
    assert len(found) == 1
    assert "pad_to_multiple adds 2 tokens" in found[0]
    assert named in found[0]
    assert run_violations(*padded.split()) == []
    assert run_violations(*padded.split(), "--seq-length", "32", *words.split()) == []


def test_tokens_that_tensor_ranks_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = "--tensor-model-parallel-size 4 --seq-length 31"
    (found,) = run_violations(*words.split())
    assert "seq_length is 31, 31 tokens" in found
    assert "--seq-length 28 or 32" in found
    assert run_violations(*words.split(), "--seq-length", "32") == []


def test_upcycling_needs_a_dense_model_of_the_right_width() -> None:
    (found,) = run_violations("--moe-use-upcycling")
    assert "--pretrained-checkpoint" in found
    words = "--moe-use-upcycling --load dense --moe-upcycling-granularity 2"
    (found,) = run_violations(*words.split())
    assert "write --moe-ffn-hidden-size 64" in found
    assert run_violations(*words.split(), "--moe-ffn-hidden-size", "64") == []


def test_flags_of_experts_that_are_not_there() -> None:
    words = "--moe-router-topk 1 --moe-grouped-gemm --expert-tensor-parallel-size 1 --moe-ffn-hidden-size 64"
    run = parse_args([*LINE, *words.split()])
    said = run.notices[0]
    assert said.endswith("without effect, because it belongs to --num-experts.")
    for flag in words.split():
        assert flag in said or not flag.startswith("--")
    alone = parse_args([*LINE, *shlex.split("--num-experts 8 --moe-router-bias-update-rate 0.1")])
    assert "belongs to --moe-router-enable-expert-bias" in alone.notices[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1", "with a balance loss"),
        ("--moe-router-load-balancing-type global_aux_loss", "--moe-aux-loss-coeff above 0"),
        ("--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1", ""),
        ("--moe-router-load-balancing-type sinkhorn", ""),
        ("--moe-router-load-balancing-type none", ""),
        ("", ""),
    ],
)
def test_a_balance_that_does_nothing_is_said(words: str, says: str) -> None:
    """Mutation: leave either condition out, or ask it of sinkhorn too."""
    notices = parse_args([*LINE, "--num-experts", "8", *words.split()]).notices
    found = [notice for notice in notices if "without effect" in notice and "--moe-" in notice]
    assert len(found) == bool(says)
    assert says in "".join(found)
