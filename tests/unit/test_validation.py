"""Rules between settings: each violation says the value, the rule and the remedy, and all are reported at once."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.arguments import RunConfig, build_run_config, parse_args, read_settings, validate
from megatron_lite.arguments.validation import all_violations
from megatron_lite.errors import ConfigError
from megatron_lite.transformer.transformer_config import cp_comm_type_of

BASE = {
    "num_layers": "2",
    "hidden_size": "64",
    "num_attention_heads": "4",
    "seq_length": "32",
    "micro_batch_size": "2",
    "train_iters": "10",
    "lr": "1e-3",
    "mock_data": None,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": "100",
    # as they are by default, but chosen, which start-up does not remark on
    "hidden_dropout": "0",
    "attention_dropout": "0",
    "calculate_per_token_loss": None,
}


def words(without: tuple[str, ...] = (), **changes: str | None) -> list[str]:
    """A command line: BASE with changes; None is a switch."""
    line: list[str] = []
    for name, value in {**BASE, **changes}.items():
        if name not in without:
            line += ["--" + name.replace("_", "-"), *([] if value is None else value.split())]
    return line


def violations(monkeypatch: pytest.MonkeyPatch, world: int, line: list[str]) -> list[str]:
    """What a run of `world` ranks with this command line breaks."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    settings = read_settings(line)
    assert not settings.problems
    return all_violations(build_run_config(settings))


CP2: dict[str, str | None] = {"context_parallel_size": "2"}
CP4: dict[str, str | None] = {"context_parallel_size": "4"}
ROPE: dict[str, str | None] = {"position_embedding_type": "rope"}
MTP: dict[str, str | None] = {**ROPE, "mtp_num_layers": "1"}
LATENT: dict[str, str | None] = {**ROPE, "multi_latent_attention": None}

