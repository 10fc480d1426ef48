"""Moments in the host's memory: the same bits as without, in every order of work that streams leave open."""

import itertools
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite import host_copies
from megatron_lite.arguments import parse_args
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, host_moments
from megatron_lite.optimizer.host_moments import Moment, in_parts, names_on_host, through_device
from megatron_lite.training.initialize import announce

CPU = torch.device("cpu")
SHAPES = {"embedding.word_embeddings.weight": (16, 12), "mlp.weight": (12, 8), "mlp.bias": (12,), "out.weight": (8, 12)}
LOW = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "low moments": LOW,
    "one low moment": LOW | {"exp_avg_dtype": "fp32"},
    "loss scale": {"fp16": True, "initial_loss_scale": 8.0, "hysteresis": 1},
    "sgd": {"optimizer": "sgd"},
    "sgd without momentum": {"optimizer": "sgd", "sgd_momentum": 0.0},
    "muon": {"optimizer": "muon", "muon_nesterov": True},
}


def build(fraction: float | None, **settings: Any) -> MegatronOptimizer:
    generator = torch.Generator().manual_seed(5)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    host = {} if fraction is None else {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    return MegatronOptimizer(OptimizerConfig(lr=0.05, clip_grad=0.5, **settings, **host), parameters)


def train(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """Four steps, of which the third is skipped; weights and state."""
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        for parameter in optimizer.named_parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if number == 2:
            optimizer.named_parameters["mlp.weight"].grad[3, 3] = torch.inf  # type: ignore[index]
        assert optimizer.step().found_inf.item() == (number == 2)
    return {**optimizer.named_parameters, **optimizer.state_dict()}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("at_a_time", [1, 100, 2**24])
def test_the_same_bits(
    fraction: float, settings: dict[str, Any], at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations: nothing copied back; another parameter's momentum; nothing travels, or all of it at once."""
    monkeypatch.setattr(host_moments, "AT_A_TIME", at_a_time)
    copied: list[int] = []
    original = host_moments._Visit.__init__

    def counting(visit: Any, part: Any, device: torch.device) -> None:
        original(visit, part, device)
        here = [one for one, moment in zip(visit.moments, part, strict=True) if one is not moment.kept]
        assert all(one.data_ptr() != moment.kept.data_ptr() for one, moment in zip(here, part, strict=False))
        copied.append(sum(one.numel() for one in here))

    monkeypatch.setattr(host_moments._Visit, "__init__", counting)
    expected = train(build(None, **settings))
    assert sum(copied) == 0
    found = train(build(fraction, **settings))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in expected.items())
    moments = {name: len(one) // 2 or len(one) for name, one in build(None, **settings).state.items()}
    assert moments.keys() == SHAPES.keys()
    on_host = {1.0: set(SHAPES), 0.5: set(list(SHAPES)[:2]), 0.0: set[str]()}[fraction]
    of_adam = 1 if settings.get("optimizer") == "sgd" else 2
    elements = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    each = {
        n: 1 if settings.get("optimizer") == "muon" and n in ("mlp.weight", "out.weight") else of_adam for n in SHAPES
    }
    if at_a_time == 1:
        assert max(copied, default=0) <= 2 * max(elements.values())
    travelling = sum(elements[name] * each[name] for name in on_host) * (settings.get("sgd_momentum") != 0.0)
    assert sum(copied) == 4 * travelling


def test_parts_are_small() -> None:
    assert in_parts([5, 5, 5, 20, 5], [True] * 5) == [[0, 1, 2, 3, 4]]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(host_moments, "AT_A_TIME", 10)
        assert in_parts([5, 5, 5, 20, 5], [True] * 5) == [[0, 1], [2], [3], [4]]
        assert in_parts([5, 5, 5, 20, 5], [False] * 5) == [[0, 1, 2, 3, 4]]
        assert in_parts([], []) == []


def test_the_fraction_is_reached_by_whole_parameters() -> None:
    """Mutations: one parameter fewer; one that only touches the fraction taken, too; the smallest first."""
    elements = {"a": 60, "b": 0, "c": 30, "d": 10}
    for fraction, expected in (
        (0.0, ""),
        (0.01, "a"),
        (0.6, "a"),
        (0.61, "abc"),
        (0.9, "abc"),
        (0.91, "abcd"),
        (1, "abcd"),
    ):
        assert names_on_host(elements, fraction) == set(expected), fraction
    assert names_on_host({}, 1.0) == set()


class Stream:
    """Work that is queued, and done in its order as soon as what it waits for is done."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: list[Callable[[], None] | tuple[Stream, int]] = []
        self.done = 0

    def wait_stream(self, other: "Stream") -> None:
        self.queue.append((other, len(other.queue)))

    def wait_event(self, event: tuple["Stream", int]) -> None:
        self.queue.append(event)

    def record_event(self) -> tuple["Stream", int]:
        return self, len(self.queue)

    def can_go_on(self) -> bool:
        if self.done == len(self.queue):
            return False
        following = self.queue[self.done]
        return callable(following) or following[0].done >= following[1]

    def go_on(self) -> None:
        following = self.queue[self.done]
        if callable(following):
            following()
        self.done += 1


class Device(TorchDispatchMode):
    """A GPU with a main stream and one for each direction, whose work is done when `finish` says so, in any order.

    Its memory is taken again as soon as nobody holds it, as torch's allocator does for one stream.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main, self.to_device, self.to_host = self.streams = [Stream(number) for number in range(3)]
        self.current = self.main
        self.free: list[Tensor] = []
        self.memories = 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch, "empty_like", self.allocate)
        streams = {"moments to the device": self.to_device, "moments to the host": self.to_host}
        monkeypatch.setattr(host_copies, "side_stream", lambda device, which: streams[which])

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before

    def allocate(self, like: Tensor, device: torch.device) -> Tensor:
        assert device.type == "cuda"
        if not self.free:
            self.free.append(torch.full((8,), torch.nan))
            self.memories += 1
        memory = self.free.pop()
        tensor = memory[: like.numel()].view(like.shape)
        weakref.finalize(tensor, self.free.append, memory)
        return tensor

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            target, source, non_blocking = arguments
            assert non_blocking
            target, source = alias(target), alias(source)
            self.current.queue.append(lambda: target.copy_(source))
            return arguments[0]
        return function(*arguments, **(kwargs or {}))

    def finish(self, choose: Callable[[list[Stream]], Stream]) -> None:
        while able := [stream for stream in self.streams if stream.can_go_on()]:
            choose(able).go_on()
        assert all(stream.done == len(stream.queue) for stream in self.streams)


def alias(tensor: Tensor) -> Tensor:
    """The same memory by another object, so that the device may give away what nobody else holds."""
    return torch.empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def choices() -> Iterator[Callable[[list[Stream]], Stream]]:
    """One stream before another wherever it can, in each order of the three; and chance."""
    for ranks in itertools.permutations(range(3)):
        yield lambda able, ranks=ranks: min(able, key=lambda stream: ranks[stream.number])
    yield from (random.Random(seed).choice for seed in range(20))


@pytest.mark.parametrize("parts", [0, 1, 2, 3, 7])
def test_no_order_that_streams_leave_open_changes_a_number(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, then other work in the memory that is free. No more than three parts are on the device.

    Mutations: leave out any of the waits (of the streams for the main one, of the update for the copies to the device,
    of the next part and of the end for the copies to the host); keep a fourth part.
    """
    for choose in choices():
        device = Device(monkeypatch)
        kept = [torch.arange(8.0) + number for number in range(parts)]
        expected = [4.0 * one + 3.0 * number for number, one in enumerate(kept)]
        stays = torch.zeros(2)

        def update(number: int, moments: list[Tensor], stays: Tensor = stays, device: Device = device) -> None:
            assert moments[1] is stays
            here, there = alias(moments[0]), alias(stays)
            device.main.queue.append(lambda: here.mul_(2.0).add_(number))
            device.main.queue.append(lambda: there.add_(1.0))

        with device:
            for _ in range(2):
                through_device(
                    [[Moment(one, True), Moment(stays, False)] for one in kept], torch.device("cuda"), update
                )
            others = [device.allocate(torch.zeros(8), torch.device("cuda")) for _ in range(3)]
        for one in others:
            device.main.queue.append(lambda one=one: one.fill_(-1.0))  # type: ignore[misc]
        device.finish(choose)
        assert all(torch.equal(one, two) for one, two in zip(kept, expected, strict=True))
        assert torch.equal(stays, torch.full((2,), 2.0 * parts))
        assert device.memories == 3


def test_the_host_waits_before_it_reads_or_writes_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever saves or loads asks for the state first. Mutations: no wait; one in every step, or without the flag."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device.type))
    host_moments.wait_for_moments(CPU)
    assert waits == []
    for fraction, expected in ((None, []), (0.0, []), (0.5, ["cuda"] * 2)):
        optimizer = build(fraction)
        optimizer.device = torch.device("cuda")  # the moments are where they are
        with torch.no_grad():
            optimizer._update_group(optimizer.param_groups[0], gradients_of(optimizer), None, torch.zeros(()))
        assert waits == []
        optimizer.load_state_dict(optimizer.state_dict())
        assert waits == expected
        waits.clear()


def gradients_of(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    return {name: torch.ones_like(parameter) for name, parameter in optimizer.named_parameters.items()}


def test_rules_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert OptimizerConfig(optimizer_offload_fraction=1.5).violations() == [
        "optimizer_offload_fraction is 1.5, but it must lie in [0, 1]; write 1 to keep all moments in the host's "
        "memory."
    ]
    shape = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --vocab-size 8 --mock-data --lr 1 "
    shape += "--train-iters 1 --micro-batch-size 1 --tokenizer-type NullTokenizer "

    def said(words: str) -> list[str]:
        return [one for one in parse_args((shape + words).split()).notices if "offload" in one]

    assert said("--optimizer-cpu-offload --optimizer-offload-fraction 0.5") == []
    assert said("--optimizer-offload-fraction 0.5") == [
        "--optimizer-offload-fraction: without effect, because it belongs to --optimizer-cpu-offload."
    ]
    for words in ("--optimizer-offload-fraction 0", "--optimizer sgd --sgd-momentum 0"):
        assert said(f"--optimizer-cpu-offload {words}") == [
            "--optimizer-cpu-offload: without effect, because it belongs to an optimizer with moments, and "
            "--optimizer-offload-fraction above 0."
        ]
    announce(parse_args([*shape.split(), "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5"]), CPU)
    printed = capsys.readouterr().out
    assert "torch fused adam, 50% of moments in the host's memory" in printed
    assert "note: --optimizer-cpu-offload: frees nothing on a CPU, whose memory is the host's" in printed
    announce(parse_args(shape.split()), CPU)
    assert "host's memory" not in capsys.readouterr().out
    (line,) = said("--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads")
    assert line.startswith("--overlap-cpu-optimizer-d2h-h2d, --no-pin-cpu-grads: accepted without effect (")
