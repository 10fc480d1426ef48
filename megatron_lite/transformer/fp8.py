"""Which linear layers of a model multiply in fp8, and the rules for that. How they do: ops/fp8_linear.py."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_lite import parallel_state
from megatron_lite.model_parallel_config import divisors
from megatron_lite.ops.fp8_grouped_linear import Fp8GroupedLinear, has_grouped_fp8_kernels
from megatron_lite.ops.fp8_linear import FORMATS, MULTIPLE, Fp8Linear, has_fp8_kernels
from megatron_lite.process_groups import ProcessGroupCollection, group_size
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.transformer.attention_choices import decoder_layer

if TYPE_CHECKING:
    from megatron_lite.transformer.moe.experts import GroupedMLP
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
    """Let the column and row layers inside a transformer layer, and its routed experts, multiply in fp8.

    What has logical sizes that are no multiples of 16 is left as it is, at every layout.
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
    grouped_kernels = has_grouped_fp8_kernels() and config.moe_grouped_gemm
    for _, experts in _routed_experts(layer):
        group, (fc1, fc2) = experts.pg_collection.expt_tp, experts.shapes
        if _fits(*fc1):
            experts.fp8_fc1 = Fp8GroupedLinear(grouped_kernels, column_group=group)
        if _fits(*fc2):
            experts.fp8_fc2 = Fp8GroupedLinear(grouped_kernels, row_group=group)


def _linear_layers(layer: nn.Module) -> Iterator[tuple[str, ColumnParallelLinear | RowParallelLinear]]:
    for name, module in layer.named_modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and not module.is_expert:
            yield name, module


def _routed_experts(layer: nn.Module) -> "Iterator[tuple[str, GroupedMLP]]":
    from megatron_lite.transformer.moe.experts import GroupedMLP  # its configuration has the rules of this file

    for name, module in layer.named_modules():
        if isinstance(module, GroupedMLP):
            yield name, module


def _fits(*sizes: int) -> bool:
    return all(size % MULTIPLE == 0 for size in sizes)


def describe_fp8(config: "TransformerConfig", device: torch.device) -> str:
    """What start-up says of the linear layers: format, recipe, what multiplies them, and how experts differ."""

    def by(name: str, has_kernels: bool) -> str:
        return name if device.type == "cuda" and config.bf16 and has_kernels else "emulated"

    found = f"fp8 {config.fp8} {config.fp8_recipe} ({by('torch scaled_mm', has_fp8_kernels())})"
    if config.num_moe_experts is None:
        return found
    grouped = by("torch scaled_grouped_mm", config.moe_grouped_gemm and has_grouped_fp8_kernels())
    return f"{found}, routed experts e4m3 rowwise ({grouped}), the gradients of their weights not in fp8"


def fp8_remarks(layer: nn.Module, device: torch.device) -> Iterator[str]:
    """One sentence for each matrix of a transformer layer that its sizes keep out of fp8, or of its kernels."""
    for name, module in _linear_layers(layer):
        split = module.output_size if isinstance(module, ColumnParallelLinear) else module.input_size
        sizes = (module.output_size, module.input_size)
        yield from _remarks(name, sizes, split, module.tp_size, device, isinstance(module.product, Fp8Linear))
    for name, experts in _routed_experts(layer):
        ranks, (fc1, fc2) = group_size(experts.pg_collection.expt_tp), experts.shapes
        yield from _remarks(f"{name}.weight1", fc1, fc1[0], ranks, device, experts.fp8_fc1 is not None)
        yield from _remarks(f"{name}.weight2", fc2, fc2[1], ranks, device, experts.fp8_fc2 is not None)


def _remarks(
    name: str, sizes: tuple[int, int], split: int, ranks: int, device: torch.device, in_fp8: bool
) -> Iterator[str]:
    """Of a matrix [outputs, inputs], of which `ranks` divide the size `split` among them."""
    shape = f"{sizes[0]} x {sizes[1]}"
    if not _fits(*sizes):
        yield f"{name} ({shape}) is not in fp8: its sizes are no multiples of {MULTIPLE}."
    elif in_fp8 and device.type == "cuda" and not _fits(split // ranks):
        yield f"{name} ({shape}) is emulated: its parts on {ranks} ranks are no multiples of {MULTIPLE}."


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
