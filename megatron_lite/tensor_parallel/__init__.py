"""Tensor and sequence parallelism: collectives with a gradient, and the layers and loss built on them."""

from megatron_lite.tensor_parallel.checkpoint_without_output import CheckpointWithoutOutput
from megatron_lite.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron_lite.tensor_parallel.linear import linear_with_grad_accumulation_and_async_allreduce
from megatron_lite.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all,
    all_to_all_hp2sp,
    all_to_all_sp2hp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron_lite.tensor_parallel.parameters import (
    ParameterSpec,
    create_parameter,
    declare_parameter,
    initialize_parameters,
    local,
    named_parameter_specs,
)
from megatron_lite.tensor_parallel.random import checkpoint, get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron_lite.tensor_parallel.replicated_linear import ReplicatedLinear
from megatron_lite.tensor_parallel.utils import VocabUtility, broadcast_data, divide, split_tensor_along_last_dim

__all__ = [
    "CheckpointWithoutOutput",
    "ColumnParallelLinear",
    "ParameterSpec",
    "ReplicatedLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabUtility",
    "all_gather_last_dim_from_tensor_parallel_region",
    "all_to_all",
    "all_to_all_hp2sp",
    "all_to_all_sp2hp",
    "broadcast_data",
    "checkpoint",
    "copy_to_tensor_model_parallel_region",
    "create_parameter",
    "declare_parameter",
    "divide",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_cuda_rng_tracker",
    "initialize_parameters",
    "linear_with_grad_accumulation_and_async_allreduce",
    "local",
    "model_parallel_cuda_manual_seed",
    "named_parameter_specs",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_last_dim_to_tensor_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
    "split_tensor_along_last_dim",
    "vocab_parallel_cross_entropy",
]
