"""Ranks agreeing that a step of a save or load went well everywhere."""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_lite.checkpoint.errors import CheckpointError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def agreed(what: str, step: Callable[[], T]) -> T:
    """Run a step on every rank and raise on all of them if it failed on any.

    Collective: one all-reduce of a flag over the world, and a gather of the messages if there was a failure.

    Args:
        what: the step in words, for the message ("writing the checkpoint of iteration 100").
        step: what this rank does; without collectives inside, since a rank that fails leaves it early.

    Raises:
        CheckpointError: with the ranks that failed and their errors.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = step()
    except Exception as caught:
        error = caught
    if _any_rank(error is not None):
        raise CheckpointError(describe_failures(what, _failures(error))) from error
    return result  # type: ignore[return-value]


def from_rank_zero(what: str, step: Callable[[], T]) -> T:
    """Run a step on rank 0 alone and give its result to every rank; raises on all of them if it failed.

    Collective: a broadcast over the world. The result must be plain data. A CheckpointError keeps its own words.
    """
    rank, world_size = world()
    result: T | None = None
    message: str | None = None
    error: Exception | None = None
    if rank == 0:
        try:
            result = step()
        except Exception as caught:
            error, message = caught, str(caught)
            if not isinstance(caught, CheckpointError):
                message = describe_failures(what, {0: f"{type(caught).__name__}: {caught}"})
    if world_size > 1:
        outcome = [result, message]
        dist.broadcast_object_list(outcome, src=0, device=_device())
        result, message = outcome  # type: ignore[assignment]
    if message is not None:
        raise CheckpointError(message) from error
    return result  # type: ignore[return-value]


def union_of_names(names: Iterable[str]) -> set[str]:
    """The names that any rank holds. Collective: an all-reduce of a hash, and a gather only where ranks differ."""
    mine = set(names)
    if world()[1] == 1:
        return mine
    digest = hashlib.sha256("\n".join(sorted(mine)).encode()).digest()
    hashed = int.from_bytes(digest[:7], "big")
    extremes = torch.tensor([hashed, -hashed], dtype=torch.int64, device=_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) == -int(extremes[1]):
        return mine
    gathered: list[list[str]] = [[] for _ in range(world()[1])]
    dist.all_gather_object(gathered, sorted(mine))
    return {name for rank_names in gathered for name in rank_names}


def largest(number: int) -> int:
    """The largest of the numbers that ranks give. Collective: an all-reduce over the world."""
    if world()[1] == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def describe_failures(what: str, failures: dict[int, str]) -> str:
    """A sentence with the ranks that failed and why; equal messages are told once."""
    by_message: dict[str, list[int]] = {}
    for rank, message in sorted(failures.items()):
        by_message.setdefault(message, []).append(rank)
    reasons = []
    for message, ranks in by_message.items():
        shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        reasons.append(f"rank{'s' if len(ranks) > 1 else ''} {shown}: {message}")
    return f"{what} failed. " + "\n".join(reasons)


def _any_rank(failed: bool) -> bool:
    if world()[1] == 1:
        return failed
    flag = torch.tensor([int(failed)], dtype=torch.int64, device=_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _failures(error: Exception | None) -> dict[int, str]:
    if error is None:
        message = None
    else:
        message = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    messages: list[str | None] = [message]
    world_size = world()[1]
    if world_size > 1:
        messages = [None] * world_size
        dist.all_gather_object(messages, message)
    return {number: text for number, text in enumerate(messages) if text is not None}


def _device() -> torch.device:
    """Where the world group's tensors live: the current GPU under NCCL alone, else the host."""
    backend = str(dist.get_backend_config())
    if "cpu" in backend or "gloo" in backend:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
