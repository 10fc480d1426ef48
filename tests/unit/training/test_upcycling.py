"""Upcycling: experts that begin as copies of a dense model's MLPs compute what it did; parts of MLPs likewise."""

from pathlib import Path

import pytest

from megatron_lite.errors import ConfigError
from tests.unit.training.test_loop import MOCK, lines, run

FP64 = ["--fp64", "--eval-iters", "0", "--log-interval", "1", "--num-layers", "2"]
UPCYCLE = ["--moe-use-upcycling", "--num-experts", "4"]
HALVES = ["--moe-upcycling-granularity", "2", "--moe-ffn-hidden-size", "32"]
K1 = ["--moe-router-topk", "1"]


@pytest.fixture
def dense(monkeypatch, tmp_path):
    """A folder with a dense model, gated and with biases, trained for two steps; then its losses at a third."""

    def make(*words: str) -> Path:
        path = tmp_path / "dense"
        line = [*MOCK, *FP64, *words, "--save", str(path), "--save-interval", "2", "--train-iters", "2"]
        run(monkeypatch, *line)
        return path

    return make


def first_loss(monkeypatch, path: Path, dense: Path, *words: str) -> float:
    """The loss of the first step of a run that starts from the weights of a dense one."""
    line = [*MOCK, *FP64, "--pretrained-checkpoint", str(dense), "--train-iters", "1", "--metrics-jsonl", str(path)]
    run(monkeypatch, *line, *words)
    return lines(path)[0]["lm_loss"]


@pytest.mark.parametrize(
    ("shape", "experts"),
    [
        ([], []),
        (["--swiglu", "--disable-bias-linear"], ["--moe-router-topk", "3"]),
        pytest.param(["--swiglu"], ["--moe-layer-freq", "[0,1]"], marks=pytest.mark.full),
        pytest.param(
            ["--swiglu", "--position-embedding-type", "rope", "--mtp-num-layers", "2"], [], marks=pytest.mark.full
        ),
        pytest.param(
            ["--swiglu"],
            ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"],
            marks=pytest.mark.full,
        ),
        pytest.param(
            [],
            ["--moe-router-score-function", "sigmoid", "--moe-router-topk-scaling-factor", "2.5"],
            marks=pytest.mark.full,
        ),
        pytest.param([], ["--moe-router-pre-softmax", "--moe-router-topk", "4"], marks=pytest.mark.full),
        pytest.param(["--swiglu"], HALVES, marks=pytest.mark.full),
        ([], [*HALVES, "--moe-router-topk", "4"]),
        pytest.param([], ["--moe-router-score-function", "sqrtsoftplus"], marks=pytest.mark.full),
        pytest.param(
            [], ["--moe-router-load-balancing-type", "sinkhorn", "--moe-router-topk", "4"], marks=pytest.mark.full
        ),
        (["--swiglu"], [*HALVES, "--moe-router-num-groups", "2", "--moe-router-group-topk", "1"]),
    ],
)
def test_the_loss_is_that_of_the_dense_model(monkeypatch, tmp_path, dense, trained, shape, experts):
    """Weights with a constant sum over copies of one MLP, or over its parts, change nothing, whatever the router.

    Mutations: parts taken by e // N instead of e % N, a bias that each part adds whole, gates and ups of different
    parts (rows split after reordering), no scale with a factor on the scores: another loss.
    """
    compare_losses(monkeypatch, tmp_path, dense, trained, shape, experts)


@pytest.mark.parametrize(
    ("shape", "experts"),
    [
        ([], ["--moe-router-pre-softmax"]),
        (["--swiglu"], [*HALVES, "--moe-router-load-balancing-type", "sinkhorn"]),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ([], [*K1, "--moe-router-pre-softmax", "--moe-router-topk-scaling-factor", "2.5"]),
                (["--swiglu"], [*HALVES, "--moe-router-pre-softmax"]),
                ([], [*K1, "--moe-router-score-function", "sigmoid"]),
                ([], [*K1, "--moe-router-score-function", "sigmoid", "--moe-router-topk-scaling-factor", "2.5"]),
                ([], [*K1, "--moe-router-score-function", "sqrtsoftplus"]),
                ([], [*K1, "--moe-router-load-balancing-type", "sinkhorn"]),
                ([], ["--moe-router-load-balancing-type", "sinkhorn"]),
            )
        ),
    ],
)
def test_weights_that_depend_on_logits_sum_to_one_at_zero(monkeypatch, tmp_path, dense, trained, shape, experts):
    """With rows of the router that are zero.

    Mutation: taking a softmax before the choice for the only weighing that does not sum to 1.
    """
    compare_losses(monkeypatch, tmp_path, dense, trained, shape, [*experts, "--init-method-std", "0"])


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[Path, float]]:
    """Shape of a dense model -> its folder, and its loss in the third step."""
    return {}


def compare_losses(monkeypatch, tmp_path, dense, trained, shape, experts):
    """Of a dense model, and of the same one upcycled."""
    shape = [*shape, "--ffn-hidden-size", "64"]
    name = " ".join(shape)
    if name not in trained:
        folder = dense(*shape)
        trained[name] = folder, first_loss(monkeypatch, tmp_path / "a.jsonl", folder, *shape)
    folder, wanted = trained[name]
    found = first_loss(monkeypatch, tmp_path / "b.jsonl", folder, *shape, *UPCYCLE, *experts)
    assert found == pytest.approx(wanted, rel=1e-12)


def test_a_run_that_was_upcycled_goes_on_from_its_own_checkpoints(monkeypatch, tmp_path, dense, capsys):
    """Mutation: upcycle whenever the flag is set; the second run starts from the dense model again."""
    folder, path = dense(), tmp_path / "moe"
    line = [*MOCK, *FP64, *UPCYCLE, "--save", str(path), "--save-interval", "2"]
    begin = [*line, "--load", str(path), "--pretrained-checkpoint", str(folder)]
    run(monkeypatch, *begin, "--train-iters", "4", "--exit-interval", "2")
    assert "upcycled the dense model" in capsys.readouterr().out
    run(monkeypatch, *begin, "--train-iters", "4")
    assert "upcycled the dense model" not in capsys.readouterr().out
    assert (path / "iter_0000004").exists()
    with pytest.raises(ConfigError, match=f"--load {path} --pretrained-checkpoint {folder}"):
        run(monkeypatch, *line, "--load", str(folder), "--train-iters", "4")


def test_the_dense_model_may_be_named_by_load(monkeypatch, tmp_path, dense, capsys):
    """As in Megatron-LM: --load DENSE --save ELSEWHERE; iterations count from 0."""
    folder = dense()
    line = [*MOCK, *FP64, *UPCYCLE, "--load", str(folder), "--metrics-jsonl", str(tmp_path / "m.jsonl")]
    run(monkeypatch, *line, "--train-iters", "1")
    assert "upcycled the dense model" in capsys.readouterr().out
    assert [entry["iteration"] for entry in lines(tmp_path / "m.jsonl")] == [1]


def test_another_architecture_is_told_by_name(monkeypatch, dense):
    folder = dense("--ffn-hidden-size", "32")
    with pytest.raises(Exception, match=r"mlp.linear_fc1.weight: \[32, 16\] in the checkpoint, \[64, 16\] in this run"):
        run(monkeypatch, *MOCK, *FP64, *UPCYCLE, "--load", str(folder), "--train-iters", "1")
