"""pretrain_gpt.py with pipeline stages, from the quickstart files: it trains, resumes and changes its layout."""

import pytest

from tests.e2e.commands import TINY, pretrain, training_metrics

pytestmark = pytest.mark.e2e
NUMBERS = ("lm_loss", "grad_norm", "learning_rate", "consumed_samples")
SHORT = ["--mock-data", "--num-workers", "0", "--vocab-size", "500", "--hidden-size", "64", "--ffn-hidden-size", "128"]
SHORT += ["--seq-length", "64", "--micro-batch-size", "2", "--global-batch-size", "16", "--lr-warmup-fraction", "0"]
SHORT += ["--train-iters", "8", "--log-interval", "1", "--eval-iters", "1", "--eval-interval", "4", "--fp64"]
DENSE = ["--config", "configs/quickstart.yaml", *SHORT]
EXPERTS = ["--config", "configs/quickstart_moe.yaml", *SHORT, "--moe-ffn-hidden-size", "64"]
EXPERTS += ["--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"]


def train_and_move(
    folder,
    model: list[str],
    layout: list[str],
    others: dict[str, tuple[int, list[str]]],
    names: tuple[str, ...] = NUMBERS,
) -> str:
    """Train at `layout`, on four ranks, and go on from its checkpoint at others, one after the other."""
    saving = ["--save", str(folder / "first"), "--save-interval", "4"]
    files = {name: folder / f"{name}.jsonl" for name in ("first", *others)}
    output = pretrain(4, *model, *layout, *saving, "--metrics-jsonl", str(files["first"]))
    begin = [*model, "--load", str(folder / "first"), "--ckpt-step", "4", "--save-interval", "2"]
    for number, (name, (ranks, flags)) in enumerate(others.items()):
        end = [] if number == len(others) - 1 else ["--exit-interval", "6"]
        saving = ["--save", str(folder / name), *end, "--metrics-jsonl", str(files[name])]
        pretrain(ranks, *begin, *flags, *saving)
        begin = [*model, "--load", str(folder / name), "--save-interval", "2"]

    first, *parts = (training_metrics(path, *names) for path in files.values())
    moved = [entry for part in parts for entry in part]
    assert [entry[0] for entry in moved] == [5, 6, 7, 8]
    for (iteration, *found), (_, *wanted) in zip(moved, first[4:], strict=True):
        assert found == pytest.approx(wanted, rel=1e-9), f"iteration {iteration}"
    assert first[-1][1] < first[0][1] - 0.1
    return output


@pytest.mark.full
def test_stages_train_resume_and_move(tmp_path):
    """PP 2 x TP 2, then four chunks in a V on two ranks with FSDP: equal in float64.

    Tied embeddings, eight micro-batches, evaluation on the way. Mutations:
    after loading, leave the copy of the embeddings as it was initialized (in the V), or the moments of the copy.
    """
    layout = ["--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "2"]
    v_shaped = ["--pipeline-model-parallel-size", "2", "--pipeline-schedule", "zbv", "--use-torch-fsdp2"]
    output = train_and_move(tmp_path, DENSE, layout, {"v": (4, v_shaped)})
    assert "tensor 2 with sequence x pipeline 2 (1f1b) x data 1" in output
    assert "pipeline rank 1: stage 1 (layers 3 to 4, loss)" in output
    assert "2-way pipeline parallel" in output


@pytest.mark.full
def test_dropout_goes_on_in_every_stage(tmp_path):
    """A V on two ranks, with both dropouts: resumed, bit for bit. Another schedule draws in another order, and says so.

    Mutations: streams that are not saved; a checkpoint that does not tell schedules apart.
    """
    words = [*TINY, "--num-layers", "4", "--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--train-iters", "6"]
    words += ["--pipeline-model-parallel-size", "2"]
    v_shaped = ["--pipeline-schedule", "zbv"]
    files = [tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"]
    saving = ["--save", str(tmp_path / "v"), "--save-interval", "3", "--metrics-jsonl", str(files[0])]
    pretrain(2, *words, *v_shaped, *saving)
    resuming = [*words, "--load", str(tmp_path / "v"), "--ckpt-step", "3"]
    pretrain(2, *resuming, *v_shaped, "--metrics-jsonl", str(files[1]))
    whole, resumed = (training_metrics(path, *NUMBERS) for path in files)
    assert resumed == whole[3:]
    output = pretrain(2, *resuming, "--exit-interval", "4")
    assert "saved at another layout (stages 2 a rank, zbv -> 1 a rank, 1f1b); seeded anew" in output


@pytest.mark.full
def test_stages_with_experts_train_resume_and_move(tmp_path):
    """PP 2 x EP 2, then interleaved chunks at EP 1, then EP 4: equal in float64, expert bias and balance losses too.

    Mutation: statistics of the experts of one stage alone.
    """
    layout = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    chunks = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    chunks += ["--expert-model-parallel-size", "1"]
    others = {"chunks": (2, chunks), "four": (4, ["--expert-model-parallel-size", "4"])}
    balance = ("moe_balance", "load_balancing_loss", "moe/entropy_layer_3")
    train_and_move(tmp_path, EXPERTS, layout, others, (*NUMBERS, *balance))
