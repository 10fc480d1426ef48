"""SharedExperts: the part of an MoE layer that every token passes, beside its routed experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.host_copies import side_stream
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.layers import local_in_dtype
from megatron_lite.tensor_parallel.parameters import create_parameter
from megatron_lite.transformer.mlp import MLP
from megatron_lite.transformer.transformer_config import TransformerConfig


class SharedExperts(MLP):
    """An MLP over the dense tensor parallel group, with a gate or not: mlp(x) [* sigmoid(x w)]; [s, b, h] -> [s, b, h].

    Its width, that of all shared experts together, is config.moe_shared_expert_intermediate_size. The result is
    complete: it was reduced over the tensor parallel ranks by the MLP and must not be reduced again.

    Parameters: those of MLP, and gate_weight [1, h] with moe_shared_expert_gate.

    Args:
        config: width, gate, overlap, and all that MLP takes.
        pg_collection: process groups, default the global ones.
    """

    gate_weight: nn.Parameter | None

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(
            config, ffn_hidden_size=config.moe_shared_expert_intermediate_size, pg_collection=pg_collection
        )
        self.overlaps = config.moe_shared_expert_overlap
        if not config.moe_shared_expert_gate:
            self.register_parameter("gate_weight", None)
            return
        assert config.init_method is not None, "TransformerConfig derives init_method"
        create_parameter(
            self,
            "gate_weight",
            (1, config.hidden_size),
            init_method=config.init_method,
            dtype=config.main_params_dtype,
            device=torch.device("cpu") if config.use_cpu_initialization else None,
            # Under sequence parallelism each rank gates its own tokens; without it all ranks gate all of them alike.
            partial_over_tp=config.sequence_parallel,
            perform_initialization=config.perform_initialization,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]; under sequence parallelism [s/tp, b, h] -> [s/tp, b, h]."""
        output = super().forward(hidden_states)
        if self.gate_weight is None:
            return output
        return output * torch.sigmoid(F.linear(hidden_states, local_in_dtype(self.gate_weight, hidden_states.dtype)))

    def start(self, hidden_states: Tensor) -> Tensor:
        """Like a call, but with moe_shared_expert_overlap a GPU computes it beside what is launched next.

        The result may be read only after `wait`. On a CPU it is computed at once.
        """
        if not (self.overlaps and hidden_states.is_cuda):
            return self(hidden_states)  # type: ignore[no-any-return]
        stream = side_stream(hidden_states.device, "shared experts")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self(hidden_states)
        # The allocator must not give the input away while the other stream may still read it.
        hidden_states.record_stream(stream)
        return output  # type: ignore[no-any-return]

    def wait(self, output: Tensor) -> Tensor:
        """The finished result of `start`."""
        if self.overlaps and output.is_cuda:
            current = torch.cuda.current_stream()
            current.wait_stream(side_stream(output.device, "shared experts"))
            output.record_stream(current)
        return output
