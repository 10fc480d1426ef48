"""Ranks agreeing that a step of a save or load went well everywhere."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpointError

T = TypeVar("T")


class Failure(NamedTuple):
    """What went wrong on a rank, and whether it is the files' fault."""

    message: str
    is_damage: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Of an exception; a CheckpointError keeps its own words."""
        if isinstance(error, CheckpointError):
            return cls(str(error), isinstance(error, DamagedCheckpointError))
        return cls(f"{type(error).__name__}: {error}")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def agreed(what: str, step: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Run a step on every rank and raise on all of them if it failed on any.

    Collective: one all-reduce of a flag over the world, and a gather of the messages if there was a failure.

    Args:
        what: the step in words, for the message ("writing the checkpoint of iteration 100").
        step: what this rank does; without collectives inside, since a rank that fails leaves it early.
        group: of all ranks, for a thread that must not meet the collectives of training; default the world.

    Raises:
        CheckpointError: with the ranks that failed and their errors; a DamagedCheckpointError if all are of that kind.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = step()
    except Exception as caught:
        error = caught
    if _any_rank(error is not None, group):
        mine = None if error is None else Failure.of(error)
        raise failure(what, {n: one for n, one in enumerate(gathered(mine, group)) if one is not None}) from error
    return result  # type: ignore[return-value]


def from_rank_zero(what: str, step: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Run a step on rank 0 alone and give its result to every rank; raises on all of them if it failed.

    Collective: a broadcast over the world, or over `group` (see `agreed`). The result must be plain data. A
    CheckpointError keeps its own words.
    """
    rank, world_size = world()
    result: T | None = None
    failed: Failure | None = None
    error: Exception | None = None
    if rank == 0:
        try:
            result = step()
        except Exception as caught:
            error, failed = caught, Failure.of(caught)
            if not isinstance(caught, CheckpointError):
                failed = Failure(describe_failures(what, {0: failed.message}))
    if world_size > 1:
        outcome = [result, failed]
        dist.broadcast_object_list(outcome, src=0, device=_device(group), group=group)
        result, failed = outcome  # type: ignore[assignment]
    if failed is not None:
        raise (DamagedCheckpointError if failed.is_damage else CheckpointError)(failed.message) from error
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
    return {name for rank_names in gathered(sorted(mine)) for name in rank_names}


def largest(number: int) -> int:
    """The largest of the numbers that ranks give. Collective: an all-reduce over the world."""
    if world()[1] == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gathered(mine: T, group: ProcessGroup | None = None) -> list[T]:
    """What each rank gives, plain data, by rank, on every rank. Collective over the world, or over `group`."""
    world_size = world()[1]
    if world_size == 1:
        return [mine]
    everywhere: list[Any] = [None] * world_size
    dist.all_gather_object(everywhere, mine, group=group)
    return everywhere


def failure(what: str, failures: Mapping[int, Failure]) -> CheckpointError:
    """The error for failures of some ranks: damage if it is the files' fault on each of them."""
    kind = DamagedCheckpointError if all(one.is_damage for one in failures.values()) else CheckpointError
    return kind(describe_failures(what, {rank: one.message for rank, one in failures.items()}))


def describe_failures(what: str, failures: Mapping[int, str]) -> str:
    """A sentence with the ranks that failed and why; equal messages are told once."""
    by_message: dict[str, list[int]] = {}
    for rank, message in sorted(failures.items()):
        by_message.setdefault(message, []).append(rank)
    reasons = []
    for message, ranks in by_message.items():
        shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        reasons.append(f"rank{'s' if len(ranks) > 1 else ''} {shown}: {message}")
    return f"{what} failed. " + "\n".join(reasons)


def _any_rank(failed: bool, group: ProcessGroup | None) -> bool:
    if world()[1] == 1:
        return failed
    flag = torch.tensor([int(failed)], dtype=torch.int64, device=_device(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def _device(group: ProcessGroup | None = None) -> torch.device:
    """Where the group's tensors live: the current GPU under NCCL alone, else the host."""
    backend = str(dist.get_backend_config(group))
    if "cpu" in backend or "gloo" in backend:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
