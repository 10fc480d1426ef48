"""Data parallelism: FSDP2 wrapping and the last reductions of gradients."""

from megatron_lite.data_parallel_config import DistributedDataParallelConfig
from megatron_lite.distributed.data_parallel import (
    accumulate_gradients,
    begin_pipelined_step,
    reduce_gradients,
    reshard_parameters,
    set_is_last_microbatch,
    wrap_data_parallel,
)
from megatron_lite.distributed.finalize_model_grads import finalize_model_grads

__all__ = [
    "DistributedDataParallelConfig",
    "accumulate_gradients",
    "begin_pipelined_step",
    "finalize_model_grads",
    "reduce_gradients",
    "reshard_parameters",
    "set_is_last_microbatch",
    "wrap_data_parallel",
]
