"""Measuring training loops side by side: each in its own processes, taking turns (A B C, C B A, A B C, ...).

Processes of their own give each side its own peak memory and the same settings of threads; taking turns in short
windows spreads what else the machine does over all. On a CPU the processor time of the processes counts, which hardly
depends on other programs; on a GPU the time on the clock, with the device idle at both ends of a window.
"""

import multiprocessing
import os
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.breakdown import breakdown
from benchmarks.contenders import CONTENDERS, Step
from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.errors import ConfigError
from megatron_lite.training.batches import MicroBatch
from megatron_lite.training.initialize import distributed_environment

# Weaker than what the user writes: no files are read, and the learning rate is constant.
DEFAULTS = {"mock_data": True, "tokenizer_type": "NullTokenizer", "train_iters": 1, "lr": 3e-4, "weight_decay": 0.1}
DIFFERENT_BATCHES = 8
_BREAK_DOWN = -1


@dataclass(frozen=True)
class Side:
    """One training loop to measure: what the table calls it, a key of CONTENDERS, and flags of pretrain_gpt.py.

    Attributes:
        ranks: processes that run it together.
    """

    name: str
    contender: str
    arguments: tuple[str, ...]
    ranks: int = 1

    @property
    def config(self) -> RunConfig:
        """The validated run of all its ranks."""
        return configuration(self.arguments, self.ranks)


@dataclass(frozen=True)
class Window:
    """One side's share of a round.

    Attributes:
        steps: optimizer steps measured.
        wall_seconds: time on the clock, of the slowest rank.
        cpu_seconds: processor time of the processes, user and system.
        matmul_flops: operations per second (per CPU-second on a CPU) of a large matrix product in the same dtype.
        peak_memory: bytes of the largest rank; resident on a CPU, allocated on a GPU, since the warm-up.
        loss: of the last step.
    """

    steps: int
    wall_seconds: float
    cpu_seconds: float
    matmul_flops: float
    peak_memory: int
    loss: float


@dataclass
class Measured:
    """All windows of one side, the seconds its construction, warm-up and compilation took, and its breakdown."""

    side: Side
    startup_seconds: float
    windows: list[Window] = field(default_factory=list)
    breakdown: dict[str, float] | None = None


def configuration(arguments: Sequence[str], ranks: int = 1) -> RunConfig:
    """The validated run of so many processes that these flags describe.

    Raises:
        ConfigError: as parse_args, or the size of the vocabulary is missing, or sequences are split over ranks.
    """
    with _environment(WORLD_SIZE=str(ranks)):
        config = parse_args(list(arguments), DEFAULTS)
    if config.gpt.vocab_size is None:
        raise ConfigError("vocab_size is not given, but a benchmark has no tokenizer to ask: write --vocab-size N.")
    if config.transformer.context_parallel_size > 1:
        raise ConfigError(
            f"context_parallel_size is {config.transformer.context_parallel_size}, but this benchmark does not split "
            "sequences: python -m benchmarks.context_parallel measures that."
        )
    return config


def measure(
    sides: Sequence[Side], *, steps: int, warmup: int, rounds: int, threads: int, break_down: bool = False
) -> list[Measured]:
    """Measure all sides in turns.

    Args:
        sides: at least one.
        steps: optimizer steps of a window.
        warmup: steps of each side before the first window; compilation happens there.
        rounds: windows of each side. The order of the sides is reversed from round to round.
        threads: CPU threads of each side.
        break_down: look into one more step of each side (breakdown.py), of its first rank.
    """
    with ExitStack() as stack:
        connections = [stack.enter_context(_processes(side, warmup, threads)) for side in sides]
        # One starts after the other has started: compiling at the same time would tell nothing about start-up.
        measured = []
        for side, ranks in zip(sides, connections, strict=True):
            measured.append(Measured(side, max(_ask(side, ranks, 0))))
        turns = list(zip(measured, connections, strict=True))
        for _ in range(rounds):
            for result, ranks in turns:
                result.windows.append(_together(_ask(result.side, ranks, steps)))
            turns.reverse()
        if break_down:
            for result, ranks in turns:
                result.breakdown = _ask(result.side, ranks, _BREAK_DOWN)[0]
    return measured


