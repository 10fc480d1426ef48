"""The feed-forward block: two linear layers with an activation, gated or not, between them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops.swiglu import gates_then_ups, split_gates, swiglu
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, local_in_dtype
from megatron_lite.transformer.activations import gelu_tanh
from megatron_lite.transformer.module import MegatronModule, tensor_parallel_group
from megatron_lite.transformer.transformer_config import TransformerConfig


def activation_function(config: TransformerConfig) -> Callable[[Tensor], Tensor]:
    """The activation of the MLP.

    F.gelu stands for the tanh form that Megatron-LM computes by default, in its fused kernel, and, without
    bias_gelu_fusion and openai_gelu, for the exact form.
    """
    if config.activation_func is F.gelu and (config.openai_gelu or config.bias_gelu_fusion):
        return gelu_tanh
    return config.activation_func


def is_swiglu(config: TransformerConfig) -> bool:
    """Whether the MLP is gated by silu, with nothing cut off or added."""
    changed = config.activation_func_clamp_value is not None or config.glu_linear_offset
    return config.gated_linear_unit and config.activation_func is F.silu and not changed


def gated_activation(config: TransformerConfig) -> Callable[[Tensor, bool], Tensor]:
    """[..., 2f] and whether it is interleaved (split_gates) -> activation(gate) * (up + glu_linear_offset), [..., f].

    Both are cut off at activation_func_clamp_value, a gate above only, as gpt-oss does (OpenAI 2025, arXiv:2508.10925,
    section 2.2).
    """
    if is_swiglu(config):
        return swiglu
    activation, clamp, offset = (
        activation_function(config),
        config.activation_func_clamp_value,
        config.glu_linear_offset,
    )

    def activate(gates_and_ups: Tensor, interleaved: bool) -> Tensor:
        gate, up = split_gates(gates_and_ups, interleaved)
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        return activation(gate) * (up + offset if offset else up)

    return activate


def reorders_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether the interleaved rows of a weight are reordered before the product, gates first, for the activation.

    On a CPU every second number of the output takes several times as long to read as neighbours do, so moving whole
    rows of the weight is cheaper, unless x has very few. A GPU fetches neighbours together, and nothing is reordered.

    Args:
        x: [..., in].
        weight: [..., out, in].
    """
    elements_of_output = x.numel() // max(x.size(-1), 1) * weight.size(-2)
    return x.device.type == "cpu" and elements_of_output * 5 >= weight.numel()


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
        assert self.linear_fc1.weight is not None, "linear_fc1 allocates its weight"
        weight = local_in_dtype(self.linear_fc1.weight, hidden_states.dtype)
        gates_first = reorders_weight(hidden_states, weight)
        output, bias = self.linear_fc1(hidden_states, weight=gates_then_ups(weight, 0) if gates_first else weight)
        if bias is not None:
            output = output + (gates_then_ups(bias, 0) if gates_first else bias)
        return self.linear_fc2(self.gated_activation(output, not gates_first))
