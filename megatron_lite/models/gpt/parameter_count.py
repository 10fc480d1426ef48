"""How many parameters a model has, and how many of them a token meets."""

from dataclasses import dataclass

from megatron_lite.model_chunks import ModelChunks, as_chunks
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


def count_parameters(model: ModelChunks, config: TransformerConfig) -> ParameterCount:
    """Count a model, or the pipeline stages of it that are given, on any device and wrapped or not.

    The copy of tied embeddings in the last stage is not counted: the counts of all stages add up to the model's.
    """
    total = experts = 0
    for chunk in as_chunks(model):
        specs = named_parameter_specs(chunk)
        for name, parameter in chunk.named_parameters():
            total += 0 if specs[name].copy_of else parameter.numel()
            experts += parameter.numel() if specs[name].is_expert else 0
    idle = experts - experts * config.moe_router_topk // config.num_moe_experts if config.num_moe_experts else 0
    return ParameterCount(total, experts, total - idle)
