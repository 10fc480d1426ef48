"""--dry-run: rank 0 of any cluster, described in seconds without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lite import parallel_state, pinned_memory
from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.checkpoint import BackgroundSaver, checkpointing
from megatron_lite.dry_run import describe, dry_run, estimated_memory, memories_of_pipeline
from megatron_lite.dry_run_memory import (
    ModelSize,
    Part,
    activation_bytes,
    activations_of_pipeline,
    memory_of,
    offloaded_bytes,
)
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import get_megatron_optimizer
from megatron_lite.training.setup import build_model
from megatron_lite.transformer import activation_offload
from megatron_lite.transformer.multi_latent_attention import MLASelfAttention
from megatron_lite.transformer.rope import RotaryEmbedding

ROOT = Path(__file__).parents[2]


def run_of(name: str, world: int, *words: str) -> RunConfig:
    """A preset as seen by a dry run of `world` ranks."""
    config = str(ROOT / "configs" / f"{name}.yaml")
    return parse_args(["--config", config, "--dry-run", "--world-size", str(world), *words])


def number_after(report: str, words: str) -> int:
    """The integer that follows these words in the report."""
    return int(report.split(words)[1].split()[0].replace(",", ""))


def parameters_of_stage(report: str, rank: int) -> int:
    """The parameters that a pipeline rank computes with."""
    found = re.search(rf"pipeline rank {rank}: .*\): ([\d,]+) parameters", report)
    assert found is not None
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("world", [1, 8, 4096])
def test_any_number_of_ranks(world: int) -> None:
    tensor_parallel = min(world, 8)
    run = run_of(
        "quickstart", world, "--tensor-model-parallel-size", str(tensor_parallel), "--global-batch-size", "4096"
    )
    report = describe(run)
    assert f"Layout of {world:,} rank" in report
    assert f"data parallel {world // tensor_parallel}" in report
    assert not dist.is_initialized()
    assert not parallel_state.is_initialized()


def test_llama3_70b_on_1024_ranks() -> None:
    report = describe(run_of("llama3_70b", 1024))
    assert "tensor parallel 8 with sequence parallelism: rank 0 works with ranks 0, 1, 2, 3, 4, 5, 6, 7" in report
    assert "data parallel 128: rank 0 works with ranks 0, 8, 16 ... 1016" in report
    assert "dp_replicate 1, dp_shard 128, tp 8" in report
    assert number_after(report, "whole model:") == 70_553_706_496
    # Weights are split 8 x 128 ways, norms (2 in each of 80 layers and one at the end) 128 ways.
    norms = 161 * 8192
    split = 70_553_706_496 - norms
    assert number_after(report, "computed with by rank 0:") == split // 8 + norms
    # 128,256 / 8 vocabulary rows do not divide by 128: rank 0 stores 126 of 125.25, in both tables.
    uneven = 2 * (126 * 128 - 128256 // 8) * 8192 // 128
    assert number_after(report, "stored by rank 0 between steps:") == (split // 8 + norms) // 128 + uneven
    assert (
        "512 sequences a step = 1 a micro-batch x 128 data parallel ranks x 4 micro-batches = 4,194,304 tokens"
        in report
    )


@pytest.mark.parametrize(("world", "replicas"), [(64, 2), (256, 8)])
def test_llama3_8b_at_131072_tokens(world: int, replicas: int) -> None:
    """Mutation: activations of whole sequences instead of a rank's eighth do not fit a GPU of 80 GB."""
    run = run_of("llama3_8b_128k", world)
    report = describe(run)
    assert "context parallel 8 by p2p: rank 0 works with ranks 0, 4, 8, 12, 16, 20, 24, 28" in report
    assert f"data parallel {replicas}: rank 0 works with ranks 0, 32" in report
    assert f"dp_shard {8 * replicas}, tp 4" in report
    assert number_after(report, "whole model:") == 8_030_261_248
    assert f"x {replicas} data parallel ranks x {32 // replicas} micro-batches = 4,194,304 tokens" in report
    assert "split over 8 context parallel ranks, 16,384 tokens a rank" in report
    # 32 layers in bf16: 4 h, of attention 80 heads of 128 and 40 rotated ones, of the MLP 3 f, over 4 tensor ranks
    assert activation_bytes(run) == 131072 // 8 * 32 * 2 * (4 * 4096 + 120 * 128 + 3 * 14336) // 4
    assert float(report.split("  sum ")[1].split()[0]) < 72
    assert "GiB" in report


