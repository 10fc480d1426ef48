"""Pipeline parallelism: layers split into stages on several ranks, which work on several micro-batches at a time."""

from megatron_lite.pipeline_parallel.layout import PipelineLayout, Stage
from megatron_lite.pipeline_parallel.schedules import ForwardBackward, get_forward_backward_func

__all__ = ["ForwardBackward", "PipelineLayout", "Stage", "get_forward_backward_func"]
