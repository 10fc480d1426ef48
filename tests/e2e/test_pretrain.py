"""pretrain_gpt.py from the command line: layouts agree, killed runs continue."""

import itertools
import json
import random
import re
import time

import numpy as np
import pytest

from megatron_lite.datasets.indexed_dataset import IndexedDatasetBuilder
from tests.e2e.commands import (
    TINY,
    pretrain,
    pretrain_until,
    training_metrics,
)
from tests.requirements import needs_compiler

pytestmark = pytest.mark.e2e
END = 126  # of a document: the last id of the vocabulary of TINY
NUMBERS = ("lm_loss", "grad_norm", "learning_rate", "consumed_samples")


@pytest.mark.full
def test_four_ranks_equal_one_process(tmp_path):
    """The quickstart model at TP 2 x DP 2 (with sequence parallelism) and on one process: equal losses in float64.

    Mutation: finalize_model_grads that returns at once makes the first gradient norm differ.
    """
    shared = ["--config", "configs/quickstart.yaml", "--fp64", "--mock-data", "--train-iters", "8"]
    shared += ["--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128", "--seq-length", "64"]
    shared += ["--vocab-size", "1000", "--eval-iters", "1", "--num-workers", "0", "--save-interval", "1000"]
    pretrain(4, *shared, "--tensor-model-parallel-size", "2", "--metrics-jsonl", str(tmp_path / "a.jsonl"))
    pretrain(1, *shared, "--metrics-jsonl", str(tmp_path / "b.jsonl"))
    four, one = (training_metrics(tmp_path / name, "lm_loss", "grad_norm") for name in ("a.jsonl", "b.jsonl"))
    assert len(four) == len(one) == 8
    for (iteration, *found), (_, *wanted) in zip(four, one, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9), f"iteration {iteration}"
    assert one[-1][1] < one[0][1]


@pytest.mark.parametrize(
    "how",
    [pytest.param("", id="save"), pytest.param("--async-save", id="async save", marks=pytest.mark.full)],
)
def test_killed_runs_resume_bit_for_bit(tmp_path, request, how):
    """SIGKILLs at random moments, saves included; with dropout, so that every random stream has to continue.

    One each by default; --kills N for more. No checkpoint is lost that was announced as saved. Mutations: a load that
    does not restore the random number streams changes the losses after it; a save announced before it is durable.
    """
    kills = request.config.getoption("--kills")
    arguments = [*TINY, "--train-iters", str(30 + 15 * kills), "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    arguments += ["--lr-warmup-iters", "5", "--lr-decay-style", "cosine", "--eval-interval", "10"]
    pretrain(1, *arguments, "--metrics-jsonl", str(tmp_path / "whole.jsonl"))

    root, output = tmp_path / "ckpt", tmp_path / "output.txt"
    saving = ["--save", str(root), "--load", str(root), "--save-interval", "2", *how.split()]
    saving += ["--metrics-jsonl", str(tmp_path / "killed.jsonl"), "--keep-last-checkpoints", "3"]
    chance = random.Random(2024 + len(how))
    for kill in range(kills):
        deadly = _iteration(root) + chance.randrange(12)
        delay = chance.uniform(0.0, 0.1)

        def dies(deadly=deadly, delay=delay) -> bool:
            if _iteration(root) < deadly:
                return False
            time.sleep(delay)
            return True

        assert pretrain_until(dies, 1, *arguments, *saving, output=output), f"the run was over before kill {kill}"
        announced = re.findall(r"successfully saved checkpoint from iteration +(\d+)", output.read_text())
        assert _iteration(root) >= max(map(int, announced), default=0)
    assert _iteration(root) < 30 + 15 * kills
    pretrain(1, *arguments, *saving)
    whole, killed = (training_metrics(tmp_path / name, *NUMBERS) for name in ("whole.jsonl", "killed.jsonl"))
    assert killed == whole
    assert _validation(tmp_path / "killed.jsonl") == _validation(tmp_path / "whole.jsonl")


@pytest.mark.full
def test_saving_in_the_background_changes_nothing(tmp_path):
    """Two tensor parallel ranks: metrics equal bit for bit, and so is what follows from its checkpoint, verified."""
    arguments = [*TINY, "--tensor-model-parallel-size", "2", "--train-iters", "9", "--hidden-dropout", "0.1"]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("sync", "async", "resumed")}
    saving = ["--save-interval", "2", "--keep-last", "2", "--keep-every", "4"]
    pretrain(2, *arguments, *saving, "--save", str(tmp_path / "a"), "--metrics-jsonl", str(files["sync"]))
    saving += ["--async-save", "--save", str(tmp_path / "b")]
    output = pretrain(2, *arguments, *saving, "--metrics-jsonl", str(files["async"]))
    assert "saving checkpoint at iteration       8" in output
    assert output.index("successfully saved checkpoint from iteration       8") < output.index("validation loss")
    for name in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / name).glob("iter_*")) == [
            f"iter_{iteration:07d}" for iteration in (4, 8, 9)
        ]
    resuming = ["--load", str(tmp_path / "b"), "--ckpt-step", "4", "--verify-checkpoint"]
    output = pretrain(2, *arguments, *resuming, "--metrics-jsonl", str(files["resumed"]))
    assert " verified the checksums of 4 files" in output
    sync, background, resumed = (training_metrics(path, *NUMBERS) for path in files.values())
    assert background == sync
    assert resumed == sync[4:]


