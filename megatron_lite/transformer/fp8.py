"""Which linear layers of a model multiply in fp8, and the rules for that. How they do: ops/fp8_linear.py."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_lite import parallel_state
from megatron_lite.model_parallel_config import divisors
from megatron_lite.ops.fp8_linear import FORMATS, MULTIPLE, Fp8Linear, has_fp8_kernels
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.transformer.attention_choices import decoder_layer

if TYPE_CHECKING:
    from megatron_lite.transformer.transformer_config import TransformerConfig


def is_fp8_layer(config: "TransformerConfig", layer_number: int) -> bool:
    """Whether transformer layer `layer_number`, counted from 1, is not one of those kept out of fp8 at the ends."""
    if config.fp8 is None or not config.first_last_layers_bf16:
        return config.fp8 is not None
    last = config.num_layers - config.num_layers_at_end_in_bf16
    return config.num_layers_at_start_in_bf16 < decoder_layer(config, layer_number) <= last


def use_fp8(
    layer: nn.Module, config: "TransformerConfig", layer_number: int, pg_collection: ProcessGroupCollection | None
) -> None:
    """Let the column and row layers inside a transformer layer multiply in fp8, but those of routed experts.

    One whose logical sizes are no multiples of 16 is left as it is, at every layout.
    """
    if config.fp8 is None or not is_fp8_layer(config, layer_number):
        return
    context = (
        parallel_state.get_context_parallel_group(check_initialized=False)
        if pg_collection is None
        else pg_collection.cp
    )
    kernels = has_fp8_kernels()
    for _, module in _linear_layers(layer):
        if not _fits(module.input_size, module.output_size):
            continue
        is_column = isinstance(module, ColumnParallelLinear)
        module.product = Fp8Linear(
            gradient_dtype=FORMATS[config.fp8],
            recipe=config.fp8_recipe,
            kernels=kernels,
            column_group=module.tp_group if is_column and module.communicates else None,
            row_group=None if is_column or not module.communicates else module.tp_group,
            sequence_group=module.tp_group if is_column and module.sequence_parallel else None,
            context_group=context,
        )


def _linear_layers(layer: nn.Module) -> Iterator[tuple[str, ColumnParallelLinear | RowParallelLinear]]:
    for name, module in layer.named_modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and not module.is_expert:
            yield name, module


def _fits(*sizes: int) -> bool:
    return all(size % MULTIPLE == 0 for size in sizes)


def describe_fp8(config: "TransformerConfig", device: torch.device) -> str:
    """What start-up says of the linear layers: format, recipe, what multiplies them, and what goes without."""
    kernels = device.type == "cuda" and config.bf16 and has_fp8_kernels()
    experts = "" if config.num_moe_experts is None else ", routed experts not in fp8"
    return f"fp8 {config.fp8} {config.fp8_recipe} ({'torch scaled_mm' if kernels else 'emulated'}){experts}"


def fp8_remarks(layer: nn.Module, device: torch.device) -> Iterator[str]:
    """One sentence for each linear layer of a transformer layer that its sizes keep out of fp8, or of its kernels."""
    for name, module in _linear_layers(layer):
        shape = f"{module.output_size} x {module.input_size}"
        columns, rows = getattr(module, "output_size_per_partition", 0), getattr(module, "input_size_per_partition", 0)
        if not _fits(module.input_size, module.output_size):
            yield f"{name} ({shape}) is not in fp8: its sizes are no multiples of {MULTIPLE}."
        elif module.product is not None and device.type == "cuda" and not _fits(columns, rows):
            yield f"{name} ({shape}) is emulated: its parts on {module.tp_size} ranks are no multiples of {MULTIPLE}."


def fp8_violations(config: "TransformerConfig") -> Iterator[str]:
    """Every rule that the fp8 settings break."""
    if config.fp8 is None:
        return
    if not (config.bf16 or config.fp64):
        yield (
            f"fp8_format is {config.fp8} without bf16, but what is not multiplied in fp8 is computed in bfloat16: add "
            "--bf16 (or --fp64, to compare one layout with another)."
        )
    tp, groups = config.tensor_model_parallel_size, config.num_query_groups or config.num_attention_heads
    if groups < tp and not config.multi_latent_attention:
        yield (
            f"fp8_format is {config.fp8} with num_query_groups {groups} and tensor_model_parallel_size {tp}, but ranks "
            "that share a key/value head have parts of its gradient, and rounding parts to fp8 is not rounding their "
            f"sum: use a tensor_model_parallel_size among {divisors(groups)}, or leave out --fp8-format."
        )
    if config.first_last_layers_bf16:
        first, last = config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16
        if min(first, last) < 0 or (first + last >= config.num_layers > 0):
            yield (
                f"num_layers_at_start_in_bf16 is {first} and num_layers_at_end_in_bf16 {last}, but neither may be "
                f"negative, and of the {config.num_layers} layers one must be left for fp8: choose fewer."
            )
