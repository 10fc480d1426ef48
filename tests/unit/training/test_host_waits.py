"""Between log intervals nothing waits for the device: shown on a device that has no values, so that none can be read.

Tensors on torch's meta device have a shape and nothing else. `.item()`, `.tolist()`, `.cpu()`, `if tensor:`, a boolean
index, `nonzero`, `equal` raise there, in forward and backward alike. What raises nothing there but makes a GPU's host
wait is looked for by `NoBlockingCopies`: a copy to the device that is not non_blocking.

Allowed: what the tests of this file leave out or expect to raise. Tokens that travel between expert parallel ranks, or
are dropped by all-gathering ranks, are counted on the host (`--moe-pad-expert-input-to-capacity` needs no counts),
the grouped products of some backends (ops/grouped_linear.py) and `sinkhorn`, which ends when it has converged.
Compiled layers are whole graphs, in which reading a number is an error. FSDP2, pipeline schedules, fused SGD and
activations that go to the host do not run on the meta device; moments that the host keeps do (`ReachesHost`).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.context_parallel import ulysses
from megatron_lite.optimizer import get_megatron_optimizer
from megatron_lite.training import setup, train
from megatron_lite.training.batches import MicroBatchStream
from megatron_lite.training.initialize import initialize_parallel_groups, set_random_seed
from megatron_lite.training.metrics import IterationRecord, MetricsBuffer
from megatron_lite.training.progress import Progress
from megatron_lite.training.step import StepOutput, train_step

META = torch.device("meta")
SEQUENCE = 16
BASE = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", str(SEQUENCE)),
    *("--position-embedding-type", "rope", "--vocab-size", "64", "--tokenizer-type", "NullTokenizer", "--mock-data"),
    *("--micro-batch-size", "2", "--num-workers", "0", "--lr", "1e-3", "--train-iters", "9"),
]
EXPERTS = "--num-experts 4 --moe-grouped-gemm --bf16 --disable-bias-linear --moe-router-load-balancing-type aux_loss "
DROPPED = EXPERTS + "--moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.1 --moe-expert-capacity-factor 1.0 "


class NoBlockingCopies(TorchDispatchMode):
    """Fails where a tensor of the host goes to the device while the host waits.

    So does a number that one element is set to (`x[0] = 0.5`), which for a GPU is a tensor of the host; `fill_` passes
    it to the kernel. On the meta device it shows as a copy of a scalar tensor made for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number: torch.Tensor | None = None

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*arguments, **kwargs)
        if function is torch.ops.aten.scalar_tensor.default:
            self.number = result
        if function is torch.ops.aten.copy_.default:
            assert arguments[1] is not self.number, "an element set to a number, which is copied to the device"
        if function is torch.ops.aten._to_copy.default and leaves_host(arguments[0], result):
            assert kwargs.get("non_blocking"), f"a blocking copy of {tuple(result.shape)} to the device"
        if function is torch.ops.aten.copy_.default and leaves_host(arguments[1], arguments[0]):
            assert arguments[2:] == (True,) or kwargs.get("non_blocking"), "a blocking copy into the device"
        return result


class ReachesHost(TorchDispatchMode):
    """Lets copies from the device to the host be, which have no values; fails where the host waits for one."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and leaves_host(arguments[1], arguments[0], "meta", "cpu"):
            assert arguments[2:] == (True,), "a blocking copy to the host"
            return arguments[0]
        return function(*arguments, **(kwargs or {}))


def leaves_host(source: torch.Tensor, target: torch.Tensor, here: str = "cpu", there: str = "meta") -> bool:
    return source.device.type == here and target.device.type == there


@pytest.fixture(autouse=True)
def _meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the meta device stand for a GPU."""
    build, autocast, tensor = setup.build_model, torch.autocast, torch.tensor

    def without_values(transformer: Any, *arguments: Any, **options: Any) -> Any:
        return build(dataclasses.replace(transformer, perform_initialization=False), *arguments, **options)

    def on_host(*arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        assert device is None or torch.device(device).type == "cpu", "torch.tensor copies to the device, and waits"
        return tensor(*arguments, **options)

    monkeypatch.setattr(setup, "build_model", without_values)
    # It does not run on the meta device. Collectives of a fake group do nothing in any case.
    monkeypatch.setattr(setup, "wrap_data_parallel", lambda model, *_, **__: model)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **k: contextlib.nullcontext() if kind == "meta" else autocast(kind, **k)
    )
    monkeypatch.setattr(torch, "tensor", on_host)
    yield
    parallel_state.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()