# world size, changed settings, and what the one sentence must hold: the value, the rule's number, the remedy
CASES: list[tuple[int, dict[str, str | None], list[str]]] = [
    (
        1,
        {"tp_comm_overlap": None},
        ["tp_comm_overlap is set with tensor_model_parallel_size 1", "write --tensor-model-parallel-size above 1"],
    ),
    (
        2,
        {"tp_comm_overlap": None, "tensor_model_parallel_size": "2"},
        ["tensor_model_parallel_size 2 and sequence_parallel False", "and --sequence-parallel, or leave it out"],
    ),
    (1, {"fp8_format": "hybrid"}, ["fp8_format is hybrid without bf16", "add --bf16 (or --fp64"]),
    (1, {"fp8_format": "hybrid", "fp16": None}, ["fp8_format is hybrid without bf16", "add --bf16"]),
    (1, {"fp8_format": "e5m2", "bf16": None}, ["fp8 is 'e5m2'", "e4m3, hybrid"]),
    (
        4,
        {"fp8_format": "e4m3", "bf16": None, "num_query_groups": "2", "tensor_model_parallel_size": "4"},
        ["num_query_groups 2 and tensor_model_parallel_size 4", "parts of its gradient", "among 1, 2,"],
    ),
    (
        1,
        {"fp8_format": "e4m3", "bf16": None, "first_last_layers_bf16": None},
        ["num_layers_at_start_in_bf16 is 1 and num_layers_at_end_in_bf16 1", "of the 2 layers", "choose fewer"],
    ),
    (6, {"tensor_model_parallel_size": "4"}, ["world_size is 6", "multiple of", "= 4", "4 or 8"]),
    (1, {"hidden_size": "66"}, ["hidden_size is 66", "num_attention_heads (4)", "64 or 68", "--kv-channels"]),
    (1, {"num_query_groups": "3"}, ["num_query_groups is 3", "divide num_attention_heads (4)", "1, 2, 4"]),
    (1, {"pipeline_model_parallel_size": "0"}, ["pipeline_model_parallel_size is 0", "at least 1"]),
    (4, {"pipeline_model_parallel_size": "4"}, ["num_layers is 2", "the 4 pipeline stages", "--num-layers 4"]),
    (2, {"pipeline_schedule": "zbv"}, ["--pipeline-schedule", "pipeline_model_parallel_size is 1", "or leave it out"]),
    (2, {"expert_model_parallel_size": "2"}, ["expert_model_parallel_size is 2", "no experts", "write --num-experts"]),
    (1, {"seq_length": "64", "max_position_embeddings": "32"}, ["seq_length is 64", "(32)", "--seq-length 32"]),
    (
        4,
        {"tensor_model_parallel_size": "4", "sequence_parallel": None, "seq_length": "30"},
        ["seq_length is 30", "= 4", "28 or 32", "--pad-to-multiple"],
    ),
    (
        2,
        {"context_parallel_size": "2", "seq_length": "30"},
        ["seq_length is 30", "sequence length must be divisible by cp_size * 2 = 4", "28 or 32", "--pad-to-multiple"],
    ),
    (
        4,
        {"context_parallel_size": "2", "tensor_model_parallel_size": "2", "sequence_parallel": None, "seq_length": "4"},
        ["seq_length is 4", "divisible by cp_size * 2 * tp_size", "(2 x 2 x 2) = 8", "--seq-length 8"],
    ),
    (2, CP2 | {"cp_comm_type": "ring"}, ["cp_comm_type is 'ring'", "p2p, all_gather, a2a, a2a+p2p"]),
    (2, CP2 | {"cp_comm_type": "p2p a2a p2p"}, ["cp_comm_type has 3 values", "each of the 2", "write 2 of them"]),
    (1, {"cp_comm_type": "p2p a2a p2p"}, ["cp_comm_type has 3 values", "each of the 2"]),
    (4, CP4 | {"cp_comm_type": "a2a+p2p"}, ["cp_comm_type is a2a+p2p", "--hierarchical-context-parallel-sizes 2 2"]),
    (
        4,
        CP4 | {"cp_comm_type": "a2a p2p a2a+p2p", "num_layers": "3", "hierarchical_context_parallel_sizes": "2 4"},
        ["is [2, 4]", "product is context_parallel_size (4)", "-sizes 2 2"],
    ),
    (
        4,
        CP4 | {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": "4"},
        ["is [4]", "two numbers", "-sizes 2 2"],
    ),
    (
        4,
        CP4 | {"cp_comm_type": "a2a", "num_attention_heads": "2"},
        ["cp_comm_type is a2a over 4 ranks", "(2) must be a multiple", "1, 2 ranks", "or p2p"],
    ),
    (
        4,
        CP2 | {"cp_comm_type": "a2a", "num_attention_heads": "2", "tensor_model_parallel_size": "2"},
        ["cp_comm_type is a2a over 2 ranks", "(1) must be a multiple"],
    ),
    (
        4,
        CP4 | {"cp_comm_type": "a2a", "num_attention_heads": "12", "hidden_size": "96", "num_query_groups": "6"},
        ["cp_comm_type is a2a over 4 ranks", "(6) must be a multiple or a divisor", "use p2p"],
    ),
    (2, CP2 | {"attention_dropout": "0.1"}, ["attention_dropout is 0.1", "p2p", "only a2a", "--attention-dropout 0"]),
    (
        2,
        CP2 | {"attention_dropout": "0.1", "cp_comm_type": "a2a all_gather"},
        ["attention_dropout is 0.1", "all_gather"],
    ),
    (2, CP2 | {"window_size": "4,0"}, ["window_size is (4, 0) in layer 1", "p2p", "--cp-comm-type a2a"]),
    (
        2,
        CP2 | {"window_size": "4,0", "window_attn_skip_freq": "2", "cp_comm_type": "all_gather a2a"},
        ["window_size is (4, 0) in layer 1", "all_gather"],
    ),
    (2, {"global_batch_size": "6"}, ["global_batch_size is 6", "= 4", "4 or 8"]),
    (1, {"global_batch_size": "0"}, ["global_batch_size is 0", "positive", "1 or more"]),
    (1, {"train_samples": "100"}, ["train_iters is 10", "train_samples is 100", "leave out"]),
    (1, {"lr_warmup_iters": "10"}, ["lr_warmup_iters is 10", "10 iters", "--lr-warmup-iters 1"]),
    (1, {"lr_warmup_samples": "5"}, ["lr_warmup_samples is 5", "train_iters", "--lr-warmup-iters"]),
    (1, {"lr_decay_samples": "5"}, ["lr_decay_samples is 5", "train_iters", "--lr-decay-iters"]),
    (1, {"min_lr": "0.1"}, ["lr is 0.001", "min_lr (0.1)", "lower"]),
    (1, {"save": "x"}, ["save is 'x'", "interval", "--save-interval N"]),
    (1, {"save": "x", "save_interval": "0"}, ["save_interval is 0", "positive", "1 or more"]),
    (
        1,
        {"save": "x", "save_interval": "10", "save_retain_interval": "25"},
        ["save_retain_interval is 25", "(10)", "--save-retain-interval 20"],
    ),
    (1, {"exit_on_missing_checkpoint": None}, ["exit_on_missing_checkpoint", "--load FOLDER"]),
    (1, {"transformer_impl": "transformer_engine"}, ["not installed here", "docs/installation.md", "auto or local"]),
    (
        1,
        {"transformer_impl": "transformer_engine", "fp64": None},
        ["fp64, which that package does not compute in", "write --transformer-impl auto or local"],
    ),
    (1, {"norm_impl": "apex"}, ["norm_impl is apex", "no module fused_layer_norm_cuda", "write --norm-impl torch"]),
    (1, {"adam_impl": "apex"}, ["adam_impl is apex", "no module amp_C", "write --adam-impl torch"]),
    (1, {"norm_impl": "apex", "compile": None, "dry_run": None}, ["compile is set with norm_impl apex", "leave out"]),
    (1, {"fp16": None, "bf16": None}, ["--fp16 and --bf16", "one dtype", "keep one"]),
    (1, {"fp32_residual_connection": None}, ["fp32_residual_connection", "--bf16"]),
    (1, {"recompute_granularity": "full"}, ["recompute_granularity is full", "--recompute-method", "uniform"]),
    (1, {"recompute_num_layers": "1"}, ["recompute_num_layers", "--recompute-granularity full", "leave"]),
    (1, {"compile": None, "attention_dropout": "0.1"}, ["compile is set with attention_dropout 0.1", "leave out"]),
    (
        1,
        {"compile": None, "recompute_granularity": "selective"},
        ["is set with recompute_granularity selective", "full"],
    ),
    (1, {"distribute_saved_activations": None}, ["distribute_saved_activations", "full", "leave it out"]),
    (1, {"rampup_batch_size": "2 2 100", "global_batch_size": "4"}, ["[2, 2, 100]", "samples", "--train-samples N"]),
    (
        1,
        {"step_batch_size_schedule": "0:4,8K:16", "global_batch_size": "4"},
        ["global_batch_size is 4", "'0:4,8K:16' ends at 16", "--global-batch-size 16"],
    ),
    (
        1,
        {**LATENT, "position_embedding_type": "learned_absolute"},
        ["position_embedding_type is learned_absolute", "to be rotated", "rope or yarn"],
    ),
    (
        1,
        {**LATENT, "group_query_attention": None, "num_query_groups": "2"},
        ["num_query_groups is 2", "num_attention_heads (4)", "leave out --group-query-attention"],
    ),
    (
        1,
        {**LATENT, "position_embedding_type": "yarn", "rope_type": "rope"},
        ["rope_type is rope, but position_embedding_type is yarn", "keep one"],
    ),
    (
        1,
        {**LATENT, "rotary_scaling_factor": "4", "use_rope_scaling": None},
        ["rotary_scaling_factor is 4.0", "use_rope_scaling", "add --rope-type rope"],
    ),
    (1, {**LATENT, "attention_output_gate": None}, ["attention_output_gate", "leave out one"]),
    (1, {**LATENT, "add_qkv_bias": None}, ["add_qkv_bias is set with multi_latent_attention", "leave out one"]),
    (1, {**LATENT, "kv_lora_rank": "0"}, ["kv_lora_rank is 0", "at least 1", "leave it out"]),
    (1, {**LATENT, "q_lora_rank": "-1"}, ["q_lora_rank is -1", "at least 1"]),
    (1, {**LATENT, "qk_pos_emb_head_dim": "5"}, ["of qk_pos_emb_head_dim 5 makes 5 rotated", "--qk-pos-emb-head-dim"]),
    (1, {"recompute_granularity": "selective", "recompute_modules": "mla_up_proj"}, ["names mla_up_proj", "leave it"]),
    (1, {"mtp_num_layers": "1"}, ["learned_absolute with mtp_num_layers", "write --position-embedding-type rope"]),
    (1, {"mtp_num_layers": "0"}, ["mtp_num_layers is 0", "at least 1", "leave it out"]),
    (
        2,
        {
            **ROPE,
            "mtp_num_layers": "1",
            "pipeline_model_parallel_size": "2",
            "pipeline_model_parallel_layout": "Etm|tL",
        },
        ["stage 0 is 'Etm'", "(m) stand before L", "'Et|(t|)*2tmL'"],
    ),
    (1, {**MTP, "mtp_loss_scaling_factor": "-1"}, ["is -1.0", "not be negative"]),
    (1, {**ROPE, "no_rope_freq": "0"}, ["no_rope_freq is 0", "at least 1"]),
    (1, {**ROPE, "no_rope_freq": "[0,1,0]"}, ["no_rope_freq is [0, 1, 0]", "2 layers", "write 2"]),
    (1, {"softmax_type": "quiet"}, ["softmax_type is 'quiet'", "one of", "learnable"]),
    (1, {"glu_linear_offset": "1"}, ["glu_linear_offset 1.0", "gated", "--swiglu", "leave them out"]),
    (1, {"swiglu": None, "activation_func_clamp_value": "-7"}, ["is -7.0", "positive", "leave it out"]),
    (
        2,
        {**CP2, "softmax_type": "learnable", "window_size": "4,0"},
        ["window_size is (4, 0)", "cp_comm_type p2p", "--cp-comm-type a2a"],
    ),
    (1, {"normalization": "BatchNorm"}, ["normalization is 'BatchNorm'", "one of", "RMSNorm"]),
    (1, {"hidden_dropout": "1.5"}, ["hidden_dropout is 1.5", "0 <= value < 1"]),
    (
        1,
        {"profile": None, "profile_step_start": "9", "profile_step_end": "9"},
        ["is 9", "before", "--profile-step-end 11"],
    ),
    (1, {"wandb_project": "p"}, ["wandb_project", "--wandb-exp-name NAME"]),
    (1, {"eval_iters": "-1"}, ["eval_iters is -1", "0 (no evaluation) or more"]),
    (1, {"seed": "-3"}, ["seed is -3", "0 or more"]),
    (1, {"seed": "4294967296"}, ["seed is 4294967296", "below 2^32"]),
    (1, {"exit_duration_in_mins": "0"}, ["exit_duration_in_mins is 0", "positive"]),
    (1, {"iterations_to_skip": "0 3"}, ["iterations_to_skip is [0, 3]", "from 1"]),
    (1, {"profile": None, "profile_ranks": "0 7"}, ["profile_ranks names [7]", "ranks 0 to 0"]),
    (1, {"kv_channels": "0"}, ["kv_channels is 0", "at least 1"]),
    (1, {"ffn_hidden_size": "-4"}, ["ffn_hidden_size is -4", "at least 1"]),
    (1, {"norm_epsilon": "-1"}, ["layernorm_epsilon is -1.0", "negative"]),
    (1, {"init_method_std": "-1"}, ["init_method_std is -1.0", "negative"]),
    (1, {"window_size": "-5,0"}, ["window_size is (-5, 0)", "-1 is unlimited"]),
    (1, {"window_size": "4,0", "window_attn_skip_freq": "0"}, ["window_attn_skip_freq is 0", "at least 1"]),
    (1, {"window_size": "4,0", "window_attn_skip_freq": "[0,1,1]"}, ["[0, 1, 1]", "2 layers", "write 2"]),
    (1, {"recompute_granularity": "selective", "recompute_modules": ""}, ["recompute_modules", "core_attn"]),
    (1, {"position_embedding_type": "rope", "kv_channels": "7"}, ["makes 7 rotated", "pairs", "even"]),
    (1, {"position_embedding_type": "rope", "rotary_percent": "0.1"}, ["0.1", "makes 1 rotated", "pairs"]),
    (1, {"no_initialization": None}, ["no_initialization", "--load", "leave it out"]),
    (1, {"clip_grad": "nan"}, ["clip_grad is nan", "finite"]),
    (1, {"adam_eps": "0"}, ["adam_eps is 0.0", "positive", "1e-8"]),
    (1, {"lr_warmup_iters": "-1"}, ["lr_warmup_iters is -1", "not be negative", "write 0"]),
    (1, {"lr_warmup_init": "-0.1"}, ["lr_warmup_init is -0.1", "not be negative"]),
    (1, {"lr_decay_iters": "0"}, ["lr_decay_iters is 0", "at least 1", "leave it out"]),
    (1, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": "-2"}, ["lr_wsd_decay_iters is -2", "at least 1"]),
    (1, {"rotary_base": "0"}, ["rotary_base is 0.0", "positive"]),
    (1, {"yarn_original_max_position_embeddings": "0"}, ["is 0", "positive", "leave it out"]),
    (1, {"yarn_beta_slow": "64"}, ["yarn_beta_slow is 64.0", "yarn_beta_fast (32.0)"]),
    (1, {"vocab_size": "0"}, ["vocab_size is 0", "at least 1"]),
    (1, {"split": "9,-1,1"}, ["'9,-1,1'", "none negative", "969,30,1"]),
    (1, {"split": "most"}, ["'most'", "shares", "969,30,1"]),
    (
        4,
        {"num_distributed_optimizer_instances": "3", "use_distributed_optimizer": None},
        ["num_distributed_optimizer_instances is 3", "(4)", "1, 2, 4"],
    ),
]


@pytest.mark.parametrize(("world", "changes", "parts"), CASES, ids=[" ".join(case[1]) for case in CASES])
def test_one_mistake_is_one_sentence_with_value_rule_and_remedy(
    monkeypatch: pytest.MonkeyPatch, world: int, changes: dict[str, str | None], parts: list[str]
) -> None:
    found = violations(monkeypatch, world, words(**changes))
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


def test_heads_groups_and_mlp_must_split_over_tensor_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, groups, mlp = violations(monkeypatch, 3, words(tensor_model_parallel_size="3"))
    assert heads.startswith("num_attention_heads is 4, but it must be a multiple of tensor_model_parallel_size (3)")
    assert groups.startswith(
        "num_query_groups is 4, but it must be a multiple or a divisor of tensor_model_parallel_size"
    )
    assert mlp.endswith("use 255 or 258.")


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("num_layers", "--num-layers N"),
        ("hidden_size", "--hidden-size N"),
        ("num_attention_heads", "--num-attention-heads N"),
        ("seq_length", "--seq-length N"),
        ("micro_batch_size", "--micro-batch-size N"),
        ("train_iters", "--train-iters N"),
        ("lr", "--lr"),
        ("mock_data", "--data-path"),
        ("tokenizer_type", "--vocab-file and --merge-file"),
        ("vocab_size", "--vocab-size"),
    ],
)
def test_what_a_run_cannot_do_without(monkeypatch: pytest.MonkeyPatch, missing: str, remedy: str) -> None:
    found = violations(monkeypatch, 1, words((missing,)))
    assert len(found) == 1, found
    assert remedy in found[0]


