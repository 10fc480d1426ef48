"""Megatron-LM's flags: each is honoured, accepted with a word, or refused by name; its example scripts pass."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lite import dry_run
from megatron_lite.arguments import build_parser, build_run_config, parse_args, read_settings
from megatron_lite.arguments.megatron_compat import ALL_ALIASES, compat_flags
from megatron_lite.arguments.options import all_options
from megatron_lite.arguments.validation import all_violations
from megatron_lite.errors import ConfigError

FLAGS = [
    word
    for line in (Path(__file__).parent / "megatron_flags.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for word in line.split()
]

GPT3 = shlex.split("""
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
    --attention-backend auto --micro-batch-size 1 --global-batch-size 1536 --train-iters 500000 --weight-decay 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5
    --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path data_text_document
    --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --split 949,50,1 --log-interval 100
    --save-interval 10000 --eval-interval 1000 --save checkpoints --load checkpoints --eval-iters 10
    --tensorboard-dir logs --step-batch-size-schedule "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"
""")

LLAMA3_8B = shlex.split("""
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
    --hidden-dropout 0.0 --swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused
    --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear
    --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
    --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5
    --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
    --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
    --empty-unused-memory-level 1 --exit-duration-in-mins 235
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path cache --tiktoken-pattern v2
    --split "'99,1,0'" --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
    --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile
    --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60
    --save checkpoints --load checkpoints --tensorboard-dir logs
""")

MIXTRAL_8X7B = shlex.split("""
    --use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
    --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0
    --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
    --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
    --no-position-embedding --rotary-base 1000000
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --moe-grouped-gemm --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce
    --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model --data-path data_text_document --split 99990,8,2
    --micro-batch-size 1 --global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000
    --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
    --use-distributed-optimizer --sequence-parallel
    --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save checkpoints --load checkpoints
    --tensorboard-dir checkpoints/tensorboard --no-load-optim --no-load-rng
""")

LLAMA3_8B_FP8 = shlex.split("""
    --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