def test_padding_takes_memory_and_is_not_counted_as_tokens() -> None:
    """250 tokens over 4 context parallel ranks are 256, 64 a rank.

    Mutation: activation_bytes by seq_length gives 62 tokens a rank.
    """
    words = "--context-parallel-size 4 --seq-length 250 --pad-to-multiple --cp-comm-type a2a p2p p2p a2a"
    run = run_of("quickstart", 4, *words.split())
    report = describe(run)
    assert "context parallel 4 by a2a in 2 layers, p2p in 2 layers: rank 0 works with ranks 0, 1, 2, 3" in report
    assert "16 sequences a step = 8 a micro-batch x 1 data parallel ranks x 2 micro-batches = 4,000 tokens" in report
    assert "filled up with 6 masked tokens to 256" in report
    assert activation_bytes(run) * 4 == activation_bytes(run_of("quickstart", 1))
    size = ModelSize(1000, 1000, 0, Part(shard=1000, stored=250, largest_layer=100, in_layers=400))
    assert memory_of(run, size).compute_weights == 1000 * 4  # context parallel ranks share gradients, as data parallel


def test_mixtral_on_64_ranks() -> None:
    """8 experts over 8 ranks, each expert on 8 of the 64: rank 0 has expert 0 and stores an eighth of it.

    Mutations: experts sharded over all 64 data parallel ranks, or counted as dense, change the numbers.
    """
    report = describe(run_of("mixtral_8x7b", 64))
    assert "expert parallel 8 (expert 0 of 8 here, by alltoall): rank 0 works with ranks 0, 1, 2, 3, 4, 5" in report
    assert "expert tensor parallel 1: rank 0 works alone" in report
    assert "expert data parallel 8: rank 0 works with ranks 0, 8, 16, 24, 32, 40, 48, 56" in report
    assert "mesh of the experts: pp 1, edp_replicate 1, edp_shard 8, ep 8, etp 1" in report
    assert number_after(report, "whole model:") == 46_702_792_704
    assert number_after(report, "active for a token:") == 12_879_925_248
    expert = 32 * 3 * 4096 * 14336
    dense = 46_702_792_704 - 8 * expert
    assert number_after(report, "computed with by rank 0:") == dense + expert
    assert f"({expert:,} of experts)" in report
    # The 8 rows of a router do not divide by 64: rank 0 stores one of them.
    uneven = 32 * (4096 - 8 * 4096 // 64)
    assert number_after(report, "stored by rank 0 between steps:") == dense // 64 + expert // 8 + uneven
    assert float(report.split("  sum ")[1].split()[0]) < 72


def test_experts_split_over_tensor_ranks() -> None:
    """ETP 2 x EP 2 on 8 ranks of TP 4: half of the experts, half of each, on every fourth rank. No layer is alike."""
    words = "--tensor-model-parallel-size 4 --expert-tensor-parallel-size 2 --global-batch-size 16"
    report = describe(run_of("quickstart_moe", 8, *words.split()))
    assert "expert parallel 2 (experts 0 to 3 of 8 here, by alltoall): rank 0 works with ranks 0, 2" in report
    assert "expert tensor parallel 2: rank 0 works with ranks 0, 1" in report
    assert "expert data parallel 2: rank 0 works with ranks 0, 4" in report
    assert "mesh of the experts: pp 1, edp_replicate 2, edp_shard 1, ep 2, etp 2" in report
    experts = 3 * 8 * 3 * 256 * 512
    assert f"({experts // 4:,} of experts)" in report
    assert "(2 of 8 experts in 3 of 4 layers)" in report


def test_experts_without_copies_are_not_gathered() -> None:
    """EP 2 on 2 ranks, in float32. Mutation: judge experts by the data parallel size, which is 2."""
    run = run_of("quickstart_moe", 2)
    part = Part(shard=1000, stored=1000, largest_layer=100, in_layers=400)
    assert memory_of(run, ModelSize(9, 9, 0, Part(), part)).compute_weights == 0
    assert memory_of(run, ModelSize(9, 9, 0, part)).compute_weights == 4000
    assert memory_of(run, ModelSize(9, 9, 0, Part(), part)).master_weights == 4000


def test_activations_of_experts() -> None:
    """3 of 4 layers: for each of 2 choices rows of 256 on both sides and three activations of 512; moe_act keeps two.

    That these are kept is tested in transformer/moe/test_experts.py.
    """
    dense = 4 * 256 + 48 * 32
    words = ["--recompute-granularity", "selective", "--recompute-modules"]
    for modules, kept in ((["core_attn"], 2 * (2 * 256 + 3 * 512)), (["moe_act"], 2 * (256 + 2 * 512)), (["moe"], 0)):
        run = run_of("quickstart_moe", 2, *words, *modules)
        assert activation_bytes(run) == 8 * 256 * 4 * (4 * dense + 3 * 1024 + 3 * kept)
    shared = run_of("quickstart_moe", 2, *words, "core_attn", "--moe-shared-expert-intermediate-size", "128")
    assert activation_bytes(shared) == 8 * 256 * 4 * (4 * dense + 3 * 1024 + 3 * (2 * (2 * 256 + 3 * 512) + 3 * 128))


@pytest.mark.parametrize(("etp", "rows"), [(1, 1), (2, 2), (4, 4)])
def test_activations_of_experts_over_tensor_ranks(etp: int, rows: int) -> None:
    """At TP 4 a rank routes a quarter of the tokens and gets `rows` times as many rows, 1/etp wide, shared experts 1/4.

    Mutations: leave out etp / tp, / etp or / tp.
    """
    words = f"--tensor-model-parallel-size 4 --expert-tensor-parallel-size {etp} --expert-model-parallel-size 1"
    words += " --sequence-parallel --moe-shared-expert-intermediate-size 128 --moe-layer-freq 1"
    attention = 256 + 48 * 32 // 4
    experts = 2 * rows * (2 * 256 + 3 * 512 // etp) // 4 + 3 * 128 // 4
    assert activation_bytes(run_of("quickstart_moe", 4, *words.split())) == 8 * 256 * 4 * 4 * (attention + experts)


def test_a_part_without_copies_is_cast_whole_and_reduces_nothing() -> None:
    """In bf16, EP 2 on 2 ranks: dp 2, experts alone. Mutations: two layers of them; a second gradient."""
    part = Part(shard=1000, stored=1000, largest_layer=100, in_layers=400)
    size = ModelSize(9, 9, 0, Part(), part)
    bf16 = ["--bf16", "--global-batch-size", "64", "--data-parallel-sharding-strategy"]
    assert memory_of(run_of("quickstart_moe", 2, *bf16, "optim_grads_params"), size).compute_weights == 1000 * 2
    assert memory_of(run_of("quickstart_moe", 2, *bf16, "optim"), size).gradients == 1000 * 4
    dense = ModelSize(9, 9, 0, part)
    assert memory_of(run_of("quickstart_moe", 2, *bf16, "optim"), dense).gradients == 2 * 1000 * 4


def test_every_stage_of_a_pipeline_is_described() -> None:
    """4 stages of 8 layers, in bf16 at DP 2; the ends also have the embedding, and the output layer.

    Mutations: build the first stage for all ranks; count a copy of tied embeddings as parameters of the model.
    """
    words = "--pipeline-model-parallel-size 4 --global-batch-size 24 --data-parallel-sharding-strategy optim"
    report = describe(run_of("llama3_8b", 8, *words.split()))
    assert "pipeline parallel 4: rank 0 works with ranks 0, 2, 4, 6" in report
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096
    table = 128_256 * 4096
    for rank, own in enumerate((8 * layer + table, 8 * layer, 8 * layer, 8 * layer + table + 4096)):
        assert parameters_of_stage(report, rank) == own
    assert number_after(report, "whole model:") == 8_030_261_248
    assert "Memory of pipeline rank 0, the fullest" in report
    assert number_after(report, "computed with by pipeline rank 0:") == 8 * layer + table


def test_tied_embeddings_are_counted_once_over_stages() -> None:
    words = "--pipeline-model-parallel-size 2 --global-batch-size 12"
    report = describe(run_of("gpt2_124m", 2, *words.split()))
    assert "whole model: 124,439,808 (+ 36,096 of vocabulary padding)" in report
    assert parameters_of_stage(report, 0) + parameters_of_stage(report, 1) == 124_439_808 + 36_096 + 50_304 * 768


def test_stages_hold_activations_of_several_micro_batches() -> None:
    """1f1b on 4 ranks: 4, 3, 2 and 1 micro-batches; no more than there are; recomputed ones are made one at a time.

    Mutations: as many micro-batches on every rank; recomputed activations of all of them at once.
    """
    words = "--pipeline-model-parallel-size 4 --tensor-model-parallel-size 1 --micro-batch-size 2 --global-batch-size"
    layer = activation_bytes(run_of("quickstart", 1, "--micro-batch-size", "2")) // 4
    assert activations_of_pipeline(run_of("quickstart", 4, *words.split(), "16")) == [n * layer for n in (4, 3, 2, 1)]
    assert activations_of_pipeline(run_of("quickstart", 4, *words.split(), "4")) == [n * layer for n in (2, 2, 2, 1)]
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    stored = 2 * 256 * 256 * 4
    found = activations_of_pipeline(run_of("quickstart", 4, *words.split(), "16", *full))
    assert found == [n * stored + layer for n in (4, 3, 2, 1)]


def test_pipelines_keep_gradients_and_weights_whole_during_a_step() -> None:
    """Mutation: two gathered layers under optim_grads_params, as without a pipeline."""
    size = ModelSize(1000, 1000, 0, Part(shard=1000, stored=250, largest_layer=100, in_layers=400))
    words = "--bf16 --pipeline-model-parallel-size 2 --data-parallel-sharding-strategy optim_grads_params"
    found = memory_of(run_of("quickstart", 4, *words.split()), size)
    assert found.compute_weights == 1000 * 2
    assert found.gradients == 250 * 4 + 1000 * 4


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "experts"),
    [
        (
            [
                "--config",
                "configs/gpt3_175b.yaml",
                "--pipeline-model-parallel-size",
                "16",
                "--context-parallel-size",
                "2",
                "--num-virtual-stages-per-pipeline-rank",
                "3",
            ],
            0,
        ),
        (
            ["--config", "configs/deepseek_v3.yaml", "--context-parallel-size", "2"],
            256 * 59 * 3 * 7168 * 2048,
        ),
    ],
    ids=["gpt3_175b", "deepseek_v3"],
)
def test_4096_ranks_are_planned_in_seconds(words, experts) -> None:
    """PP, VPP or an uneven layout, EP, CP. In seconds of processor time."""
    before = os.times()
    command = [sys.executable, "pretrain_gpt.py", "--dry-run", "--world-size", "4096", *words]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    after = os.times()
    assert "Layout of 4,096 ranks" in done.stdout
    assert "context parallel 2 by p2p" in done.stdout
    assert done.stdout.count("  pipeline rank ") == 16
    assert number_after(done.stdout, "whole model:") > max(experts, 174_000_000_000)
    assert after.children_user + after.children_system - before.children_user - before.children_system < 20.0