EVERYTHING = [
    *("--num-layers", "4", "--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-token-dispatcher-type", "alltoall", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--fp16", "--initial-loss-scale", "262144", "--loss-scale-window", "2", "--hysteresis", "1"),
    *("--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--rampup-batch-size", "4", "4", "16"),
    *("--train-samples", "56", "--lr-warmup-samples", "20", "--lr-decay-style", "cosine"),
]
AXES = {
    "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "context": ["--context-parallel-size", "2", "--cp-comm-type", "a2a"],
    "pipeline": ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
    "expert": ["--expert-model-parallel-size", "2"],
    "expert tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "2"],
    "data": ["--use-distributed-optimizer"],
    "shards": ["--data-parallel-sharding-strategy", "optim_grads_params"],
}


@pytest.mark.parametrize(
    "axis", ["four ranks", *(pytest.param(axis, marks=pytest.mark.full) for axis in ("all", *AXES))]
)
def test_every_axis_resumes_bit_for_bit(tmp_path, axis):
    """Half-precision with a moving loss scale, dropout, a growing batch, experts with a bias: after a resume every
    number is that of the uninterrupted run, and an iteration repeated for diagnosis gives its numbers too.

    By default tensor, pipeline and expert parallelism at once, on four ranks; with --full-matrix all axes, on eight,
    and each alone, on two. Mutations: loss scale or its count of good steps not saved; expert bias not saved; random
    streams of the first rank on all.
    """
    ranks, layout = 2, AXES.get(axis, [])
    if axis == "four ranks":
        ranks, layout = 4, [*AXES["tensor"], *AXES["pipeline"], *AXES["expert"], "--expert-tensor-parallel-size", "1"]
    if axis == "all":
        ranks, layout = 8, [*AXES["expert tensor"], *AXES["context"], *AXES["pipeline"], *AXES["expert"]]
        layout += AXES["shards"]
    arguments = [*TINY, *EVERYTHING, *layout]
    saving = ["--save", str(tmp_path / "ckpt"), "--save-interval", "3"]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("whole", "resumed")}
    pretrain(ranks, *arguments, *saving, "--metrics-jsonl", str(files["whole"]))
    loading = ["--load", str(tmp_path / "ckpt"), "--ckpt-step", "3", "--save-interval", "100"]
    pretrain(ranks, *arguments, *loading, "--metrics-jsonl", str(files["resumed"]))
    whole, resumed = (training_metrics(path, *NUMBERS, "loss_scale", "skipped") for path in files.values())
    assert resumed == whole[3:]
    assert len({numbers[-2] for numbers in whole[3:]}) > 1, "the loss scale does not move after the resume"
    assert whole[3][-2] != whole[0][-2], "the loss scale at the resume is that of the start"
    assert _validation(files["resumed"]) == _validation(files["whole"])

    output = pretrain(ranks, *arguments, *loading[:2], *saving, "--rerun-iteration", "6")
    assert "the passes agree bit for bit" in output
    assert f"pass 1: lm loss {whole[5][1]}, grad norm {whole[5][2]}\n" in output
    assert len(list((tmp_path / "ckpt").glob("rerun_0000006_rank*.json"))) == ranks


