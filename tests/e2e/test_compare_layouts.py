"""tools/compare_layouts.py: correct layouts are equal to rounding, and a mistake is found where it is made."""

import re

import pytest
import torch

from megatron_lite.arguments import RunConfig, read_settings
from megatron_lite.training.comparison import PRECISIONS, Comparison, LayoutRecord, compare
from megatron_lite.training.initialize import initialize_parallel_groups, set_random_seed
from megatron_lite.training.recording import record_run
from tests.e2e.commands import TINY
from tests.parallel.mutations import mutation
from tests.parallel.pool import WorkerPool
from tools import compare_layouts as tool

pytestmark = pytest.mark.e2e
SHARED = [*TINY, "--train-iters", "3", "--init-method-std", "0.2"]
TP, PP = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.1 --moe-router-enable-expert-bias"
EXPERTS += " --moe-router-score-function sigmoid"


def configuration(flags: str) -> RunConfig:
    """As the tool's ranks make it."""
    settings = read_settings([*SHARED, *flags.split()])
    tool.force(settings, "fp64")
    config = tool.configure(settings, None)
    assert tool.violations(settings, config) == []
    config.freeze()
    return config


def record(rank: int, world_size: int, flags: str, broken: str | None) -> LayoutRecord | None:
    """What the ranks of the tool do, with the product broken on purpose."""
    config = configuration(flags)
    initialize_parallel_groups(config)
    set_random_seed(config.rng.seed)
    with mutation(broken):
        return record_run(config, torch.device("cpu"), 2, PRECISIONS["fp64"].bound)


def compared(pool: WorkerPool, left: str, right: str, broken: str | None = None) -> Comparison:
    """Both layouts, the left one broken."""
    records = []
    for flags, how in ((left, broken), (right, None)):
        ranks = configuration(flags).world_size
        records.append(pool.run(record, flags, how, world_size=ranks)[0])
    return compare(*records, PRECISIONS["fp64"])


@pytest.mark.full
def test_tensor_and_pipeline_parallelism_are_equal(capfd: pytest.CaptureFixture[str]) -> None:
    """As a user calls it; dropout is switched off with a word about it."""
    status = tool.main([*SHARED, "--hidden-dropout", "0.1", "--left", TP, "--right", PP])
    output = capfd.readouterr().out
    assert status == 0, output
    assert "note: hidden_dropout is 0.1 in this configuration, but 0.0 in the comparison" in output
    assert (
        " left | megatron_lite on 2 ranks (cpu, 1 threads a rank), float64: tensor 2 with sequence x data 1" in output
    )
    assert "right | step 2 of 2: loss" in output
    assert "initial weights: equal bit for bit" in output
    assert "outputs in step 1: all 11 agree" in output
    assert "gradients of step 1: 0 of 28 differ" in output
    assert "weights after 2 steps: 0 of 28 differ" in output
    assert output.endswith("verdict: equal to rounding\n")
    assert len(re.findall(r"^(?:loss|gradient norm), step [12] .* \d\.\de[+-]\d\d$", output, re.MULTILINE)) == 4