def test_groups_of_two_levels() -> None:
    words = "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
    assert "context parallel 4 by a2a+p2p of 2 x 2: rank 0" in describe(run_of("quickstart", 8, *words.split()))


def test_vocabulary_padding_is_told_apart() -> None:
    report = describe(run_of("gpt2_124m", 1, "--global-batch-size", "12"))
    assert "whole model: 124,439,808 (+ 36,096 of vocabulary padding)" in report


def test_memory_follows_the_strategy() -> None:
    size = ModelSize(1000, 1000, 0, Part(shard=1000, stored=250, largest_layer=100, in_layers=400))
    bf16 = ["--bf16", "--tensor-model-parallel-size", "1", "--mock-data"]
    memory = {
        strategy: memory_of(run_of("quickstart", 2, *bf16, "--data-parallel-sharding-strategy", strategy), size)
        for strategy in ("optim", "optim_grads", "optim_grads_params")
    }
    for one in memory.values():
        assert one.master_weights == 250 * 4
        assert one.optimizer_state == 2 * 250 * 4
        assert one.gradients == 250 * 4  # one micro-batch
        assert (
            one.total
            == one.master_weights + one.compute_weights + one.gradients + one.optimizer_state + one.activations
        )
    assert memory["optim"].compute_weights == memory["optim_grads"].compute_weights == 1000 * 2
    assert memory["optim_grads_params"].compute_weights == (2 * 100 + 600) * 2
    assert memory_of(run_of("quickstart", 1), size).compute_weights == 0
    several = run_of("quickstart", 2, *bf16, "--global-batch-size", "32", "--use-distributed-optimizer")
    assert memory_of(several, size).gradients == 250 * 4 + 1000 * 4


def test_memory_of_moments() -> None:
    """Mutations: two moments of Muon's matrices; bytes of the wrong moment; experts left out."""
    dense = Part(shard=1000, stored=500, largest_layer=100, in_layers=400, matrices=300)
    size = ModelSize(1000, 1000, 0, dense, Part(shard=80, stored=40, matrices=30))

    def state(*words: str) -> int:
        return memory_of(run_of("quickstart", 1, *words), size).optimizer_state

    assert state() == 540 * 8
    assert state("--optimizer", "muon") == 330 * 4 + 210 * 8
    assert state("--optimizer", "sgd") == 540 * 4
    aware = ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16"]
    assert state(*aware) == 540 * 6
    assert state(*aware, "--exp-avg-sq-dtype", "bf16") == 540 * 4


def test_muons_matrices_are_counted() -> None:
    """4 layers of matrices, 2^20 elements each, have one moment; the embedding and the norms two."""
    report = describe(run_of("quickstart", 1, "--optimizer", "muon"))
    matrices = 4 * (4 * 256 * 256 + 3 * 256 * 1024)
    rest = number_after(report, "whole model:") - matrices
    assert f"optimizer state (muon) {(4 * matrices + 8 * rest) / 2**20:>16.3f} MiB" in report


@pytest.mark.parametrize(("words", "each"), [([], 8), (["--optimizer", "sgd"], 4)])
def test_moments_on_the_host(words: list[str], each: int) -> None:
    """They move from the device's table to the host's. Mutations: all of them whatever the fraction; none."""
    host = ["--optimizer-cpu-offload"]
    for some in (0, 250, 1000):
        size = ModelSize(1000, 1000, 0, dense=Part(1000, 1000), moments_on_host=Part(some, some))
        memory = memory_of(run_of("quickstart", 1, *words, *host), size)
        assert (memory.optimizer_state, memory.moments_on_host) == ((1000 - some) * each, some * each)
        assert memory.host_total == memory.moments_on_host
    report = describe(run_of("quickstart", 1, *words, *host))
    on_device, on_host = report.split("Host memory of rank 0")
    whole = number_after(report, "whole model:") * each / 2**20
    assert f"{whole:.3f} MiB" in on_host.split("optimizer state")[1].splitlines()[0]
    assert " 0.000 MiB" in on_device.split("optimizer state")[1].splitlines()[0]
    for without in ([], ["--optimizer-offload-fraction", "0.5"]):
        assert "Host memory" not in describe(run_of("quickstart", 1, *words, *without))


SMALL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --vocab-size 64 --mock-data --lr 1
    --tokenizer-type NullTokenizer --micro-batch-size 2 --train-iters 1 --dry-run --save folder --save-interval 1
"""


@pytest.mark.parametrize(
    "words",
    [
        "--bf16",
        "--optimizer-offload-fraction 0.5 --num-experts 2 --untie-embeddings-and-output-weights",
        "--optimizer muon --optimizer-offload-fraction 0.4",
        "--optimizer sgd --no-save-optim",
    ],
)
def test_memory_of_the_host_is_what_is_taken(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By moments, and by the copy of a save. What fills up to 256 bytes after each tensor is not counted.

    Mutations: the fraction of all elements, without the rest of the last parameter; the copy without moments on the
    host; with an optimizer that is not saved.
    """
    taken: list[int] = []
    take = pinned_memory._mapping
    monkeypatch.setattr(pinned_memory, "_mapping", lambda size, pinned: (taken.append(size), take(size, pinned))[1])
    run = parse_args([*SMALL.split(), "--optimizer-cpu-offload", "--async-save", *words.split()])
    memory = estimated_memory(run)
    parallel_state.initialize_model_parallel()
    try:
        chunks = build_model(
            run.transformer,
            run.gpt,
            run.ddp,
            vocab_size=64,
            max_sequence_length=16,
            device=torch.device("cpu"),
            seed=1,
        )
        optimizer = get_megatron_optimizer(run.optimizer, chunks)
        saved = checkpointing._tensors_to_save(chunks, optimizer if run.checkpoint.save_optim else None, save_rng=False)
        saver = BackgroundSaver()
        saver.copies(saved)
        saver.close()
    finally:
        parallel_state.shutdown()
    of_moments, of_save = taken
    filling = pinned_memory.ALIGNMENT * len(optimizer.state_dict())
    assert 0 <= of_moments - memory.moments_on_host < filling
    assert 0 <= of_save - memory.saved_on_host < filling + pinned_memory.ALIGNMENT * len(saved)
    assert memory.moments_on_host > 10 * filling
    assert memory.host_total == memory.moments_on_host + memory.saved_on_host


