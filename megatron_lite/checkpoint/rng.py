"""The random number streams of a rank as plain byte tensors, and back.

Python's and NumPy's states are stored as JSON text, torch's as the bytes that torch gives: nothing needs unpickling.
"""

import hashlib
import json
import random

import numpy as np
import torch
from torch import Tensor

from megatron_lite.process_groups import computes_on_gpu
from megatron_lite.tensor_parallel.random import RNGState, get_cuda_rng_tracker, model_parallel_cuda_manual_seed

_TRACKER = "tracker"


def get_rng_state() -> dict[str, Tensor]:
    """Every stream of this process by name, each a uint8 tensor of any length on the host."""
    numpy_state = np.random.get_state(legacy=True)
    states = {
        "python": _text(json.dumps(random.getstate())),
        "numpy": _text(json.dumps([numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]])),  # type: ignore
        "torch_cpu": torch.get_rng_state(),
    }
    if computes_on_gpu():
        states["torch_cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"{_TRACKER}.{name}.cpu"] = state.cpu
        if state.cuda is not None:
            states[f"{_TRACKER}.{name}.cuda"] = state.cuda
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Continue every stream where `get_rng_state` found it; streams that are not named go on as they are.

    Those of a GPU are left out where this run computes on none.
    """
    version, internal, gauss_next = json.loads(_bytes(states["python"]))
    random.setstate((version, tuple(internal), gauss_next))
    generator, keys, *rest = json.loads(_bytes(states["numpy"]))
    np.random.set_state((generator, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch_cpu"])
    on_gpu = computes_on_gpu()
    if on_gpu and "torch_cuda" in states:
        torch.cuda.set_rng_state(states["torch_cuda"])
    tracker = get_cuda_rng_tracker()
    tracked = tracker.get_states()
    for key, state in states.items():
        kind, _, name = key.partition(".")
        if kind == _TRACKER and name.endswith(".cpu"):
            name = name.removesuffix(".cpu")
            fresh = tracked[name].cuda if name in tracked else None
            tracked[name] = RNGState(state, states.get(f"{_TRACKER}.{name}.cuda", fresh) if on_gpu else None)
    tracker.set_states(tracked)


def reseed(seed: int, iteration: int) -> int:
    """Fresh streams for a run that continues at another layout or device; they repeat nothing it has drawn before.

    Args:
        seed: the run's seed, equal on every rank.
        iteration: where the run continues.

    Returns:
        The seed that was used, a function of the two.
    """
    digest = hashlib.sha256(f"{seed}:{iteration}".encode()).digest()
    mixed = int.from_bytes(digest[:4], "big") >> 1
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    model_parallel_cuda_manual_seed(mixed)
    return mixed


def _text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
