"""Data parallelism: FSDP2 wrapping and the last reductions of gradients."""

from megatron_lite.distributed.config import DistributedDataParallelConfig
from megatron_lite.distributed.data_parallel import reshard_parameters, set_is_last_microbatch, wrap_data_parallel
from megatron_lite.distributed.finalize_model_grads import finalize_model_grads

__all__ = [
    "DistributedDataParallelConfig",
    "finalize_model_grads",
    "reshard_parameters",
    "set_is_last_microbatch",
    "wrap_data_parallel",
]
