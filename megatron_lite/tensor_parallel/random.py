"""Random streams: which ranks draw the same numbers, and which must not.

The default stream is the same on the tensor parallel ranks of one replica (dropout of replicated activations) and
differs over data and context parallel ranks. The model-parallel stream differs over tensor parallel ranks as well
(dropout of sharded activations), the expert-parallel one over expert ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import computes_on_gpu, group_rank, group_size
from megatron_lite.tensor_parallel.mappings import (
    default_group,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

_DATA_PARALLEL_RNG = "data-parallel-rng"
_MODEL_PARALLEL_RNG = "model-parallel-rng"
_EXPERT_PARALLEL_RNG = "expert-parallel-rng"

# Replicas are this far apart, so that the offsets below never meet another replica's.
_REPLICA_STRIDE = 1_000_000
_STAGE_STRIDE = 10_000


class RNGState(NamedTuple):
    """State of the generators layers draw from: the CPU's, and the current GPU's where the run computes on one."""

    cpu: Tensor
    cuda: Tensor | None


def _get_state() -> RNGState:
    return RNGState(torch.get_rng_state(), torch.cuda.get_rng_state() if computes_on_gpu() else None)


def _set_state(state: RNGState) -> None:
    torch.set_rng_state(state.cpu)
    if state.cuda is not None and computes_on_gpu():
        torch.cuda.set_rng_state(state.cuda)


class CudaRNGStatesTracker:
    """Named random streams beside the default one, on CPU and CUDA alike (the name is Megatron's)."""

    def __init__(self) -> None:
        self.states_: dict[str, RNGState] = {}

    def is_initialized(self) -> bool:
        """Whether any stream exists."""
        return bool(self.states_)

    def reset(self) -> None:
        """Forget all streams."""
        self.states_.clear()

    def get_states(self) -> dict[str, RNGState]:
        """All streams, to be saved."""
        return dict(self.states_)

    def set_states(self, states: dict[str, RNGState]) -> None:
        """Replace all streams."""
        self.states_ = {name: RNGState(*state) for name, state in states.items()}

    def add(self, name: str, seed: int) -> None:
        """Start the stream `name` at `seed`.

        Raises:
            ConfigError: the stream exists.
        """
        if name in self.states_:
            raise ConfigError(f"The random stream {name} exists already; reset() the tracker before seeding it anew.")
        default = _get_state()
        torch.manual_seed(seed)
        self.states_[name] = _get_state()
        _set_state(default)

    @contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG) -> Iterator[None]:
        """Draw from the stream `name` inside the block; the default stream is left as it was.

        Raises:
            ConfigError: no such stream.
        """
        if name not in self.states_:
            raise ConfigError(
                f"There is no random stream {name!r} (known: {', '.join(self.states_) or 'none'}); "
                "call model_parallel_cuda_manual_seed(seed) or add() first."
            )
        default = _get_state()
        _set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = _get_state()
            _set_state(default)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The tracker of this process."""
    return _tracker


def get_data_parallel_rng_tracker_name() -> str:
    """Name of the stream tensor parallel ranks share."""
    return _DATA_PARALLEL_RNG


def get_expert_parallel_rng_tracker_name() -> str:
    """Name of the stream that differs over expert ranks."""
    return _EXPERT_PARALLEL_RNG


def model_parallel_cuda_manual_seed(
    seed: int, *, tp_rank: int | None = None, ep_rank: int | None = None, etp_rank: int | None = None
) -> None:
    """Seed the default stream and the tracker's, on CPU and CUDA.

    With r the rank in the data x context parallel group and p the pipeline rank: default and data-parallel stream
    seed + 1,000,000 r + 10,000 p;
    model-parallel 2718 + tp rank beyond it; expert-parallel 1024 + 100 ep rank + etp rank. Ranks left out are asked of
    parallel_state, and are 0 in a single process.
    """
    get = parallel_state
    replica_rank = group_rank(get.get_data_parallel_group(with_context_parallel=True, check_initialized=False))
    tp_rank = group_rank(get.get_tensor_model_parallel_group(False)) if tp_rank is None else tp_rank
    ep_rank = group_rank(get.get_expert_model_parallel_group(False)) if ep_rank is None else ep_rank
    etp_rank = group_rank(get.get_expert_tensor_parallel_group(False)) if etp_rank is None else etp_rank
    stage = group_rank(get.get_pipeline_model_parallel_group(False))
    base = seed + _REPLICA_STRIDE * replica_rank + _STAGE_STRIDE * stage
    _tracker.reset()
    torch.manual_seed(base)
    _tracker.add(_DATA_PARALLEL_RNG, base)
    _tracker.add(_MODEL_PARALLEL_RNG, base + 2718 + tp_rank)
    _tracker.add(_EXPERT_PARALLEL_RNG, base + 1024 + 100 * ep_rank + etp_rank)


@contextmanager
def _with_tracker_states(states: dict[str, RNGState]) -> Iterator[None]:
    later = _tracker.get_states()
    _tracker.set_states(states)
    try:
        yield
    finally:
        _tracker.set_states(later)


def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
    """Run `function(*args)` without keeping its activations; backward computes them again, with the same randomness.

    Args:
        function: called once forward and once in backward; default and tracker streams are rewound for the second call.
        distribute_saved_activations: keep only this rank's 1/tp of the first argument meanwhile (it must be the same
            tensor on all tensor parallel ranks); an all-gather brings it back.
        args: its arguments.

    Raises:
        ConfigError: the first argument cannot be split.
    """
    states = _tracker.get_states()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _with_tracker_states(states)

    group = default_group(None)
    if distribute_saved_activations and group_size(group) > 1:
        first, *rest = args
        args = (scatter_to_sequence_parallel_region(first.reshape(-1), group), *rest)
        function = _of_part(function, first.shape, group)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _of_part(function: Callable[..., Any], shape: torch.Size, group: ProcessGroup | None) -> Callable[..., Any]:
    """`function` with its first argument given as this rank's part of the flattened tensor."""

    def gather_and_run(part: Tensor, *others: Any) -> Any:
        whole = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=False, group=group)
        return function(whole.view(shape), *others)

    return gather_and_run