def _ask(side: Side, ranks: list[Connection], what: int) -> list[Any]:
    """The answer of every rank of a side.

    Raises:
        ConfigError: one of them ended; what it printed says why.
    """
    try:
        for rank in ranks:
            rank.send(what)
        answers: dict[int, Any] = {}
        while len(answers) < len(ranks):
            for ready in wait([rank for number, rank in enumerate(ranks) if number not in answers]):
                assert isinstance(ready, Connection)
                answers[ranks.index(ready)] = ready.recv()
    except (EOFError, OSError) as error:
        raise ConfigError(f"{side.name} ended before it was measured; what it printed above says why.") from error
    return [answers[number] for number in range(len(ranks))]


def _together(windows: list[Window]) -> Window:
    """The window of a side from those of its ranks."""
    return replace(
        windows[-1],
        wall_seconds=max(window.wall_seconds for window in windows),
        cpu_seconds=sum(window.cpu_seconds for window in windows),
        peak_memory=max(window.peak_memory for window in windows),
    )


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for the time of a block."""
    before = dict(os.environ)
    os.environ |= variables
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _processes(side: Side, warmup: int, threads: int) -> Iterator[list[Connection]]:
    """The processes of one side, a connection to each; they end with the block."""
    context = multiprocessing.get_context("spawn")
    # OpenMP reads these once, when the process loads torch. Waiting threads sleep: spinning is time nobody worked.
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if side.ranks > 1:
        variables |= {"WORLD_SIZE": str(side.ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    connections, processes = [], []
    for rank in range(side.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, side, warmup, threads))
        with _environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank)):
            process.start()
        theirs.close()  # so that recv() raises EOFError if the process dies
        connections.append(ours)
        processes.append(process)
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(timeout=60)
            process.terminate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _serve(connection: Connection, side: Side, warmup: int, threads: int) -> None:
    """Wait for the word to start, build and warm up, then measure windows as long as they are asked for."""
    connection.recv()
    config = side.config
    with distributed_environment(config) as device:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        batches = synthetic_batches(config, device)
        step = CONTENDERS[side.contender](config, device)
        for number in range(warmup):
            step(batches[number % len(batches)])
        _synchronize(device)
        _reset_peak_memory(device)
        connection.send(time.perf_counter() - started)
        done = warmup
        while True:
            try:
                steps = connection.recv()
            except EOFError:
                return
            if steps == _BREAK_DOWN:
                connection.send(breakdown(lambda: step(batches[0]), device))
                continue
            connection.send(_window(config, device, step, batches, done, steps))
            done += 1 + steps


def _window(
    config: RunConfig, device: torch.device, step: Step, batches: list[list[MicroBatch]], done: int, steps: int
) -> Window:
    """One unmeasured step, because the other side has just used the caches, then `steps` measured ones."""
    matmul_flops = matmul_rate(config.transformer.params_dtype, device)
    loss = step(batches[done % len(batches)])
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(done + 1, done + 1 + steps):
        loss = step(batches[number % len(batches)])
    _synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Window(steps, wall, cpu, matmul_flops, _peak_memory(device), loss.item())


def synthetic_batches(config: RunConfig, device: torch.device) -> list[list[MicroBatch]]:
    """This rank's share of global batches of random tokens, on the device; the batches are the same for every side."""
    size, length, vocabulary = config.training.micro_batch_size or 1, config.sequence_length, config.gpt.vocab_size
    assert vocabulary is not None, "checked in configuration()"
    generator = torch.Generator().manual_seed(config.rng.seed)
    global_batches = []
    for _ in range(DIFFERENT_BATCHES):
        micro_batches = []
        for _ in range(config.global_batch_size // size):
            text = torch.randint(0, vocabulary, (size, length + 1), generator=generator)
            batch = {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.ones(size, length),
                "position_ids": torch.arange(length).repeat(size, 1),
            }
            micro_batches.append({name: tensor.to(device) for name, tensor in batch.items()})
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        global_batches.append(micro_batches[rank::ranks])
    return global_batches


def matmul_rate(dtype: torch.dtype, device: torch.device, repetitions: int = 4) -> float:
    """Operations per second (on a CPU per CPU-second) of a large square matrix product, the best of a few."""
    size, clock = (8192, time.perf_counter) if device.type == "cuda" else (1024, time.process_time)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repetitions):
        _synchronize(device)
        started = clock()
        left @ right
        _synchronize(device)
        seconds.append(clock() - started)
    return 2.0 * size**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak_memory(device: torch.device) -> None:
    """Forget the peak of construction and compilation, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5")  # resets VmHWM, see proc(5)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
