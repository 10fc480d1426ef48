"""ReplicatedLinear: a small linear layer that every tensor parallel rank holds whole."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.tensor_parallel.layers import InitMethod, default_init_method, local_in_dtype
from megatron_lite.tensor_parallel.parameters import create_parameter


class ReplicatedLinear(nn.Module):
    """Y = X A^T with the same A on all tensor parallel ranks: [..., k] -> [..., n]. No communication, no bias.

    Without sequence parallelism every rank computes the same, and its gradient is complete if that of the output is:
    whoever uses the output differently on each rank passes it through copy_to_tensor_model_parallel_region. Under
    sequence parallelism each rank computes its own positions, and its gradient is a partial sum.

    Args:
        input_size: features k.
        output_size: features n.
        config: dtype, sequence parallelism and initialization.
        init_method: fills the weight in place; default `config.init_method`, else normal with std 0.02.
    """

    weight: nn.Parameter

    def __init__(
        self, input_size: int, output_size: int, *, config: ModelParallelConfig, init_method: InitMethod | None = None
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        create_parameter(
            self,
            "weight",
            (output_size, input_size),
            init_method=init_method or getattr(config, "init_method", None) or default_init_method,
            dtype=config.main_params_dtype,
            device=torch.device("cpu") if config.use_cpu_initialization else None,
            partial_over_tp=config.sequence_parallel,
            perform_initialization=config.perform_initialization,
        )

    def forward(self, input_: Tensor) -> Tensor:
        """[..., k] -> [..., n], in the dtype of the input."""
        return F.linear(input_, local_in_dtype(self.weight, input_.dtype))

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.input_size}, {self.output_size}"