def test_ranks_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchrun says how many there are. Nodes of 4 ranks have both stages, at 2 ranks a stage, or all of one.

    Mutations: the fullest rank times 4; the first node; a rank's stage by its number modulo 2.
    """
    words = "--pipeline-model-parallel-size 2 --global-batch-size 32 --optimizer-cpu-offload --async-save --save x"
    words += " --save-interval 1 --data-parallel-sharding-strategy no_shard --decoder-first-pipeline-num-layers 1"
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def told(world: int) -> list[float]:
        """Of the fullest rank, and of its node."""
        report = describe(run_of("quickstart", world, *words.split()))
        lines = report.split("Host memory of pipeline rank 1, the fullest")[1].split("Not counted")[0].splitlines()
        return [float(line.split()[-2]) for line in lines if "sum" in line]

    (most,) = told(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    run = run_of("quickstart", 4, *words.split())
    sizes = [memory.host_total / 2**20 for memory in memories_of_pipeline(run)]
    assert sizes[1] == pytest.approx(most, abs=1e-3)
    assert sizes[0] < 0.99 * sizes[1]
    assert told(4) == pytest.approx([most, 2 * sum(sizes)], abs=2e-3)
    assert told(8) == pytest.approx([most, 4 * sizes[1]], abs=2e-3)


def test_activations_by_the_formula() -> None:
    plain = activation_bytes(run_of("quickstart", 1))
    # 8 x 256 tokens, 4 layers, float32: 4 h + (8 + 8 + 8 + 8, 8 + 8 rotated) heads x 32 + 3 f
    assert plain == 8 * 256 * 4 * 4 * (4 * 256 + 48 * 32 + 3 * 1024)
    assert activation_bytes(run_of("quickstart", 1, "--compile")) == 8 * 256 * 4 * 4 * (4 * 256 + 48 * 32 + 3 * 1024)
    mlp = ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]
    assert activation_bytes(run_of("quickstart", 1, *mlp)) == 8 * 256 * 4 * 4 * (4 * 256 + 48 * 32)
    learned = ["--position-embedding-type", "learned_absolute", "--no-qk-layernorm"]
    assert activation_bytes(run_of("quickstart", 1, *learned)) == 8 * 256 * 4 * 4 * (4 * 256 + 32 * 32 + 3 * 1024)
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "2"]
    recomputed = activation_bytes(run_of("quickstart", 1, *full))
    assert recomputed == 8 * 256 * 4 * (2 * 256 + 2 * (4 * 256 + 48 * 32 + 3 * 1024))
    split = activation_bytes(run_of("quickstart", 2, "--tensor-model-parallel-size", "2"))
    assert split == plain // 2


SAVED = [
    ("", 4 + 32, 8),
    ("--no-qk-layernorm", 4, 8 - 24),
    ("--no-qk-layernorm --position-embedding-type learned_absolute", 4, 0),
    ("--position-embedding-type learned_absolute", 4 + 32, 8),
    ("--bf16", 4 + 32, 8),
]


@pytest.mark.parametrize(("words", "statistics", "heads"), SAVED)
def test_a_layer_keeps_what_is_estimated(
    words: str, statistics: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: what travels with --cpu-offloading-num-layers, each storage once and weights not, is the formula's.

    More, and known: mean and deviation of two norms (and of those of 8 heads' queries and keys), and the softmax's
    denominators, in float32. And a CPU's attention copies the heads it reads, the values' too, so that what was
    projected is let go, unless norms read it. Mutations: queries and keys once; two or four widths of a gated MLP; any
    other number.
    """
    sent: list[int] = []
    send = activation_offload.Storage.send
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(
        activation_offload.Storage, "send", lambda one: (sent.append(one.device_copy.numel()), send(one))
    )
    layer_norm = ["--normalization", "LayerNorm"]
    run = run_of("quickstart", 1, *layer_norm, *words.split(), "--cpu-offloading-num-layers", "1")
    parallel_state.initialize_model_parallel()
    try:
        (model,) = build_model(
            run.transformer,
            run.gpt,
            run.ddp,
            vocab_size=64,
            max_sequence_length=256,
            device=torch.device("cpu"),
            seed=1,
        )
        model.train()
        tokens, positions = torch.zeros(8, 256, dtype=torch.long), torch.arange(256).repeat(8, 1)
        model(tokens, positions, None, labels=tokens).sum().backward()
    finally:
        parallel_state.shutdown()
    itemsize = run.transformer.params_dtype.itemsize
    more = (statistics + 32 * heads) * itemsize + 8 * 4
    assert sum(sent) == offloaded_bytes(run) + 8 * 256 * more