def test_all_mistakes_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    line = words(tensor_model_parallel_size="4", seq_length="64", max_position_embeddings="32", seed="x", bogus="1")
    with pytest.raises(ConfigError) as caught:
        parse_args(line)
    message = str(caught.value)
    assert message.startswith("4 settings do not fit together:")
    for part in ("seed is 'x'", "--bogus is not a flag", "world_size is 6", "seq_length is 64"):
        assert part in message


def test_a_legal_run_has_no_violations(monkeypatch: pytest.MonkeyPatch) -> None:
    line = words(
        tensor_model_parallel_size="2", sequence_parallel=None, global_batch_size="8", save="x", save_interval="5"
    )
    assert violations(monkeypatch, 4, line) == []


@pytest.mark.parametrize(
    ("on_gpu", "changes", "compiled", "said"),
    [
        (False, {}, False, ""),
        (False, {"compile": None}, True, ""),
        (True, {}, True, ""),
        (True, {"no_compile": None}, False, ""),
        (True, {"attention_dropout": "0.1"}, False, "attention_dropout 0.1"),
        (True, {"recompute_granularity": "selective"}, False, "recompute_granularity selective"),
        (True, {"pipeline_model_parallel_size": "2", "pipeline_schedule": "zbv"}, False, "this schedule splits them"),
        (True, {"distributed_backend": "gloo"}, False, ""),
    ],
)
def test_layers_are_compiled_on_a_gpu_unless_something_forbids_it(
    on_gpu: bool, changes: dict[str, str | None], compiled: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations: always; never; also where a rule forbids it; silently."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = build_run_config(read_settings(words(num_layers="4", global_batch_size="16", **changes)))
    assert run.training.compile is compiled
    assert all_violations(run) == []
    notices = [notice for notice in run.notices if "not compiled" in notice]
    assert said in "".join(notices)
    assert bool(notices) == bool(said)


def test_transformer_engine_wants_a_gpu_and_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is. Mutation: layers compiled by default."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    line = words(transformer_impl="transformer_engine")
    (found,) = violations(monkeypatch, 1, line)
    assert "needs a GPU: write --transformer-impl auto or local" in found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = build_run_config(read_settings(line))
    assert all_violations(run) == []
    assert run.training.compile is False
    assert any("not compiled" in notice for notice in run.notices)
    (found,) = violations(monkeypatch, 1, [*line, "--compile"])
    assert "compile is set with transformer_impl transformer_engine" in found


@pytest.mark.parametrize(
    "changes",
    [{"norm_impl": "apex", "apply_layernorm_1p": None}, {"adam_impl": "apex", "optimizer": "sgd"}],
    ids=str,
)
def test_a_package_that_has_nothing_to_do_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]
) -> None:
    """It is said to be without effect, keeps nothing from being compiled, and need not be there.

    Mutation: asked for by the flag alone.
    """
    assert violations(monkeypatch, 1, words(**changes, compile=None)) == []
    assert any("without effect" in notice for notice in parse_args(words(**changes)).notices)


