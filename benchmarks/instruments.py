"""Counting what a piece of code sends to other ranks and how much memory it holds, exactly and inside operators too."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_lite.tensor_parallel import collectives


class _CountingOperators:
    """Stands in for torch's functional collectives: passes each call on and notes the bytes it makes this rank send."""

    def __init__(self, sent: Counter[str]) -> None:
        self._sent = sent

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops._c10d_functional, name)

        def counted(tensor: Tensor, *arguments: Any) -> Any:
            result = operator(tensor, *arguments)
            sent = _bytes_sent(name, tensor, *arguments)
            if sent is not None:
                self._sent[name] += sent
            return result

        return counted


def _bytes_sent(name: str, tensor: Tensor, *arguments: Any) -> int | None:
    """What one rank sends, with the ring algorithms of NCCL's documentation; None for what communicates nothing."""
    size = tensor.numel() * tensor.element_size()
    if name == "all_gather_into_tensor":
        ranks, _ = arguments
        return size * (ranks - 1)
    if name == "reduce_scatter_tensor":
        _, ranks, _ = arguments
        return size // ranks * (ranks - 1)
    if name == "all_reduce":
        ranks = torch.distributed.distributed_c10d._resolve_process_group(arguments[-1]).size()
        return 2 * size // ranks * (ranks - 1)
    if name == "all_to_all_single":
        _, input_splits, group_name = arguments
        own = torch.distributed.distributed_c10d._resolve_process_group(group_name).rank()
        rows = sum(input_splits)
        return 0 if rows == 0 else size // rows * (rows - input_splits[own])
    return None


@contextmanager
def count_sent_bytes() -> Iterator[Counter[str]]:
    """Bytes that this rank sends to others inside the block, by collective; data parallelism's are not seen.

    Reductions are counted as what they are on GPUs, not as the exchanges that they are on a CPU.
    """
    sent: Counter[str] = Counter()
    counting = mock.patch.object(collectives, "_ops", _CountingOperators(sent))
    with counting, mock.patch.object(collectives, "exchanges", return_value=False):
        yield sent


def peak_allocated(function: Callable[[], object]) -> int:
    """Most bytes allocated at one time on the CPU while `function` ran, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    assert profiler.profiler is not None, "the profile ended"
    assert profiler.profiler.kineto_results is not None, "the profile ended"
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak
