"""Forward and backward of a step, pipelined over ranks by torch.distributed.pipelining.

torch sends activations and gradients between stages and runs the actions of an order (orders.py). Between steps
nothing is kept but shapes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _batch_p2p, _PipelineScheduleRuntime

from megatron_lite.distributed.data_parallel import accumulate_gradients, begin_pipelined_step, reduce_gradients
from megatron_lite.gradient_pass import computing_only
from megatron_lite.pipeline_parallel.orders import Order, forward_actions, pipeline_order
from megatron_lite.pipeline_parallel.schedules import ForwardStep, LossFunc, MicroBatch
from megatron_lite.pipeline_parallel_config import SPLIT_BACKWARD
from megatron_lite.transformer.transformer_config import TransformerConfig

PREPARED = 8
"""Numbers of micro-batches whose schedules are kept, evaluation counted apart."""

# On an error torch writes the work of all ranks into the log, thousands of lines of it.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


class PipelinedForwardBackward:
    """The schedule of a pipeline; see ForwardBackward. Keeps what it prepared for each number of micro-batches."""

    def __init__(self, config: TransformerConfig, pp_group: ProcessGroup) -> None:
        self.config, self.group = config, pp_group
        self.layout = config.pipeline_layout
        self._prepared: dict[tuple[Any, ...], _Schedule] = {}

    def __call__(
        self,
        forward_step: ForwardStep,
        model_chunks: Sequence[nn.Module],
        micro_batches: Sequence[MicroBatch],
        loss_func: LossFunc,
        *,
        forward_only: bool = False,
    ) -> None:
        """As ForwardBackward says."""
        schedule = self._schedule(model_chunks, micro_batches, forward_only)
        numbers = torch.arange(len(micro_batches), device="cpu")
        for stage in schedule.stages:
            stage.submod.begin(forward_step, micro_batches)
        schedule.loss_func = loss_func
        if not forward_only:
            for chunk in model_chunks:
                begin_pipelined_step(chunk)
        schedule.step(numbers, target=numbers, return_outputs=False, number=numbers)
        if not forward_only:
            for chunk in model_chunks:
                reduce_gradients(chunk)
        for stage in schedule.stages:
            stage.release()

    def _schedule(
        self, model_chunks: Sequence[nn.Module], micro_batches: Sequence[MicroBatch], forward_only: bool
    ) -> "_Schedule":
        positions = micro_batches[0]["position_ids"]
        key = (len(micro_batches), tuple(positions.shape), forward_only, *map(id, model_chunks))
        if key not in self._prepared:
            if len(self._prepared) == PREPARED:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[key] = self._prepare(model_chunks, len(micro_batches), positions, forward_only)
        return self._prepared[key]

    def _prepare(
        self, model_chunks: Sequence[nn.Module], num_microbatches: int, positions: Tensor, forward_only: bool
    ) -> "_Schedule":
        """Stages around the chunks, with the shapes of what they send, and the order of their work."""
        config, layout = self.config, self.layout
        batch, length = positions.shape
        if config.sequence_parallel:
            length //= config.tensor_model_parallel_size
        dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
        # Shapes alone: torch makes its buffers from them.
        hidden = torch.empty(length, batch, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        of_losses = torch.float64 if config.params_dtype == torch.float64 else torch.float32
        depths = () if forward_only or not config.mtp_num_layers else (1 + config.mtp_num_layers,)
        losses = torch.empty((*depths, *positions.shape), dtype=of_losses, device="meta", requires_grad=True)
        last = len(layout.stages) - 1
        stages = [
            _Stage(
                _ChunkOfMicroBatch(chunk),
                stage,
                last + 1,
                positions.device,
                input_args=number if stage == 0 else hidden,
                output_args=losses if stage == last else hidden,
                group=self.group,
                dw_builder=None if self._splits_backward(chunk) else _nothing_left,
            )
            for stage, chunk in zip(layout.stages_of(self.group.rank()), model_chunks, strict=True)
        ]
        order = pipeline_order(config.schedule, layout, num_microbatches)
        return _Schedule(stages, num_microbatches, order, forward_only)

    def _splits_backward(self, chunk: nn.Module) -> bool:
        """Whether the gradients of weights are computed apart.

        Not where layers give both kinds of gradients in one piece, compiled or by config.gradients_together, nor with
        multi-token prediction, which reads the output layer and the embedding several times: torch goes wrong about
        weights that are connected in several places. There all is computed with the gradients of the activations.
        """
        whole = self.config.gradients_together is not None or getattr(chunk, "mtp", None) is not None
        compiled = any(getattr(module, "is_compiled", False) for module in chunk.modules())
        return self.config.schedule in SPLIT_BACKWARD and not whole and not compiled


class _ChunkOfMicroBatch(nn.Module):
    """A model chunk as torch's stages call it: with the number of a micro-batch instead of what is in it.

    So nothing but activations goes through torch's schedules, which split and merge what they are given.
    """

    def __init__(self, chunk: nn.Module) -> None:
        super().__init__()
        self.chunk = chunk
        self._forward_step: ForwardStep | None = None
        self._micro_batches: Sequence[MicroBatch] = ()

    def begin(self, forward_step: ForwardStep | None, micro_batches: Sequence[MicroBatch]) -> None:
        """What the next step runs, and on what."""
        self._forward_step, self._micro_batches = forward_step, micro_batches

    def forward(self, received: Tensor, number: Tensor) -> Tensor:
        """`received`: hidden states [s, b, h]; of no meaning in the first stage. `number`: [1], on the CPU."""
        assert self._forward_step is not None
        decoder_input = None if self.chunk.pre_process else received
        output = self._forward_step(self.chunk, self._micro_batches[int(number)], decoder_input)
        # Schedules that split the backward detach outputs in place, which is not allowed on a view.
        return output.clone() if output._is_view() else output


class _Stage(PipelineStage):
    """torch's stage, with gradients accumulated as FSDP2 does, and with memory only for what is under way.

    torch keeps two buffers for every micro-batch of the step, what was sent until the end of the step, and in an
    evaluation all that was computed. With many micro-batches that is more than the layers' activations. Here buffers
    are made when something is received and let go when it has been read, and so is what was sent and has arrived.
    """

    submod: _ChunkOfMicroBatch

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sends: list[dist.Work] = []

    def _prepare_forward_infra(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_forward_infra(*arguments, **options)
        self._shape = _let_go(self.args_recv_info)
        return prepared

    def _prepare_backward_infra(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_backward_infra(*arguments, **options)
        self._gradient_shape = _let_go(self.grad_recv_info)
        return prepared

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """Receive activations into a new buffer."""
        _make_room(self.args_recv_info[fwd_chunk_id], self._shape, self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """Receive gradients into a new buffer."""
        _make_room(self.grad_recv_info[bwd_chunk_id], self._gradient_shape, self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send activations; none are left for torch to send."""
        self._send(super().get_fwd_send_ops(fwd_chunk_id))
        if not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send gradients; none are left for torch to send."""
        self._send(super().get_bwd_send_ops(bwd_chunk_id))
        return []

    def _send(self, operations: list[dist.P2POp]) -> None:
        """Send, and wait for what was sent long ago: a send that is not waited for keeps its tensor.

        Every order works with sends that wait for their receiver at once, so none gets stuck with some under way.
        """
        while len(self._sends) > self.group_size:
            self._sends.pop(0).wait()
        self._sends += _batch_p2p(operations)

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """The forward of a micro-batch, whose graph holds from now on what was received."""
        with _plain_errors():
            output = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        _let_go({fwd_chunk_id: self.args_recv_info[fwd_chunk_id]})
        following = self.stage_index_to_group_rank.get(self.stage_index + 1, self.group_rank)
        if not self.has_backward and following == self.group_rank:  # nothing to send
            del self.fwd_cache[fwd_chunk_id]
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        """The backward of a micro-batch, behind which the received gradient is not needed."""
        splits = self._computes_apart and not options.get("full_backward", True)
        with _plain_errors(), computing_only("activations") if splits else nullcontext():
            super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        _let_go({bwd_chunk_id: self.grad_recv_info[bwd_chunk_id]})

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The gradients of weights, added up in the dtype they are reduced in as after a whole backward."""
        with computing_only("weights") if self._computes_apart else nullcontext():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        accumulate_gradients(self.submod.chunk)

    @property
    def _computes_apart(self) -> bool:
        """Whether torch computes the two kinds of gradients apart; the first stage's come together, last."""
        return self.dw_builder is None and not self.is_first

    def release(self) -> None:
        """Finish sending, and forget the micro-batches."""
        for send in self._sends:
            send.wait()
        self._sends = []
        self.clear_runtime_states()
        self.submod.begin(None, ())


