"""MegatronModule, the base of every module built from a config, and how a module finds its tensor parallel group."""

import torch
import torch.distributed as dist

from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.parallel_state import get_tensor_model_parallel_group
from megatron_lite.process_groups import ProcessGroupCollection


class MegatronModule(torch.nn.Module):
    """A module that keeps the configuration it was built from as `self.config`."""

    config: ModelParallelConfig

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.config = config


def tensor_parallel_group(pg_collection: ProcessGroupCollection | None) -> dist.ProcessGroup | None:
    """The tensor parallel group of a module: the collection's, else the global one, else None (one process)."""
    if pg_collection is not None:
        return pg_collection.tp
    return get_tensor_model_parallel_group(check_initialized=False)
