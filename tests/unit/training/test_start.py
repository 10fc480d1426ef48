"""What a run finds out before its first step: places it cannot write to, data it cannot use, a changed checkpoint."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.arguments import parse_args
from megatron_lite.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_lite.errors import ConfigError
from megatron_lite.training import setup, train
from megatron_lite.training.hooks import Hook
from megatron_lite.training.initialize import _choose_deterministic_kernels, _queues
from pretrain_gpt import pretrain

TINY = [
    *("--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"),
    *("--vocab-size", "64", "--micro-batch-size", "2", "--tokenizer-type", "NullTokenizer", "--lr", "1e-3"),
    *("--train-iters", "2", "--eval-iters", "0"),
]
MOCK = ["--mock-data", "--num-workers", "0"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*line: str) -> None:
    pretrain(parse_args([*TINY, *line]))


@pytest.mark.parametrize(
    "flags",
    [("--save", "{}/file/x", "--save-interval", "5"), ("--metrics-jsonl", "{}"), ("--tensorboard-dir", "{}/file")],
)
def test_places_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{flags[0][2:].replace('-', '_')} is .*another"):
        run(*MOCK, *(word.format(tmp_path) for word in flags))
    assert "iteration " not in capsys.readouterr().out


def test_a_backend_that_the_device_lacks() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend is fused.*write auto"):
        run(*MOCK, "--attention-backend", "fused")


@pytest.mark.parametrize("flags", [(), ("--disable-bf16-reduced-precision-matmul",)])
def test_sums_of_16_bit_products_are_in_float32_while_the_run_lasts(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Mutations: leave fp16's setting alone, or the setting as it is when the run ends."""
    matmul, seen = torch.backends.cuda.matmul, []

    def settings() -> tuple[bool, bool]:
        return matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction

    def witness(*_: object) -> list[Hook]:
        seen.append(settings())
        return []

    monkeypatch.setattr(setup, "build_hooks", witness)
    before = settings()
    assert all(before), "torch's default has changed"
    run(*MOCK, *flags)
    assert seen == [(not flags, not flags)]
    assert settings() == before


def test_copies_of_weights_are_compared_at_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: leave out the line in train()."""
    compared = []
    monkeypatch.setattr(train, "verify_all_replicas", compared.append)
    run(*MOCK, "--train-iters", "5", "--check-weight-hash-across-dp-replicas-interval", "2")
    assert len(compared) == 2


def corpus(folder: Path, largest: int, documents: int = 20, name: str = "data") -> str:
    """Documents of 40 ids up to `largest`."""
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"))
    for _ in range(documents):
        builder.add_document([*range(39), largest], [40])
    builder.finalize(str(folder / f"{name}.idx"))
    return str(folder / name)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_ids_beyond_the_vocabulary(tmp_path: Path, workers: str) -> None:
    """On a GPU the embedding would end the process, and within the padding of the vocabulary nothing would happen."""
    path = corpus(tmp_path, 64)
    with pytest.raises(ConfigError) as caught:
        run("--data-path", path, "--split", "1", "--num-workers", workers)
    assert str(caught.value).startswith(f"{path} holds the token 64, but the vocabulary has 64 ids")
    run("--data-path", path, "--split", "1", "--num-workers", "0", "--vocab-size", "65")


def test_splits_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus(tmp_path, 9)
    with pytest.raises(ConfigError, match="training split is empty"):
        run("--data-path", path, "--split", "0,1,0", "--num-workers", "0")
    run("--data-path", path, "--split", "1", "--num-workers", "0", "--eval-iters", "1", "--eval-interval", "1")
    assert "there are no validation data" in capsys.readouterr().out
    run("--data-path", f"{path}.bin", "--num-workers", "0", "--eval-iters", "1", "--eval-interval", "1")
    said = capsys.readouterr().out
    assert f"note: no test data from {path}: too few documents for a share (--split '969, 30, 1')" in said
    assert said.count("note: no ") == 1 + ("no validation data" in said)


def test_a_blend_without_weights_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each remedy is run as it is printed. Mutations: leave out the check, or the weights."""
    folder, few = tmp_path, ("--num-workers", "0", "--train-iters", "60")
    blend = ["--data-path", corpus(folder, 9, 20, "a"), corpus(folder, 8, 10, "b"), "--split", "1"]
    with pytest.raises(ConfigError) as caught:
        run(*blend, *few)
    assert "iteration " not in capsys.readouterr().out
    message = str(caught.value)
    assert message.startswith("the train split has 73 samples, but the run reads 120, and a blend without weights")
    weights = re.search(r"with weights, (--data-path [^,]+), or", message)
    length = re.search(r"after one epoch, (--train-iters \d+)\.", message)
    assert weights is not None
    assert length is not None
    assert length[1] == "--train-iters 36"
    run(*blend, *few, *weights[1].split())
    assert "iteration       60/      60" in capsys.readouterr().out
    run(*blend, *few, *length[1].split())
    assert "iteration       36/      36" in capsys.readouterr().out
    run(*blend, *few, "--dataloader-type", "cyclic")