@contextmanager
def _plain_errors() -> Iterator[None]:
    """An error of the model as it was raised, which torch wraps in another one with all that is known of the stage."""
    try:
        yield
    except RuntimeError as error:
        raise (error.__cause__ or error) from None


def _let_go(received: Mapping[int, Sequence[Any]]) -> Tensor | None:
    """Free the buffers of micro-batches; returns the shape of one of them, without storage, if there are any."""
    shape = None
    for infos in received.values():
        for info in infos:
            if not info.is_root_arg and info.buffer is not None:
                shape = torch.empty_like(info.buffer, device="meta", requires_grad=False)
                info.buffer = None
    return shape


def _make_room(infos: Sequence[Any], shape: Tensor | None, device: torch.device) -> None:
    """A new buffer for each thing that will be received."""
    for info in infos:
        if not info.is_root_arg and shape is not None:
            info.buffer = torch.empty_like(shape, device=device)


class _Schedule(_PipelineScheduleRuntime):
    """torch's runtime with the order of work given."""

    def __init__(self, stages: list[_Stage], num_microbatches: int, order: Order, forward_only: bool) -> None:
        super().__init__(stages, num_microbatches, loss_fn=self._loss, scale_grads=False)
        self.stages: list[_Stage] = stages
        self.loss_func: LossFunc | None = None
        self._has_backward = not forward_only
        self.pipeline_order = {rank: list(actions) for rank, actions in order.items()}
        # Checks that each stage is on one rank and does everything once, and puts sends and receives in.
        self._prepare_schedule_with_comms(self.pipeline_order)
        if forward_only:
            self.pipeline_order_with_comms = {
                rank: forward_actions(actions) for rank, actions in self.pipeline_order_with_comms.items()
            }

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Any:
        """The loss to back-propagate; torch keeps it until the end of the step, and its graph would keep the rest."""
        loss = super()._maybe_get_loss(stage, mb_index)
        if loss is not None:
            self._internal_losses[mb_index] = loss.detach()
        return loss

    def _loss(self, output: Tensor, number: Tensor) -> Tensor:
        assert self.loss_func is not None
        return self.loss_func(int(number), output)


def _nothing_left() -> Callable[[], None]:
    """For a stage whose weights get their gradients with the activations: what is left to do later."""
    return lambda: None