LEGAL_UNDER_CONTEXT_PARALLELISM: list[tuple[int, dict[str, str | None]]] = [
    (2, CP2),
    (1, {"cp_comm_type": "a2a+p2p", "attention_dropout": "0.1"}),  # one rank communicates with nobody
    (2, CP2 | {"cp_comm_type": "a2a", "attention_dropout": "0.1", "window_size": "4,0"}),
    (2, CP2 | {"cp_comm_type": "a2a p2p", "window_size": "4,0", "window_attn_skip_freq": "2"}),
    (4, CP4 | {"cp_comm_type": "a2a", "num_query_groups": "2"}),  # key/value heads are repeated
    (4, CP4 | {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": "2,2", "num_query_groups": "1"}),
    (4, CP2 | {"tensor_model_parallel_size": "2", "sequence_parallel": None}),
    (4, CP4 | {"seq_length": "31", "pad_to_multiple": None}),
    (2, CP2 | {"reset_attention_mask": None}),
]


@pytest.mark.parametrize(("world", "changes"), LEGAL_UNDER_CONTEXT_PARALLELISM)
def test_what_context_parallelism_can_do(
    monkeypatch: pytest.MonkeyPatch, world: int, changes: dict[str, str | None]
) -> None:
    assert violations(monkeypatch, world, words(**changes)) == []


def test_types_of_communication_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: cp_comm_type_of that counts layers from 0 gives layer 1 the type of layer 2."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def types(value: str | None) -> list[str]:
        given = {} if value is None else {"cp_comm_type": value}
        config = parse_args(words(**CP2, **given)).transformer
        return [cp_comm_type_of(config, number) for number in (1, 2)]

    assert types(None) == ["p2p", "p2p"]
    assert types("allgather") == ["all_gather", "all_gather"]
    assert types("a2a") == ["a2a", "a2a"]
    assert types("a2a allgather") == ["a2a", "all_gather"]


def test_defaults_that_megatron_does_not_have_are_named_where_nobody_chose() -> None:
    """Mutations: ask whether the value is the default's rather than whether it was given; forget the router."""
    chosen = ("hidden_dropout", "attention_dropout", "calculate_per_token_loss")
    (said,) = parse_args(words(chosen)).notices
    assert said.startswith("defaults that are not Megatron-LM's: --hidden-dropout 0 (there 0.1), --attention-dropout 0")
    assert "--calculate-per-token-loss (there a mean of micro-batch means); write a value" in said
    assert "Padding of the vocabulary is always outside of the softmax" in said
    (said,) = parse_args(words(chosen[1:], hidden_dropout="0.1", no_calculate_per_token_loss=None)).notices
    assert said.startswith("defaults that are not Megatron-LM's: --attention-dropout 0 (there 0.1); write a value")
    assert not parse_args(words()).notices
    (said,) = parse_args(words(bf16=None, num_experts="4")).notices
    assert "--moe-router-dtype fp32 (there that of its input); write" in said
    assert not parse_args(words(bf16=None, num_experts="4", moe_router_dtype="fp32")).notices


def test_idle_settings_of_context_parallelism_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    said = parse_args(words(cp_comm_type="a2a", hierarchical_context_parallel_sizes="2 2", pad_to_multiple=None))
    assert list(said.notices) == [
        "--cp-comm-type, --hierarchical-context-parallel-sizes: without effect, because it belongs to "
        "--context-parallel-size above 1.",
        "--pad-to-multiple: without effect, because it belongs to --context-parallel-size above 1 or "
        "--sequence-parallel.",
    ]
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = parse_args(words(**CP4, cp_comm_type="a2a", hierarchical_context_parallel_sizes="2 2"))
    assert len(said.notices) == 1
    assert "--cp-comm-type a2a+p2p" in said.notices[0]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 300), cp=st.integers(1, 5), tp=st.sampled_from([1, 2, 4]), sp=st.booleans())
