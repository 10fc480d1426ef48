#!/usr/bin/env python3
"""An MLP split over tensor parallel ranks, checked against the same MLP in one piece.

torchrun --nproc-per-node 2 scripts/examples/simple_mlp.py
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class SimpleMLP(torch.nn.Module):
    """[b, s, h] -> [b, s, h]. The wide layer in the middle exists only in parts, so one all-reduce is enough."""

    def __init__(self, config: ModelParallelConfig, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(input_size=hidden_size, output_size=ffn_hidden_size, config=config)
        self.fc2 = RowParallelLinear(input_size=ffn_hidden_size, output_size=hidden_size, config=config)

    def forward(self, x: Tensor) -> Tensor:
        """No communication up to fc2, which sums the parts of all ranks."""
        return self.fc2(F.gelu(self.fc1(x)))


def whole(tensor: Tensor | None) -> Tensor:
    """The logical tensor of a split parameter or gradient; an all-gather, used here to check the result."""
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over largest value."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def main(argv: list[str] | None = None) -> None:
    """Build, run forward and backward, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--ffn-hidden-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=16)
    arguments = parser.parse_args(argv)

    # All ranks of torchrun, or this one process without it, become one tensor parallel group.
    parallel_state.initialize_torch_distributed()
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    rank = parallel_state.get_tensor_model_parallel_rank()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)  # the same on every rank: layers draw the whole weight and keep their part

    config = ModelParallelConfig(tensor_model_parallel_size=size)
    model = SimpleMLP(config, arguments.hidden_size, arguments.ffn_hidden_size)
    x = torch.randn(arguments.batch, arguments.sequence, arguments.hidden_size)
    middle = model.fc1(x)
    output = model(x)
    output.square().sum().backward()
    lines: list[str] = [""] * size
    line = (
        f"tensor parallel rank {rank} of {size}: input {list(x.shape)} -> fc1 {list(middle.shape)} -> "
        f"output {list(output.shape)}; this rank holds {model.fc1.weight.to_local().numel():,} of "
        f"{model.fc1.weight.numel():,} weights of fc1"
    )
    torch.distributed.all_gather_object(lines, line)

    weights = {name: whole(parameter).detach().requires_grad_() for name, parameter in model.named_parameters()}
    reference = F.linear(x, weights["fc1.weight"], weights["fc1.bias"])
    reference = F.linear(F.gelu(reference), weights["fc2.weight"], weights["fc2.bias"])
    reference.square().sum().backward()
    differences = {"output": relative_difference(output, reference)}
    for name, parameter in model.named_parameters():
        differences[f"gradient of {name}"] = relative_difference(whole(parameter.grad), whole(weights[name].grad))
    for name, difference in differences.items():
        assert difference < 1e-4, f"{name} differs from one process by {difference:.1e}"
    if rank == 0:
        print("\n".join(lines))
        worst = max(differences, key=lambda name: differences[name])
        print(
            f"equal to the MLP in one piece: output and {len(weights)} gradients, "
            f"largest difference {differences[worst]:.0e} ({worst})",
            flush=True,
        )
    torch.set_default_device(None)
    parallel_state.shutdown()


if __name__ == "__main__":
    main()
