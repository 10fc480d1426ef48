"""pretrain_gpt.py with experts, from configs/quickstart_moe.yaml: it trains, resumes and changes its layout."""

import json

import pytest

from tests.e2e.commands import TINY, pretrain, training_metrics
from tests.requirements import needs_compiler

pytestmark = pytest.mark.e2e
NUMBERS = ("lm_loss", "grad_norm", "learning_rate", "consumed_samples")
BALANCE = ("load_balancing_loss", "moe_balance", "moe_entropy", "moe/load_balancing_loss_layer_1")
SHORT = ["--config", "configs/quickstart_moe.yaml", "--mock-data", "--num-workers", "0", "--vocab-size", "1000"]
SHORT += ["--num-layers", "2", "--moe-layer-freq", "[0,1]", "--hidden-size", "64", "--ffn-hidden-size", "128"]
SHORT += ["--moe-ffn-hidden-size", "64", "--seq-length", "64", "--micro-batch-size", "4"]


def balance(path) -> dict[int, list[float]]:
    """Iteration -> statistics of the log interval that ends there."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {entry["iteration"]: [entry[name] for name in BALANCE] for entry in entries if "moe_balance" in entry}


@pytest.mark.full
def test_experts_train_resume_and_reshard(tmp_path):
    """EP 2: the loss falls, balance is reported, a resumed run is equal bit for bit. EP 2 -> 1 -> 4: equal in float64.

    With an expert bias, which a checkpoint holds, and an evaluation on the way, which counts nothing.
    Mutations: a bias that is not saved, statistics summed over data parallel ranks only, or balance losses divided by
    the world size instead of the data parallel size make the later iterations differ.
    """
    shared = [
        *SHORT,
        "--fp64",
        "--train-iters",
        "12",
        "--log-interval",
        "2",
        "--eval-interval",
        "3",
        "--eval-iters",
        "1",
    ]
    shared += ["--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid", "--lr-warmup-fraction", "0"]
    saving = ["--save", str(tmp_path / "two"), "--save-interval", "4"]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("two", "resumed", "one", "four")}
    output = pretrain(2, *shared, *saving, "--metrics-jsonl", str(files["two"]))
    assert "8 experts in 1 layers: expert parallel 2 x expert tensor 1 (alltoall)" in output
    assert "grouped products: loop" in output  # in float64
    assert "| load_balancing_loss: " in output
    assert "| experts: fullest / mean " in output
    again = [*shared, "--load", str(tmp_path / "two"), "--ckpt-step", "4", "--save-interval", "100"]
    pretrain(2, *again, "--metrics-jsonl", str(files["resumed"]))
    other = ["--save", str(tmp_path / "one"), "--save-interval", "4", "--exit-interval", "8"]
    pretrain(1, *again, *other, "--expert-model-parallel-size", "1", "--metrics-jsonl", str(files["one"]))
    last = [*shared, "--load", str(tmp_path / "one"), "--expert-model-parallel-size", "4", "--save-interval", "100"]
    pretrain(4, *last, "--metrics-jsonl", str(files["four"]))

    two, resumed, one, four = (training_metrics(path, *NUMBERS) for path in files.values())
    assert resumed == two[4:]
    assert [entry[0] for entry in one] + [entry[0] for entry in four] == list(range(5, 13))
    for (iteration, *found), (_, *wanted) in zip(one + four, two[4:], strict=True):
        assert found == pytest.approx(wanted, rel=1e-9), f"iteration {iteration}"
    wanted_balance = balance(files["two"])
    assert list(wanted_balance) == [1, 2, 4, 6, 8, 10, 12]
    for iteration, values in (balance(files["one"]) | balance(files["four"])).items():
        assert values == pytest.approx(wanted_balance[iteration], rel=1e-9), f"iteration {iteration}"
    assert two[-1][1] < two[0][1] - 0.1


@pytest.mark.full
def test_upcycled_over_expert_parallel_ranks(tmp_path):
    """A dense run at TP 2, upcycled at EP 2 x FSDP 2 with parts of MLPs: the loss of the dense model's next step.

    Mutation: fill each rank's experts as if they began with number 0.
    """
    dense = [*TINY, "--fp64", "--swiglu", "--train-iters", "3"]
    saving = ["--save", str(tmp_path / "dense"), "--save-interval", "3"]
    pretrain(2, *dense, *saving, "--tensor-model-parallel-size", "2")
    begin = [*TINY, "--fp64", "--swiglu", "--train-iters", "1", "--pretrained-checkpoint", str(tmp_path / "dense")]
    experts = [
        "--moe-use-upcycling",
        "--num-experts",
        "8",
        "--moe-router-topk",
        "4",
        "--moe-upcycling-granularity",
        "2",
    ]
    experts += ["--moe-ffn-hidden-size", "32", "--expert-model-parallel-size", "2", "--use-torch-fsdp2"]
    pretrain(1, *begin, "--metrics-jsonl", str(tmp_path / "a.jsonl"))
    output = pretrain(4, *begin, *experts, "--metrics-jsonl", str(tmp_path / "b.jsonl"))
    assert "became 8 experts each (granularity 2)" in output
    wanted, found = (training_metrics(tmp_path / name, "lm_loss")[0][1] for name in ("a.jsonl", "b.jsonl"))
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--compile"], id="compile", marks=[pytest.mark.full, needs_compiler]),
        pytest.param(["--bf16", "--moe-layer-recompute"], id="bf16-recompute"),
    ],
)
def test_modes_train_with_experts(tmp_path, flags):
    """Each mode runs to its end on two ranks and lowers the loss."""
    path = tmp_path / "m.jsonl"
    words = ["--num-experts", "4", "--expert-model-parallel-size", "2", "--moe-aux-loss-coeff", "1e-2"]
    pretrain(2, *TINY, *words, *flags, "--train-iters", "12", "--metrics-jsonl", str(path))
    metrics = training_metrics(path, "lm_loss")
    assert len(metrics) == 12
    assert metrics[-1][1] < metrics[0][1] - 0.1
