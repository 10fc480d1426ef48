"""Pipeline parallelism: layers split into stages on several ranks, which work on several micro-batches at a time."""

from typing import TYPE_CHECKING

from megatron_lite.lazy import names_from
from megatron_lite.pipeline_layout import PipelineLayout, Stage

if TYPE_CHECKING:
    from megatron_lite.pipeline_parallel.schedules import ForwardBackward, get_forward_backward_func

__all__ = ["ForwardBackward", "PipelineLayout", "Stage", "get_forward_backward_func"]

__getattr__ = names_from(__name__, {"ForwardBackward": "schedules", "get_forward_backward_func": "schedules"})