@pytest.mark.full
def test_other_initial_weights_are_found_at_the_embedding(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the tool says of it, with ranks that are up already."""
    monkeypatch.setattr(tool, "run_side", lambda side, *_: pool.run(record, " ".join(side.own), None, world_size=1)[0])
    status = tool.main([*SHARED, "--left=", "--right", "--init-method-std 0.1"])
    output = capfd.readouterr().out
    assert status == 1
    assert "initial weights: 10 parameters differ: embedding.word_embeddings.weight, " in output
    assert re.search(r"first output that differs in step 1: [\d.e-]+ in embedding \(most in sample \d", output)
    assert "before it 1 agree; largest deviation: 0.0e+00 in the tokens read" in output
    assert output.endswith("verdict: DIFFERENT\n")


CONTEXT = f"--context-parallel-size 2 {TP} --recompute-granularity full --recompute-method uniform"
CONTEXT += " --recompute-num-layers 1 --reset-attention-mask"
SHORT = "--seq-length 30 --make-vocab-size-divisible-by 50"  # the vocabulary is padded to 150, with TP 2 to 200
DEEP = "--num-layers 4 --untie-embeddings-and-output-weights"
FURTHER = "--position-embedding-type rope --mtp-num-layers 2 --reset-attention-mask"
EQUAL = {
    "experts": (f"{EXPERTS} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall", EXPERTS),
    "context": (CONTEXT, f"--use-torch-fsdp2 {PP} --reset-attention-mask"),
    "padding": (f"{SHORT} --pad-to-multiple --context-parallel-size 2", f"{SHORT} --tensor-model-parallel-size 2"),
    "further": (f"{FURTHER} --context-parallel-size 2 {TP}", f"{FURTHER} {PP} --make-vocab-size-divisible-by 50"),
    "stages": (f"{DEEP} {PP} --pipeline-schedule zbv", f"{DEEP} --micro-batch-size 4"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in ("context", "further") else ()) for name in EQUAL]
)
def test_layouts_are_equal(pool: WorkerPool, name: str) -> None:
    """Mutations: numbers of tokens split over tensor parallel ranks before context parallel ones, recomputed layers
    recorded twice, padding compared too, the first stage's chunk alone listened to, the embedding's second call
    recorded as its first."""
    comparison = compared(pool, *EQUAL[name])
    assert comparison.is_rounding, comparison


@pytest.mark.parametrize(
    ("broken", "layout", "first"),
    [
        ("documents_joined", "--context-parallel-size 2 --reset-attention-mask", "decoder.layers.0.self_attention"),
        (
            "local_softmax_denominator",
            "--tensor-model-parallel-size 2 --reset-attention-mask",
            "the loss of each token",
        ),
        ("norms_not_summed", f"{TP} --reset-attention-mask", None),
        ("future_shifted_after_split", f"{FURTHER} --context-parallel-size 2", "mtp.layers.0"),
    ],
)
def test_a_mistake_is_found_where_it_is_made(pool: WorkerPool, broken: str, layout: str, first: str | None) -> None:
    """One in the forward pass at the first output, one of the backward pass in the gradients alone."""
    plain = FURTHER if broken.startswith("future") else "--reset-attention-mask"
    comparison = compared(pool, layout, plain, broken)
    assert not comparison.is_rounding
    found = comparison.first_difference
    assert (found and found.name) == first
    if broken == "norms_not_summed":
        differing = [one.name for one in comparison.gradients if one.value > 1e-9]
        assert len(differing) == 10  # two norms in each of two layers and the final one, weight and bias
        assert all("layernorm" in name for name in differing)
        assert "should hold equal copies of decoder.layers.0.input_layernorm.weight" in comparison.unequal[0]


BAD: dict[str, tuple[list[str], list[str]]] = {
    "flags": (
        ["--left", "--tensor-model-parallel-size 3 --foo", "--right", "--micro-batch-size 3", "--steps", "0"],
        [
            "--steps is 0, but must be at least 1",
            "left: --foo is not a flag",
            "left: num_attention_heads is 4, but it must be a multiple of tensor_model_parallel_size (3)",
            "right: global_batch_size is 8 after 0 samples, but it must be a multiple of micro_batch_size (3)",
        ],
    ),
    "ranks": (
        ["--left", "'", "--right", "--tensor-model-parallel-size 2", "--right-ranks", "3"],
        ['left: "\'" cannot be split into words', "right: world_size is 3, but must be a multiple of"],
    ),
    "data": (
        ["--left", "", "--right", "--seq-length 16 --global-batch-size 16", "--steps", "4"],
        [
            "seq_length is 32 on the left and 16 on the right",
            "left: --steps is 4, but the run ends after 3: write --train-iters 4 or more.",
            "the global batch has 8 samples on the left and 16 on the right",
        ],
    ),
    "others": (
        ["--dry-run", "--left", "--world-size 2", "--right", "--expert-model-parallel-size 2"],
        [
            "left: --dry-run is given, but layouts are run here: leave it out.",
            "left: --world-size is 2, but the number of ranks is told by --left-ranks and --right-ranks.",
            "right: expert_model_parallel_size is 2, but there are no experts to distribute",
        ],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_anything_starts(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    words, sentences = BAD[name]
    assert tool.main([*SHARED, *words]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert [sentence for sentence in sentences if sentence not in captured.err] == []


def test_a_layout_that_fails_ends_the_comparison(capfd: pytest.CaptureFixture[str]) -> None:
    """What only the ranks can find out: here that there is no such file."""
    words = ["--train-data-path", "nowhere", "--left", "", "--right", "--context-parallel-size 2"]
    without_mock = [word for word in SHARED if word != "--mock-data"]
    assert tool.main([*without_mock, *words]) == 2
    captured = capfd.readouterr()
    assert " left | compare_layouts.py: " in captured.out
    assert "nowhere" in captured.out
    assert captured.err == "compare_layouts.py: the left layout ended with status 1; its last words are above.\n"
    assert "right" not in captured.out
