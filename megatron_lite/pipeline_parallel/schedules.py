"""Forward and backward over the micro-batches of a step: one after the other, or pipelined over ranks.

forward_backward = get_forward_backward_func(config, pp_group)
forward_backward(forward_step, model_chunks, micro_batches, loss_func)

The model and the loss are the caller's. How a pipeline works is in pipelined.py, which is imported where there is one.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite import parallel_state
from megatron_lite.distributed.data_parallel import set_is_last_microbatch
from megatron_lite.process_groups import group_size

if TYPE_CHECKING:
    from megatron_lite.transformer.transformer_config import TransformerConfig

MicroBatch = dict[str, Any]

ForwardStep = Callable[[nn.Module, MicroBatch, Tensor | None], Tensor]
"""(model chunk, micro-batch, hidden states [s, b, h] from the chunk before or None) -> what the chunk computes."""

LossFunc = Callable[[int, Tensor], Tensor]
"""(number of the micro-batch, output of the last chunk) -> 0-dim loss to back-propagate. Called in the order of the
micro-batches, where the last stage is."""


class ForwardBackward(Protocol):
    """What get_forward_backward_func returns."""

    def __call__(
        self,
        forward_step: ForwardStep,
        model_chunks: Sequence[nn.Module],
        micro_batches: Sequence[MicroBatch],
        loss_func: LossFunc,
        *,
        forward_only: bool = False,
    ) -> None:
        """Add the gradients of all micro-batches to the chunks' parameters, reduced over data parallel ranks once.

        Args:
            forward_step: runs one chunk.
            model_chunks: this rank's, in the order of their stages.
            micro_batches: this rank's; the same numbers on all ranks of a pipeline.
            loss_func: see LossFunc.
            forward_only: no gradients; what loss_func returns is not used.
        """


def get_forward_backward_func(config: "TransformerConfig", pp_group: ProcessGroup | None = None) -> ForwardBackward:
    """The function that runs all micro-batches of a step, as `config` says.

    Args:
        config: pipeline_model_parallel_size, pipeline_schedule and the shape of the activations.
        pp_group: ranks of this pipeline, default the global group.
    """
    if config.pipeline_model_parallel_size == 1:
        return forward_backward_no_pipelining
    group = parallel_state.get_pipeline_model_parallel_group() if pp_group is None else pp_group
    assert group is not None, "initialize_model_parallel makes the group of the pipeline"
    assert group_size(group) == config.pipeline_model_parallel_size
    from megatron_lite.pipeline_parallel.pipelined import PipelinedForwardBackward  # half a second

    return PipelinedForwardBackward(config, group)


def forward_backward_no_pipelining(
    forward_step: ForwardStep,
    model_chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_func: LossFunc,
    *,
    forward_only: bool = False,
) -> None:
    """One micro-batch after the other through a model that this rank holds whole; see ForwardBackward."""
    (model,) = model_chunks
    for number, batch in enumerate(micro_batches):
        if not forward_only:
            set_is_last_microbatch(model, number == len(micro_batches) - 1)
        loss = loss_func(number, forward_step(model, batch, None))
        if not forward_only:
            loss.backward()