def test_a_blend_without_weights_that_is_too_short_to_evaluate(tmp_path: Path) -> None:
    blend = [word for name in ("a", "b") for word in (corpus(tmp_path, 9, 20, name),)]
    words = ("--train-data-path", *blend, "--valid-data-path", *blend, "--num-workers", "0")
    with pytest.raises(ConfigError, match=r"the valid split has 98 samples, but the run reads 300.*--eval-iters 16\."):
        run(*words, "--eval-interval", "1", "--eval-iters", "50")
    run(*words, "--eval-interval", "1", "--eval-iters", "16")


def test_settings_that_changed_since_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    run(*MOCK, "--save", folder, "--save-interval", "2", "--window-size", "4,0")
    again = [*MOCK, "--load", folder, "--window-size", "4,0"]
    run(*again)
    assert "WARNING" not in capsys.readouterr().out
    run(*again, "--num-attention-heads", "1", "--seed", "7")
    out = capsys.readouterr().out
    assert "WARNING: num_attention_heads is 1, but the weights were trained with 2." in out
    assert "WARNING: seed is 7, but the samples so far were drawn with 1234." in out
    run(*again, "--finetune", "--seed", "7")
    assert "WARNING" not in capsys.readouterr().out


def test_sinkhorn_weighs_experts_in_its_own_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another balance loss is no other model. Mutation: compare the types as they are, or not at all."""
    folder, experts = str(tmp_path / "run"), [*MOCK, "--num-experts", "4", "--moe-router-load-balancing-type"]
    run(*experts, "aux_loss", "--save", folder, "--save-interval", "2")
    run(*experts, "none", "--load", folder)
    assert "WARNING" not in capsys.readouterr().out
    run(*experts, "sinkhorn", "--load", folder)
    expected = "WARNING: moe_router_load_balancing_type is sinkhorn, but the weights were trained with aux_loss."
    assert expected in capsys.readouterr().out


def test_pretrained_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pretrained_checkpoint is .* no checkpoint"):
        run(*MOCK, "--pretrained-checkpoint", str(tmp_path))


def test_a_profile_that_never_began(capsys: pytest.CaptureFixture[str]) -> None:
    run(*MOCK, "--profile")
    assert "nothing was profiled: no iteration 10 was run" in capsys.readouterr().out


def test_tensorboard_keeps_its_curves_on_resume(tmp_path: Path) -> None:
    """Those over samples too. Mutation: purge_step=first_iteration drops every point beyond that many samples."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = str(tmp_path / "run")
    words = [*MOCK, "--tensorboard-dir", folder, "--save", folder, "--load", folder, "--save-interval", "1"]
    run(*words, "--exit-interval", "1")
    run(*words)
    events = accumulator.EventAccumulator(folder)
    events.Reload()
    assert [point.step for point in events.Scalars("lm loss")] == [1, 2]
    assert [point.step for point in events.Scalars("lm loss vs samples")] == [2, 4]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "optimizer: torch fused adam · "),
        (("--optimizer", "muon"), "optimizer: muon (quintic, 5 steps), the rest torch fused adam · "),
        (
            ("--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16"),
            "optimizer: torch fused adam (moments stored in bf16 and fp32) · ",
        ),
    ],
    ids=["adam", "muon", "moments"],
)
def test_the_optimizer_is_named(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str) -> None:
    run(*MOCK, *flags)
    assert said in capsys.readouterr().out


def test_a_run_on_cpus_leaves_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch without CUDA raises where a context would be made. Saved, resumed, profiled, with random numbers.

    Mutations: `torch.cuda.is_available()` in the place of `computes_on_gpu()` in any of its uses, the GPU set by
    `initialize_torch_distributed`, or copies ahead of DCP's writer.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    begin = torch.utils.data.DataLoader.__init__

    def unpinned(self: Any, *arguments: Any, pin_memory: bool, **options: Any) -> None:
        assert not pin_memory
        begin(self, *arguments, **options)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", unpinned)
    words = ["--distributed-backend", "gloo", "--save", str(tmp_path), "--save-interval", "1", "--async-save"]
    words += ["--profile", "--profile-step-start", "1", "--record-memory-history", "--tensorboard-dir", str(tmp_path)]
    run(*MOCK, *words, "--hidden-dropout", "0.1", "--bf16", "--fp8-format", "hybrid")
    run(*MOCK, *words, "--train-iters", "3", "--load", str(tmp_path), "--override-opt_param-scheduler")


def test_deterministic_mode_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for every tensor that is made, and DeepEP refuses it. Mutation: torch's default, which is to fill."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        _choose_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("value", "strategy", "said"), [("1", "optim", True), ("1", "no_shard", False), ("8", "optim", False)]
)
def test_one_hardware_queue(monkeypatch: pytest.MonkeyPatch, value: str, strategy: str, said: bool) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
    assert ("unset it" in _queues(strategy)) == said