def test_lengths_are_refused_or_fit(length: int, cp: int, tp: int, sp: bool) -> None:
    """Every length that passes can be cut for CP and SP, padded if asked; those named in a refusal pass."""

    def of(length: int, pad: bool = False) -> RunConfig:
        line = words(
            num_attention_heads="4",
            seq_length=str(length),
            context_parallel_size=str(cp),
            tensor_model_parallel_size=str(tp),
            **({"sequence_parallel": None} if sp else {}),
            **({"pad_to_multiple": None} if pad else {}),
        )
        return build_run_config(read_settings([*line, "--dry-run", "--world-size", str(cp * tp)]))

    found = all_violations(of(length))
    assert len(found) <= 1
    if found:
        named = re.search(r"write --seq-length (\d+)(?: or (\d+))?,", found[0])
        assert named
        assert all(all_violations(of(int(number))) == [] for number in named.groups() if number)
    padded = of(length, pad=True)
    assert all_violations(padded) == []
    total = padded.padded_sequence_length
    assert total >= length
    assert (total == length) == (not found)
    assert total % (2 * cp if cp > 1 else 1) == 0
    assert total // cp % (tp if sp else 1) == 0


def test_sequence_parallelism_of_one_rank_is_switched_off_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    run = parse_args(words(sequence_parallel=None))
    assert not run.transformer.sequence_parallel
    assert any("--sequence-parallel: switched off" in notice for notice in run.notices)