LATENT = """
    --multi-latent-attention --position-embedding-type rope --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 16
    --qk-pos-emb-head-dim 8 --v-head-dim 16 --qk-layernorm
"""
LATENTS = 2 * 48 + 2 * 32 + 8


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (LATENT, 8 * (3 * 24 + 24 + 16) + LATENTS),
        (LATENT + "--v-head-dim 24", 8 * 4 * 24 + LATENTS),
        (LATENT + "--v-head-dim 32", 8 * 4 * 32 + LATENTS),
        (
            LATENT + "--recompute-granularity selective --recompute-modules mla_up_proj",
            8 * (24 + 16) + LATENTS + 8 * 72,
        ),
        (LATENT + "--recompute-granularity selective --recompute-modules core_attn", 8 * (3 * 24 + 24 + 16) + LATENTS),
        ("--attention-output-gate --num-query-groups 4", (4 * 8 + 2 * 4 + 8 + 4) * 32),
    ],
    ids=["latent", "equal", "wide_values", "mla_up_proj", "core_attn", "gate"],
)
def test_activations_of_attention(words: str, kept: int) -> None:
    """8 heads: queries, keys, values and output alike wide, the output once more without the filling; the latents.

    Recomputing the up-projection keeps the output and the latents in each layer, and makes the rest of one layer anew.
    Mutations: values as wide as they are; no copy of the output; no latents; recomputed ones kept; no gate.
    """
    layer, mlp = 4 * 256 + kept, 3 * 1024
    anew = 8 * 72 if "mla_up_proj" in words else 0
    found = activation_bytes(run_of("quickstart", 1, *words.split()))
    assert found == 8 * 256 * 4 * (4 * (layer - anew + mlp) + anew)