def begin(words: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, Any, Any]:
    """Configuration, model chunks and optimizer of rank 0 of a fake world."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config = parse_args([*BASE, *words.split()])
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    initialize_parallel_groups(config)
    set_random_seed(1)
    with monkeypatch.context() as context:
        # The loss scale is made once.
        context.setattr(torch, "tensor", lambda *arguments, **options: torch.full((), *arguments, **options))
        chunks = setup.build_model(
            config.transformer,
            config.gpt,
            config.ddp,
            vocab_size=64,
            max_sequence_length=config.sequence_length,
            device=META,
            seed=1,
            compile_layers=False,
        )
        return config, chunks, get_megatron_optimizer(config.optimizer, chunks)


def one_step(words: str, monkeypatch: pytest.MonkeyPatch, world_size: int = 1) -> StepOutput:
    """Two steps of two micro-batches, of which the second is looked at: the first may fill caches."""
    config, chunks, optimizer = begin(words, world_size, monkeypatch)
    sample = {name: torch.zeros(2, SEQUENCE, dtype=torch.long) for name in ("tokens", "labels", "position_ids")}
    sample["loss_mask"] = torch.ones(2, SEQUENCE)
    if config.data.dataloader_inter_document_masking:
        sample["document_starts"] = torch.tensor([[0] * 5 + [5] * 11, [0] * SEQUENCE])
    cp_group = parallel_state.get_context_parallel_group()
    stream = MicroBatchStream([sample] * 4, META, cp_group, depths=config.transformer.mtp_num_layers or 0)

    def step() -> StepOutput:
        return train_step(
            chunks,
            optimizer,
            stream.next_global_batch(2),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            cp_group=cp_group,
            per_token_loss=config.transformer.calculate_per_token_loss,
            mtp_loss_weights=config.transformer.mtp_loss_weights,
        )

    with ReachesHost():
        step()
        ulysses.order_of_group.cache_clear()  # as if the documents of every batch were split in another way
        with NoBlockingCopies():
            return step()


STEPS = {
    "dense": "",
    "dropout": "--attention-dropout 0.1 --hidden-dropout 0.1",
    "loss scale": "--fp16 --log-num-zeros-in-grad",
    "no clipping": "--clip-grad 0 --no-calculate-per-token-loss",
    "moments on the host": "--optimizer-cpu-offload --bf16",
    "some low moments on the host": "--optimizer-cpu-offload --optimizer-offload-fraction 0.5 --fp16 "
    "--use-precision-aware-optimizer --exp-avg-dtype bf16",
    "momenta on the host": "--optimizer-cpu-offload --optimizer muon",
    "documents": "--dataloader-inter-document-masking",
    "documents by mask": "--dataloader-inter-document-masking --attention-dropout 0.1",
    "windows and sinks": "--window-size 4,0 --softmax-type learnable",
    "recomputed": "--recompute-granularity full --recompute-method block --recompute-num-layers 1 --hidden-dropout 0.1",
    "latent, further tokens": "--multi-latent-attention --mtp-num-layers 1",
    "experts": EXPERTS + "--moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.1",
    "experts dropped": DROPPED,
    "experts padded": DROPPED + "--moe-pad-expert-input-to-capacity",
    "experts with bias": EXPERTS.replace("aux_loss", "none")
    + "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-shared-expert-intermediate-size 32 "
    "--moe-token-dispatcher-type alltoall",
    "experts recomputed": EXPERTS + "--recompute-granularity selective --recompute-modules moe_act",
    "experts in fp8": EXPERTS + "--fp8-format hybrid",
}
LAYOUTS = {
    "tensor": "--tensor-model-parallel-size 2 --sequence-parallel --hidden-dropout 0.1",
    "ring": "--context-parallel-size 2 --dataloader-inter-document-masking",
    "all-gather": "--context-parallel-size 2 --cp-comm-type all_gather",
    "all-to-all": "--context-parallel-size 2 --cp-comm-type a2a --attention-dropout 0.1",
    "experts, tensor": "--tensor-model-parallel-size 2 --sequence-parallel --moe-token-dispatcher-type alltoall "
    + EXPERTS,
    "experts, padded": "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
    "--moe-pad-expert-input-to-capacity " + DROPPED,
}


@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_a_step_does_not_wait(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: `.item()` on the token count, the norm, the loss scale, or on the counts of experts; the documents'
    mask `.to(device)` without non_blocking; moments copied in either direction without it; the weight of a depth of
    multi-token prediction set as an element.
    """
    assert one_step(words, monkeypatch).loss.device == META