def test_evaluation_alone_needs_no_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert violations(monkeypatch, 1, words(("lr", "train_iters"), skip_train=None)) == []


@pytest.mark.parametrize(
    ("sizes", "misfits"), [("2 1 100", "3, 5"), ("1 1 100", "1, 3, 5"), ("2 2 100", None), ("3 3 100", "3")]
)
def test_a_growing_batch_is_checked_before_it_grows(
    monkeypatch: pytest.MonkeyPatch, sizes: str, misfits: str | None
) -> None:
    """Micro-batches of 2. A run that resumes may have begun at a size that only fewer ranks divide."""
    line = words(("train_iters",), train_samples="200", rampup_batch_size=sizes, global_batch_size="6")
    found = violations(monkeypatch, 1, line)
    assert [f"over the sizes {misfits}, which" in text for text in found] == ([True] if misfits else [])
    assert violations(monkeypatch, 1, [*line, "--decrease-batch-size-if-needed"]) == []
    assert bool(violations(monkeypatch, 1, [*line, "--load", "x"])) == (misfits is not None and "5" in misfits)


def test_a_run_of_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = violations(monkeypatch, 1, words(("train_iters",), train_samples="1"))
    assert "train_samples is 1" in found
    assert "--train-samples 2" in found


def test_flags_that_do_nothing_without_others_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    file = tmp_path / "run.yaml"
    file.write_text("rotary_base: 500000\n")
    idle = {"window_attn_skip_freq": "2", "split": "8,1,1", "no_load_optim": None, "no_bias_gelu_fusion": None}
    line = words(**idle, swiglu=None, config=str(file))
    notices = "\n".join(parse_args(line).notices)
    assert "--window-attn-skip-freq: without effect, because it belongs to --window-size." in notices
    for flag in ("--split:", "--no-load-optim:", "--no-bias-gelu-fusion:"):
        assert flag in notices
    assert "rotary" not in notices  # files hold what several runs share
    assert not parse_args(words(window_size="4,0", window_attn_skip_freq="2", no_bias_gelu_fusion=None)).notices