@pytest.mark.full
def test_resume_at_another_layout(tmp_path):
    """Ten iterations at TP 2, ten more at DP 2: the losses of an uninterrupted run on one process, in float64.

    Mutation: a load that leaves out the moments changes the losses after it.
    """
    arguments = [*TINY, "--fp64", "--train-iters", "20", "--qk-layernorm"]
    pretrain(1, *arguments, "--metrics-jsonl", str(tmp_path / "whole.jsonl"))
    saving = ["--save", str(tmp_path / "ckpt"), "--load", str(tmp_path / "ckpt"), "--save-interval", "10"]
    saving += ["--metrics-jsonl", str(tmp_path / "parts.jsonl")]
    pretrain(2, *arguments, *saving, "--tensor-model-parallel-size", "2", "--exit-interval", "10")
    pretrain(2, *arguments, *saving, "--use-distributed-optimizer")
    whole, parts = (
        training_metrics(tmp_path / name, "lm_loss", "grad_norm") for name in ("whole.jsonl", "parts.jsonl")
    )
    assert len(parts) == 20
    for (iteration, *found), (_, *wanted) in zip(parts, whole, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9), f"iteration {iteration}"


@pytest.mark.full
def test_context_parallel_run_resumes_and_reshards(tmp_path):
    """The quickstart model at TP 2 with SP x CP 2: resumed midway it goes on bit for bit, and at CP 1 on one process
    with the same losses in float64, evaluation included.

    Mutations: losses that are not summed over context parallel ranks (dp_cp_group without CP), and position ids
    counted anew on each rank, make CP 1 differ.
    """
    shared = ["--config", "configs/quickstart.yaml", "--fp64", "--mock-data", "--train-iters", "12"]
    shared += ["--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128", "--seq-length", "64"]
    shared += ["--vocab-size", "1000", "--eval-interval", "6", "--eval-iters", "1", "--num-workers", "0"]
    split = ["--context-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    saving = ["--save", str(tmp_path / "ckpt"), "--save-interval", "6"]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("whole", "resumed", "alone")}
    pretrain(4, *shared, *split, *saving, "--metrics-jsonl", str(files["whole"]))
    resuming = [*shared, "--load", str(tmp_path / "ckpt"), "--ckpt-step", "6", "--save-interval", "100"]
    pretrain(4, *resuming, *split, "--metrics-jsonl", str(files["resumed"]))
    pretrain(1, *resuming, "--metrics-jsonl", str(files["alone"]))
    whole, resumed, alone = (training_metrics(path, *NUMBERS) for path in files.values())
    assert len(whole) == 12
    assert resumed == whole[6:]
    assert _validation(files["resumed"]) == _validation(files["whole"])[1:]
    for (iteration, *found), (_, *wanted) in zip(alone, whole[6:], strict=True):
        assert found == pytest.approx(wanted, rel=1e-9), f"iteration {iteration}"
    assert _losses(files["alone"]) == pytest.approx(_losses(files["resumed"]), rel=1e-9)
    assert whole[-1][1] < whole[0][1]


@pytest.mark.full
@pytest.mark.parametrize(
    "flags",
    [
        ["--seq-length", "32", "--reset-position-ids"],
        ["--seq-length", "30", "--pad-to-multiple", "--no-calculate-per-token-loss"],
    ],
    ids=["documents", "padded"],
)
def test_documents_over_context_parallel_ranks(tmp_path, flags):
    """Short documents that do not see each other, at CP 2 and on one process (where nothing is padded): equal losses.

    Mutations: boundaries that are not moved by the padding of the rows before, micro-batches whose tokens are counted
    on one rank only or divided by data x context parallel size, documents that do not reach the model.
    """
    prefix = str(tmp_path / "short")
    _write_short_documents(prefix)
    arguments = [word for word in TINY if word != "--mock-data"] + flags
    arguments += ["--data-path", prefix, "--split", "90,10,0", "--eod-mask-loss", "--fp64", "--train-iters", "6"]
    arguments += ["--eval-interval", "3", "--position-embedding-type", "rope"]
    masked = [*arguments, "--reset-attention-mask"]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("two", "one", "unmasked")}
    pretrain(2, *masked, "--context-parallel-size", "2", "--metrics-jsonl", str(files["two"]))
    pretrain(1, *masked, "--metrics-jsonl", str(files["one"]))
    pretrain(1, *arguments, "--train-iters", "1", "--metrics-jsonl", str(files["unmasked"]))
    two, one, unmasked = (training_metrics(path, "lm_loss", "grad_norm") for path in files.values())
    assert len(two) == 6
    for (iteration, *found), (_, *wanted) in zip(two, one, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9), f"iteration {iteration}"
    assert _losses(files["two"]) == pytest.approx(_losses(files["one"]), rel=1e-9)
    assert unmasked[0][1] != pytest.approx(one[0][1], rel=1e-6), "the masks change nothing in these data"


