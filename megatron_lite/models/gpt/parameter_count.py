"""How many parameters a model has, and how many of them a token meets."""

from dataclasses import dataclass

from torch import nn

from megatron_lite.tensor_parallel.parameters import named_parameter_specs
from megatron_lite.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class ParameterCount:
    """Logical elements, each once, whatever the layout; padding of the vocabulary included.

    Attributes:
        total: of the whole model.
        experts: those of routed experts among them.
        active: what one token is computed with: topk of the experts of each layer, and all that is no routed expert.
    """

    total: int
    experts: int
    active: int


def count_parameters(model: nn.Module, config: TransformerConfig) -> ParameterCount:
    """Count a model, on any device and wrapped or not, of which this process knows all layers."""
    specs = named_parameter_specs(model)
    total = experts = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        experts += parameter.numel() if specs[name].is_expert else 0
    idle = experts - experts * config.moe_router_topk // config.num_moe_experts if config.num_moe_experts else 0
    return ParameterCount(total, experts, total - idle)