def test_activations_of_latent_attention_over_tensor_ranks() -> None:
    """Heads are split, latents are not, but for sequence parallelism. Mutation: split both, or none."""
    heads = 8 * (3 * 24 + 24 + 16) + 3 * 1024
    words = [*LATENT.split(), "--tensor-model-parallel-size", "2"]
    plain = activation_bytes(run_of("quickstart", 2, *words, "--no-sequence-parallel"))
    assert plain == 8 * 256 * 4 * 4 * (4 * 256 + LATENTS + heads // 2)
    split = activation_bytes(run_of("quickstart", 2, *words, "--sequence-parallel"))
    assert split == 8 * 256 * 4 * 4 * (4 * 256 + LATENTS + heads) // 2


def test_a_layer_of_latent_attention_keeps_what_is_estimated() -> None:
    """Measured: what autograd saves in one layer's attention, but weights and tables, against the formula.

    More, and known: statistics of two norms and of the softmax of 8 heads. Mutations: as above; a core that keeps other
    widths.
    """
    run = run_of("quickstart", 1, *LATENT.split())
    attention = MLASelfAttention(run.transformer, 1)
    hidden = torch.randn(256, 2, 256, requires_grad=True)
    rotary = RotaryEmbedding(8)(torch.arange(256).expand(2, -1), torch.float32)
    known = {t.untyped_storage().data_ptr() for t in (hidden, *rotary, *attention.parameters())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = attention(hidden, None, rotary)
    measured = sum(storage.nbytes() for storage in saved.values())
    assert output.shape == hidden.shape
    more = 2 + 8
    estimated = activation_bytes(run) / (8 * 256 * 4) / 4 - 4 * 256 - 3 * 1024
    assert measured == 2 * 256 * 4 * (estimated + more)


def test_multi_token_prediction_takes_memory_in_the_last_stage() -> None:
    """Each depth: a layer like the decoder's last, here with experts, and 5 h of its norms and its projection.

    Mutations: no depths; a dense layer; every stage has them; 4 h; its recomputed layer kept, or not made anew.
    """
    words = "--mtp-num-layers 2 --position-embedding-type rope --moe-layer-freq [0,0,0,1] --micro-batch-size 2 "
    words += "--global-batch-size 16 --expert-model-parallel-size 1"
    unit, attention = 2 * 256 * 4, 4 * 256 + 48 * 32
    dense, experts = attention + 3 * 1024, attention + 2 * (2 * 256 + 3 * 512)
    depths = 2 * (5 * 256 + experts)
    assert activation_bytes(run_of("quickstart_moe", 1, *words.split())) == unit * (3 * dense + experts + depths)
    pipeline = [*words.split(), "--pipeline-model-parallel-size", "4"]
    found = activations_of_pipeline(run_of("quickstart_moe", 4, *pipeline))
    assert found == [unit * n for n in (4 * dense, 3 * dense, 2 * dense, experts + depths)]
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    found = activations_of_pipeline(run_of("quickstart_moe", 4, *pipeline, *full))
    held = [n * 256 + dense for n in (4, 3, 2)]
    assert found == [unit * n for n in (*held, 256 + 2 * 6 * 256 + experts)]
    halves = [*words.split(), "--pipeline-model-parallel-size", "2", *full]
    found = activations_of_pipeline(run_of("quickstart_moe", 2, *halves))
    assert found == [unit * n for n in (2 * 2 * 256 + dense, 2 * 256 + 2 * 6 * 256 + experts)]


def test_layers_of_multi_token_prediction_are_units_of_their_own() -> None:
    """Under optim_grads_params two layers are gathered: the largest of all, none of them two with one number.

    Mutation: layers told apart by their number alone.
    """
    words = "--mtp-num-layers 1 --bf16 --data-parallel-sharding-strategy optim_grads_params"
    run = run_of("quickstart", 2, *words.split())
    report = describe(run)
    layer = 256 * (16 * 32 + 2 * 256) + 3 * 256 * 1024 + 2 * 256
    further = layer + 2 * 256 * 256 + 3 * 256
    outside = number_after(report, "whole model:") - 4 * layer - further
    gathered = float(report.split("gathered weights (bfloat16)")[1].split()[0])
    assert gathered == pytest.approx(2 * (2 * further + outside) / 2**20, abs=1e-3)


def test_growing_batches_are_listed() -> None:
    words = ["--step-batch-size-schedule", "0:16 256K:32", "--global-batch-size", "32"]  # tokens, 256 a sample
    assert "the batch grows: 16 from sample 0, 32 from sample 1,000" in describe(run_of("quickstart", 1, *words))


def test_a_vocabulary_nobody_knows() -> None:
    words = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --train-iters 1"
    run = parse_args([*words.split(), "--lr", "1", "--dry-run"])
    with pytest.raises(ConfigError, match="--vocab-size N"):
        describe(run)


def test_one_rank_speaks_for_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("quickstart", 1)
    monkeypatch.setenv("RANK", "1")
    dry_run(run)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    dry_run(run)
    assert "Parameters" in capsys.readouterr().out


def test_activations_on_the_host() -> None:
    """Of 4 layers: 3 there; of 2 two are here, one behind the other; of 1 three stay. Mutations: one; all; none."""
    layer = 8 * 256 * 4 * (4 * 256 + 48 * 32 + 3 * 1024)
    for number, here in ((1, 3), (2, 2), (3, 2)):
        run = run_of("quickstart", 1, "--cpu-offloading-num-layers", str(number))
        assert activation_bytes(run) == here * layer
        assert offloaded_bytes(run) == number * layer
        of_host = describe(run).split("Host memory of rank 0")[1]
        assert float(of_host.split("activations (estimate)")[1].split()[0]) == pytest.approx(
            number * layer / 2**20, 1e-3
        )
    assert "Host memory" not in describe(run_of("quickstart", 1))