def test_log_line_and_files(tmp_path):
    """The log line keeps the fields that Megatron's parsers look for; metrics and TensorBoard files are written."""
    output = pretrain(
        *(1, *TINY, "--train-iters", "4", "--log-throughput", "--eval-interval", "2", "--log-params-norm"),
        *("--log-num-zeros-in-grad", "--tensorboard-dir", str(tmp_path / "tb")),
        *("--metrics-jsonl", str(tmp_path / "m.jsonl")),
    )
    pattern = (
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+\] iteration        4/       4 \| consumed samples:           32 \| "
        r"elapsed time per iteration \(ms\): [\d.]+ \| throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \|.* "
        r"learning rate: \d\.\d{6}E[-+]\d\d \| global batch size:     8 \| lm loss: \d\.\d{6}E[-+]\d\d \| "
        r"loss scale: 1\.0 \| grad norm: [\d.]+ \|.* number of skipped iterations:   0 \| "
        r"number of nan iterations:   0 \|"
    )
    assert re.search(pattern, output), output
    assert "validation loss at iteration 2 | lm loss value: " in output
    assert "on test set" in output
    entries = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries if "lm_loss" in entry] == [1, 2, 3, 4]
    assert {"elapsed_ms", "tokens_per_second", "grad_norm", "params_norm", "num_zeros"} <= entries[0].keys()
    assert any("validation_loss" in entry for entry in entries)
    assert list((tmp_path / "tb").glob("events.*"))


def test_not_a_number_stops_and_keeps_the_weights(tmp_path):
    """A learning rate that explodes: the run stops by itself, says where, and saves nothing of that iteration."""
    output = pretrain(
        *(1, *TINY, "--train-iters", "200", "--lr", "1e30", "--clip-grad", "0", "--optimizer", "sgd"),
        *("--save", str(tmp_path / "ckpt"), "--save-interval", "1"),
        expect=1,
    )
    stopped = re.search(r"pretrain_gpt.py: iteration (\d+): lm loss (nan|inf), grad norm", output)
    assert stopped, output[-2000:]
    assert int((tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text()) < int(stopped[1])


@pytest.mark.parametrize(
    "mode",
    [
        "bf16",
        pytest.param("compile", marks=[pytest.mark.full, needs_compiler]),
        *(pytest.param(one, marks=pytest.mark.full) for one in ("fp16", "ramp-up", "recompute", "samples")),
    ],
)
def test_modes_train(tmp_path, mode):
    """Each mode runs to its end on one process and lowers the loss."""
    flags = {
        "bf16": ["--bf16"],
        "fp16": ["--fp16", "--initial-loss-scale", "65536"],
        "compile": ["--compile"],
        "recompute": [
            "--recompute-granularity",
            "full",
            "--recompute-method",
            "uniform",
            "--recompute-num-layers",
            "1",
        ],
        "ramp-up": ["--rampup-batch-size", "2", "2", "48"],
        "samples": [],
    }[mode]
    length = ["--train-samples", "96"] if mode in ("samples", "ramp-up") else ["--train-iters", "12"]
    path = tmp_path / "m.jsonl"
    pretrain(1, *TINY, *length, *flags, "--metrics-jsonl", str(path))
    metrics = training_metrics(path, "lm_loss", "consumed_samples")
    assert metrics[-1][1] < metrics[0][1] - 0.1
    assert metrics[-1][2] <= 96
    if mode == "ramp-up":
        steps = [later[2] - earlier[2] for earlier, later in itertools.pairwise(metrics)]
        assert (metrics[0][2], steps[-1]) == (2, 8)
        assert steps == sorted(steps)
    else:
        assert len(metrics) == 12


def _iteration(folder) -> int:
    """What the tracker says; 0 without one."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _write_short_documents(prefix: str) -> None:
    """A thousand documents of 1 to 12 tokens below 126, each with the NullTokenizer's end 126."""
    generator = np.random.default_rng(5)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for length in generator.integers(0, 12, 1000):
        builder.add_document(np.append(generator.integers(0, 126, length), END), [int(length) + 1])
    builder.finalize(f"{prefix}.idx")


def _validation(path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [(entry["iteration"], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]


def _losses(path) -> list[float]:
    """Those of all evaluations."""
    return [loss for _, loss in _validation(path)]
