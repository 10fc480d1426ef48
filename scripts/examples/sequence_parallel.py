#!/usr/bin/env python3
"""What each tensor and sequence parallel mapping does forward and backward: shapes, and the collectives it runs.

torchrun --nproc-per-node 2 scripts/examples/sequence_parallel.py
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite import parallel_state
from megatron_lite.tensor_parallel import collectives, mappings

COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
}


class Listener(TorchDispatchMode):
    """Notes the collectives that run inside a `with` block: those of GPUs, where a CPU would exchange and add."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []
        self.as_on_gpus = mock.patch.object(collectives, "exchanges", return_value=False)

    def __enter__(self) -> "Listener":
        self.as_on_gpus.start()
        super().__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        self.as_on_gpus.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Called by torch for each operation."""
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name in COLLECTIVES:
            self.heard.append(COLLECTIVES[name])
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        return ", ".join(self.heard) or "nothing"


def demonstrate(mapping: Callable[..., Tensor], shape: tuple[int, ...]) -> str:
    """One line: forward shapes and collective, backward collective."""
    x = torch.ones(shape, requires_grad=True)
    with Listener() as forward:
        output = mapping(x)
    with Listener() as backward:
        output.backward(torch.ones_like(output))
    return f"  {mapping.__name__:<44} {list(shape)} -> {list(output.shape)}  {forward!s:<15} {backward}"


def main(argv: list[str] | None = None) -> None:
    """Go through the mappings in the order a transformer layer uses them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=4)
    arguments = parser.parse_args(argv)

    parallel_state.initialize_torch_distributed()
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    full = (arguments.sequence, arguments.batch, arguments.hidden_size)
    part = (arguments.sequence // size, arguments.batch, arguments.hidden_size)

    lines = [
        f"tensor parallel size {size}; activations are [s, b, h]; columns: shapes, forward, backward",
        "tensor parallelism: each attention and each MLP costs two all-reduces, one forward and one backward",
        demonstrate(mappings.copy_to_tensor_model_parallel_region, full),
        demonstrate(mappings.reduce_from_tensor_model_parallel_region, full),
        "sequence parallelism: each all-reduce becomes an all-gather and a reduce-scatter, and between them every "
        f"rank keeps 1/{size} of the sequence",
        demonstrate(mappings.gather_from_sequence_parallel_region, part),
        demonstrate(mappings.reduce_scatter_to_sequence_parallel_region, full),
        "entering and leaving the split",
        demonstrate(mappings.scatter_to_sequence_parallel_region, full),
        demonstrate(mappings.scatter_to_tensor_model_parallel_region, full),
    ]
    if torch.distributed.get_rank() == 0:
        print("\n".join(lines), flush=True)
    torch.set_default_device(None)
    parallel_state.shutdown()


if __name__ == "__main__":
    main()
