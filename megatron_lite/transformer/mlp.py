"""The feed-forward block: two linear layers with an activation, gated or not, between them."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.transformer.module import MegatronModule, tensor_parallel_group
from megatron_lite.transformer.transformer_config import TransformerConfig


def activation_function(config: TransformerConfig) -> Callable[[Tensor], Tensor]:
    """The activation of the MLP.

    F.gelu stands for the tanh form that Megatron-LM computes by default, in its fused kernel, and, without
    bias_gelu_fusion and openai_gelu, for the exact form.
    """
    if config.activation_func is F.gelu and (config.openai_gelu or config.bias_gelu_fusion):
        return functools.partial(F.gelu, approximate="tanh")
    return config.activation_func


def gated_activation(config: TransformerConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """(gate, up) -> activation(gate) * (up + glu_linear_offset), both cut off at activation_func_clamp_value.

    A gate is cut off above only, as gpt-oss does (OpenAI 2025, arXiv:2508.10925, section 2.2).
    """
    activation, clamp, offset = (
        activation_function(config),
        config.activation_func_clamp_value,
        config.glu_linear_offset,
    )

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        return activation(gate) * (up + offset if offset else up)

    return activate


class MLP(MegatronModule):
    """linear_fc2(activation(linear_fc1(x))), or linear_fc2(activation(gate) * up) if gated; [s, b, h] -> [s, b, h].

    The rows of a gated linear_fc1 are interleaved (gate 0, up 0, gate 1, up 1, ...), so that a contiguous row shard
    holds matching gates and ups at every tensor parallel size. Collectives are those of ColumnParallelLinear and
    RowParallelLinear.

    Args:
        config: shape, activation, biases, init methods.
        is_expert: the weights belong to one expert of a mixture.
        input_size: width of the input, default config.hidden_size.
        ffn_hidden_size: width between the two layers, default config.ffn_hidden_size.
        tp_group: group the weights are split over, default the tensor parallel group of `pg_collection`.
        pg_collection: process groups, default the global ones.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        group = tensor_parallel_group(pg_collection) if tp_group is None else tp_group
        width = ffn_hidden_size or config.ffn_hidden_size
        assert width is not None, "TransformerConfig derives ffn_hidden_size"
        self.gated = config.gated_linear_unit
        self.activation, self.gated_activation = activation_function(config), gated_activation(config)
        self.linear_fc1 = ColumnParallelLinear(
            input_size or config.hidden_size,
            2 * width if self.gated else width,
            config=config,
            init_method=config.init_method,
            bias=config.add_bias_linear,
            gather_output=False,
            skip_bias_add=self.gated,
            is_expert=is_expert,
            tp_group=group,
        )
        self.linear_fc2 = RowParallelLinear(
            width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            is_expert=is_expert,
            tp_group=group,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]; under sequence parallelism [s/tp, b, h] -> [s/tp, b, h]."""
        if not self.gated:
            return self.linear_fc2(self.activation(self.linear_fc1(hidden_states)))
        gate, up = self._gate_and_up(hidden_states)
        return self.linear_fc2(self.gated_activation(gate, up))

    def _gate_and_up(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of linear_fc1's output, each [s, b, f/tp].

        Elementwise work on interleaved columns is several times slower than on contiguous halves, so the smaller of the
        weight and the output is reordered first.
        """
        assert self.linear_fc1.weight is not None, "linear_fc1 allocates its weight"
        weight = local(self.linear_fc1.weight)
        if hidden_states.numel() < weight.numel() // 2:
            output, bias = self.linear_fc1(hidden_states)
            output = output if bias is None else output + bias
            gate, up = output.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            output, bias = self.linear_fc1(hidden_states, weight=_gates_then_ups(weight))
            output = output if bias is None else output + _gates_then_ups(local(bias))
            gate, up = output.chunk(2, dim=-1)
        return gate, up


def _gates_then_ups(interleaved: Tensor) -> Tensor:
    """Reorder rows gate 0, up 0, gate 1, up 1, ... to gate 0, gate 1, ..., up 0, up 1, ..."""
    return interleaved.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