def test_a_config_made_by_hand_is_validated_too() -> None:
    run = RunConfig()
    with pytest.raises(ConfigError, match="num_layers is not given"):
        validate(run)
    run.transformer.num_layers = 2  # not frozen: it was not accepted


def test_layers_in_fp8_do_not_overlap_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: say it of every run in fp8."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    split = {"tensor_model_parallel_size": "2", "sequence_parallel": None, "fp8_format": "e4m3", "bf16": None}
    for overlap in ({}, {"tp_comm_overlap": None}):
        said = parse_args(words(**split, **overlap)).notices
        assert any("--tp-comm-overlap: layers in fp8" in notice for notice in said) == bool(overlap)


def test_one_rank_has_nothing_to_overlap_with() -> None:
    """As with sequence parallelism. Mutation: refused."""
    run = parse_args(words(sequence_parallel=None, tp_comm_overlap=None))
    assert not run.transformer.tp_comm_overlap
    assert "--sequence-parallel and --tp-comm-overlap: switched off" in "".join(run.notices)


@pytest.mark.parametrize("flag", ["recompute", "engine", None])
def test_schedules_that_cannot_split_gradients_say_so(flag: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: one of the reasons forgotten."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    stages = {"pipeline_model_parallel_size": "2", "pipeline_schedule": "zbv", "num_layers": "4"}
    split = {"tensor_model_parallel_size": "2", "sequence_parallel": None, "global_batch_size": "16"}
    changes: dict[str | None, dict[str, str | None]] = {
        "recompute": {"recompute_granularity": "selective"},
        "engine": {"transformer_impl": "transformer_engine"},
    }
    run = build_run_config(read_settings([*words(**stages, **split, **changes.get(flag, {})), "--dry-run"]))
    said = [notice for notice in run.notices if "so there is nothing to fill idle time with" in notice]
    assert bool(said) == (run.transformer.gradients_together is not None) == (flag is not None)


def test_recomputation_that_frees_nothing_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: said of a ring, too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    recomputed = {"recompute_granularity": "selective", "recompute_modules": "mla_up_proj"}
    for comm_type, said in (("p2p", False), ("all_gather", False), ("a2a", True)):
        run = parse_args(words(**LATENT, **recomputed, **CP2, cp_comm_type=comm_type))
        assert any("attention by all-to-all keeps" in notice for notice in run.notices) == said