""")


@pytest.fixture(autouse=True)
def _eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")


def test_no_flag_of_megatron_is_unknown() -> None:
    assert len(FLAGS) == 785
    honoured = {name for option in all_options() for name in option.flags} | set(ALL_ALIASES) | {"--yaml-cfg"}
    unknown = [flag for flag in FLAGS if flag.partition("=")[0] not in honoured | set(compat_flags())]
    assert not unknown
    assert not honoured & set(compat_flags())


def test_each_flag_takes_as_many_words_as_in_megatron() -> None:
    parser = build_parser()
    for flag in FLAGS:
        name, equals, several = flag.partition("=")
        words = [name, *(["1"] if equals else []), *(["2"] if several else [])]
        _, unknown = parser.parse_known_args(words)
        assert not unknown, flag


def test_what_changes_nothing_is_said_in_one_line_for_each_reason() -> None:
    settings = read_settings(["--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--overlap-grad-reduce"])
    assert not settings.problems
    assert len(settings.notices) == 2
    assert "--no-masked-softmax-fusion, --no-bias-swiglu-fusion: accepted without effect (" in settings.notices[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--moe-latent-size", "8"], "--moe-latent-size 8 is given, but not supported: this variant of a mixture"),
        (["--mtp-use-repeated-layer"], "--mtp-use-repeated-layer is given, but not supported: this variant of multi-"),
        (["--main-params-dtype", "fp16"], "--main-params-dtype fp16 is given, but not supported"),
        (["--lion-beta1", "0.9"], "--optimizer adam, sgd and muon are"),
        (["--fp8-output-proj"], "--fp8-output-proj is given, but not supported: fp8 is for the products"),
        (["--fp8-margin", "1"], "--fp8-margin 1 is given, but not supported: fp8 scales are those of the tensor"),
        (["--no-fp8-wgrad"], "--no-fp8-wgrad is given, but not supported: --fp8-format and --fp8-recipe say"),
        (["--fp4-format", "e2m1"], "--fp4-format e2m1 is given, but not supported: FP4"),
        (["--ckpt-format", "fsdp_dtensor"], "--ckpt-format fsdp_dtensor is given, but not supported"),
        (["--hybrid-context-parallel"], "--hybrid-context-parallel is given, but not supported: all samples are split"),
        (["--max-seqlen-per-dp-cp-rank", "64"], "--max-seqlen-per-dp-cp-rank 64 is given, but not supported"),
        (["--batch-size", "8"], "write --micro-batch-size"),
        (["--override-ckpt-iteration", "8"], "the position in the data is that of the checkpoint"),
        (["--moe-paged-stash", "--moe-paged-stash-page-size", "8"], "--moe-paged-stash, --moe-paged-stash-page-size 8"),
        (["--moe-dispatch-fwd-dtype", "mxfp8"], "--moe-dispatch-fwd-dtype mxfp8 is given, but not supported"),
    ],
)
def test_what_would_change_the_run_is_refused_by_name(words: list[str], named: str) -> None:
    problems = read_settings(words).problems
    assert len(problems) == 1
    assert named in problems[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--main-params-dtype", "fp32"],
        ["--ckpt-format", "torch_dist"],
        ["--rope-type", "rope"],
        ["--moe-combine-bwd-dtype", "bf16"],
        ["--fp8-margin", "0"],
        ["--fp8-recipe", "tensorwise", "--fp8-amax-history-len", "1024", "--fp8-amax-compute-algo", "max"],
        ["--fp8-amax-history-len", "1024"],
        ["--fp8-format", "hybrid", "--fp8-amax-history-len", "1", "--fp8-amax-compute-algo", "most_recent"],
        ["--ddp-reduce-scatter-with-fp32-accumulation"],
        ["--ddp-param-name-patterns-for-fp32-local-accumulation", "all"],
    ],
)
def test_values_that_ask_for_nothing_special_pass(words: list[str]) -> None:
    assert not read_settings(words).problems


@pytest.mark.parametrize(
    "flag",
    ["--ddp-reduce-scatter-with-fp32-accumulation", "--ddp-param-name-patterns-for-fp32-local-accumulation all"],
)
def test_sums_in_float32_are_not_promised_in_bfloat16(flag: str) -> None:
    (problem,) = read_settings(["--grad-reduce-in-bf16", *flag.split()]).problems
    assert f"{flag} is given, but not supported: with --grad-reduce-in-bf16" in problem


@pytest.mark.parametrize("number_first", [True, False])
def test_withdrawn_settings_in_a_file(tmp_path: Path, number_first: bool) -> None:
    """Null asks for nothing, and what the file says wins over what an alias implies, in any order.

    Mutations: aliases set where they stand; null taken for a value.
    """
    lines = ["recompute_num_layers: 2", "activations_checkpoint_method: uniform"]
    path = tmp_path / "old.yaml"
    path.write_text("\n".join(lines if number_first else reversed(lines)))
    values = {name: value for name, (value, _) in read_settings(["--config", str(path)]).values.items()}
    assert values["recompute_num_layers"] == 2
    assert (values["recompute_granularity"], values["recompute_method"]) == ("full", "uniform")
    path.write_text("activations_checkpoint_method: null\nactivations_checkpoint_granularity: null\n")
    settings = read_settings(["--config", str(path)])
    assert not settings.notices
    assert not any("recompute" in name for name in settings.values)


def test_compatibility_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "megatron.yaml"
    path.write_text("masked_softmax_fusion: true\nnum_experts: null\nfp4_format: e2m1\nmoe_grouped_gemm: false\n")
    settings = read_settings(["--config", str(path)])
    assert len(settings.notices) == 1
    assert len(settings.problems) == 1
    assert "--fp4-format e2m1" in settings.problems[0]


def test_second_spellings() -> None:
    run = build_run_config(read_settings(["--recompute-activations", "--encoder-num-layers", "3"]))
    assert run.transformer.recompute_granularity == "selective"
    assert run.transformer.num_layers == 3


def test_context_parallelism_as_in_megatron() -> None:
    words = "--context-parallel-size 8 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4"
    run = parse_args([*LLAMA3_8B, *words.split(), "--dataloader-inter-document-masking"])
    assert run.transformer.cp_comm_type == "a2a+p2p"
    assert run.transformer.hierarchical_context_parallel_sizes == [2, 4]
    assert run.data.dataloader_inter_document_masking
    assert any("--no-create-attention-mask-in-dataloader: accepted" in notice for notice in run.notices)
    by_layer = parse_args([*LLAMA3_8B, *words.split()[:2], "--cp-comm-type", *["p2p", "allgather"] * 16])
    assert by_layer.transformer.cp_comm_type == ["p2p", "all_gather"] * 16


def test_gpt3_example_is_valid_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 128 ranks, in 16 stages of 6 layers."""
    monkeypatch.setenv("WORLD_SIZE", "128")
    settings = read_settings(GPT3)
    assert not settings.problems
    run = build_run_config(settings)
    assert all_violations(run) == []
    layout = run.transformer.pipeline_layout
    assert (layout.ranks, [len(stage.layers) for stage in layout.stages]) == (16, [6] * 16)