def test_the_grouped_kernel_of_fp8_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: the counts as a list; the kernel for one of two matrices, or for one of two products."""
    monkeypatch.setattr("megatron_lite.transformer.fp8.has_grouped_fp8_kernels", lambda: True)
    real, calls = torch._scaled_grouped_mm, []
    monkeypatch.setattr(torch, "_scaled_grouped_mm", lambda *one, **more: calls.append(1) or real(*one, **more))
    assert one_step(STEPS["experts in fp8"], monkeypatch).loss.device == META
    steps, micro_batches, layers, matrices, products = 2, 2, 2, 2, 2
    assert len(calls) == steps * micro_batches * layers * matrices * products


@pytest.mark.parametrize("words", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_of_several_ranks_does_not_wait(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: `.item()` in a mapping, or in the ring; the order of heads as a blocking copy."""
    assert one_step(words, monkeypatch, world_size=2).loss.device == META


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall " + EXPERTS, 2),
        ("--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather " + EXPERTS, 2),
        (EXPERTS.replace("aux_loss", "sinkhorn") + "--moe-router-topk 1", 1),
        (EXPERTS.replace("--moe-grouped-gemm", ""), 1),
    ],
    ids=["alltoall", "allgather", "sinkhorn", "loop"],
)
def test_what_is_known_to_wait(words: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of exceptions, each of them needed: one that waits no longer leaves it."""
    with pytest.raises(RuntimeError, match="meta"):
        one_step(words, monkeypatch, world_size)


class CountedReads(MetricsBuffer):
    """Notes at which iterations the loop reads, which would raise here."""

    def flush(self) -> list[IterationRecord]:
        self.read_at = [*getattr(self, "read_at", []), len(self._pending)]
        return []


@pytest.mark.parametrize(
    "words",
    [
        "--log-params-norm --log-num-zeros-in-grad --clip-grad 0.5 --manual-gc --manual-gc-interval 2",
        pytest.param("--fp16", marks=pytest.mark.full),
        EXPERTS,
    ],
    ids=["dense", "loss scale", "experts"],
)
def test_the_loop_reads_at_log_intervals_only(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine iterations: after the first two, the fourth, the eighth and the last, though it votes whether to stop,
    checks for nan, and draws real batches. Nothing else is read from the device.

    Mutations: `.item()` in one_iteration, step_scalars or MetricsBuffer.add; log_is_due at every iteration.
    """
    words += " --log-interval 4 --eval-iters 0 --exit-signal-handler --exit-duration-in-mins 60 --global-batch-size 4"
    config, chunks, optimizer = begin(words, 1, monkeypatch)
    tokenizer: Any = SimpleNamespace(vocab_size=64, eod=63, unique_identifiers={})
    scheduler = setup.scheduler_of(config, optimizer)
    monkeypatch.setattr(setup, "MetricsBuffer", CountedReads)
    run = setup.assemble(config, META, tokenizer, chunks, optimizer, scheduler, Progress())
    with NoBlockingCopies():
        assert not train.train(run)
    train.finish(run)
    assert run.metrics.read_at == [1, 2, 4, 8, 9]