def test_gpt3_example_is_valid_without_pipeline_stages() -> None:
    run = parse_args([*GPT3, "--pipeline-model-parallel-size", "1"])
    assert run.world_size == 8
    assert run.transformer.fp16
    assert run.training.step_batch_size_schedule is not None


def test_mixtral_example_passes_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, on 4 x 8 ranks; only the file of the tokenizer, which its user names, is made up.

    Mutations: refuse --no-position-embedding with rope, or pipeline stages in a dry run.
    """
    monkeypatch.setattr(dry_run, "build_tokenizer", lambda config: SimpleNamespace(vocab_size=32000))
    report = dry_run.describe(parse_args([*MIXTRAL_8X7B, "--dry-run", "--world-size", "32"]))
    assert "whole model: 46,702,792,704\n" in report
    assert "active for a token: 12,879,925,248 (2 of 8 experts in 32 of 32 layers)" in report
    assert "expert parallel 8 (expert 0 of 8 here, by alltoall): rank 0 works with ranks 0, 1, 2, 3, 4, 5" in report
    assert "--no-position-embedding" not in report


def test_mixtral_example_is_valid_without_pipeline_stages() -> None:
    run = parse_args([*MIXTRAL_8X7B, "--pipeline-model-parallel-size", "1"])
    assert run.transformer.balance_coefficients == {"aux_loss": 1e-2}
    assert run.transformer.moe_ffn_hidden_size == 14336


def test_no_position_embedding_without_rope_is_refused() -> None:
    (problem,) = read_settings(["--no-position-embedding"]).problems
    assert "write --position-embedding-type none" in problem
    for others in (["--position-embedding-type", "rope"], ["--use-rotary-position-embeddings"]):
        assert not read_settings(["--no-position-embedding", *others]).problems


def test_llama3_example_is_valid() -> None:
    run = parse_args(LLAMA3_8B)
    assert run.data.split == "99,1,0"
    assert run.optimizer.decoupled_lr == 5e-4
    assert run.ddp.data_parallel_sharding_strategy == "optim"
    assert not run.transformer.sequence_parallel
    said = "\n".join(run.notices)
    for name in ("--use-mcore-models", "--overlap-grad-reduce", "--cross-entropy-loss-fusion", "--sequence-parallel"):
        assert name in said


def test_muon_as_in_megatron() -> None:
    words = """--optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-no-split-qkv --muon-scale-mode unit_rms_norm
        --muon-coefficient-type polar_express --muon-num-ns-steps 8 --muon-extra-scale-factor 0.2 --muon-use-syrk"""
    run = parse_args([*LLAMA3_8B, *words.split(), "--muon-tp-mode", "distributed"])
    assert not run.optimizer.muon_split_qkv
    assert run.optimizer.muon_nesterov
    assert any("--muon-use-syrk: accepted without effect" in notice for notice in run.notices)
    with pytest.raises(ConfigError, match="muon_tp_mode is blockwise"):
        parse_args([*LLAMA3_8B, *words.split(), "--muon-tp-mode", "blockwise"])
    with pytest.raises(ConfigError, match="muon_scalar_optimizer is 'lion', but must be one of: adam"):
        parse_args([*LLAMA3_8B, *words.split(), "--muon-scalar-optimizer", "lion"])
    said = "\n".join(parse_args([*LLAMA3_8B, "--muon-momentum", "0.95"]).notices)
    assert "--muon-momentum: without effect, because it belongs to --optimizer muon." in said


def test_llama3_example_in_fp8_is_refused_by_name() -> None:
    """Its scales are those of earlier steps; that parameters travel in fp8 there changes no result worth a refusal."""
    with pytest.raises(ConfigError) as caught:
        parse_args([*LLAMA3_8B, *LLAMA3_8B_FP8])
    message = str(caught.value)
    assert "--fp8-amax-history-len 1024, --fp8-amax-compute-algo max are given, but not supported" in message
    assert "--fp8-param-gather" not in message
    assert "--fp8-format" not in message.replace("--fp8-format hybrid", "")


def test_llama3_example_in_fp8_with_scales_of_the_tensor_at_hand() -> None:
    run = parse_args([*LLAMA3_8B, *LLAMA3_8B_FP8[:-1], "--fp8-recipe", "tensorwise", "--first-last-layers-bf16"])
    assert (run.transformer.fp8, run.transformer.fp8_recipe) == ("hybrid", "tensorwise")
    assert not any("fp8" in notice for notice in run.notices)
    (notice,) = [one for one in parse_args([*LLAMA3_8B, "--fp8-format", "e4m3"]).notices if "fp8" in one]
    assert "--fp8-recipe tensorwise), where Megatron-LM's default, delayed" in notice
    idle = parse_args([*LLAMA3_8B, "--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "2"]).notices
    assert "--first-last-layers-bf16: without effect, because it belongs to --fp8-format." in idle
    assert any(one.startswith("--num-layers-at-end-in-bf16: without effect") for one in idle)


def test_the_parts_of_tp_comm_overlap_are_explained() -> None:
    """Mutation: take the switch itself for one without effect."""
    words = "--tp-comm-overlap --no-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad --tp-comm-overlap-cfg a.yaml"
    settings = read_settings(words.split())
    assert not settings.problems
    assert settings.values["tp_comm_overlap"][0] is True
    one_switch, backward, tuning = settings.notices
    assert one_switch.startswith("--no-tp-comm-overlap-rs: accepted without effect (--tp-comm-overlap is one switch")
    assert backward.startswith("--tp-comm-overlap-rs-dgrad: accepted without effect (in a column layer's backward")
    assert tuning.startswith("--tp-comm-overlap-cfg a.yaml: accepted without effect (--tp-comm-overlap works with")


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8", "blockwise", "custom"])
def test_recipes_that_are_not_there_are_refused_with_those_that_are(recipe: str) -> None:
    with pytest.raises(ConfigError, match=f"fp8_recipe is '{recipe}', but must be one of: tensorwise, rowwise"):
        parse_args([*LLAMA3_8B, "--fp8-format", "hybrid", "--fp8-recipe", recipe])


def test_flags_whose_effect_exists_here_have_it() -> None:
    """Mutation: list one of them as without effect again."""
    words = ["--verify-integrity", "--disable-bf16-reduced-precision-matmul"]
    run = parse_args([*LLAMA3_8B, *words, "--check-weight-hash-across-dp-replicas-interval", "5"])
    assert run.checkpoint.verify_checkpoint
    assert run.transformer.disable_bf16_reduced_precision_matmul
    assert run.training.check_weight_hash_across_dp_replicas_interval == 5
    assert not any(word in notice for word in [*words, "--check-weight-hash"] for notice in run.notices)
