"""What the layout matrix does not show of pipelines: low precision, communication, buffers, who reads what."""

import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite import parallel_state
from megatron_lite.checkpoint import CheckpointError, verify_replicas
from megatron_lite.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron_lite.distributed.tied_embeddings import tied_weights
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_lite.pipeline_parallel import get_forward_backward_func, pipelined
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.training import step
from megatron_lite.training.batches import PositionsOnly, names_read
from megatron_lite.training.initialize import set_random_seed
from megatron_lite.training.setup import build_model
from megatron_lite.training.step import forward_backward, train_step
from tests.parallel.layouts import (
    SEED,
    SEQUENCE,
    VOCABULARY,
    Layout,
    gpt_config,
    initialize,
    micro_batches,
    transformer_config,
    whole,
)

LEARNING_RATE = 0.01


def build(layout: Layout, optimizer: OptimizerConfig | None = None, **settings: Any) -> tuple[Any, ...]:
    """The chunks and the optimizer of this rank, in another dtype than float64, and how to run them."""
    initialize(layout)
    config = replace(transformer_config(layout), fp64=False, **{"params_dtype": torch.float32, **settings})
    ddp = DistributedDataParallelConfig(data_parallel_sharding_strategy=layout.strategy)
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": SEQUENCE, "device": torch.device("cpu"), "seed": SEED}
    chunks = build_model(config, gpt_config(layout), ddp, **sizes)
    made = get_megatron_optimizer(optimizer or OptimizerConfig(optimizer="sgd", lr=LEARNING_RATE), chunks)
    how = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "forward_backward_func": get_forward_backward_func(config),
    }
    return chunks, made, how


def batches_of(layout: Layout, chunks: list[torch.nn.Module], step: int = 0) -> list[dict[str, Any]]:
    return micro_batches(layout, step, parallel_state.get_data_parallel_rank(), names_read(chunks))


def gradients_of(rank: int, world_size: int, layout: Layout, accumulating: bool, settings: dict) -> dict[str, Tensor]:
    """The gradients of a step, whole, of the parameters on this rank."""
    chunks, optimizer, how = build(layout, **settings)
    broken = mock.patch.object(pipelined, "accumulate_gradients", return_value=None)
    with broken if not accumulating else mock.MagicMock():
        forward_backward(chunks, optimizer, batches_of(layout, chunks), **how)
    finalize_model_grads(chunks, parallel_state.get_tensor_model_parallel_group())
    return {name: whole(p.grad) for chunk in chunks for name, p in chunk.named_parameters() if p.grad is not None}


def largest_error(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    """Over all parameters, relative to the largest element of each."""
    joined = [{name: tensor for rank in ranks for name, tensor in rank.items()} for ranks in (found, wanted)]
    assert joined[0].keys() == joined[1].keys()
    errors = {
        name: ((joined[0][name] - gradient).abs().max() / gradient.abs().max()).item()
        for name, gradient in joined[1].items()
        if "k_layernorm.bias" not in name  # zero in exact arithmetic
    }
    return max(errors.values())


def test_split_backward_accumulates_in_float32(pool):
    """T25: bfloat16 under FSDP. Weights' gradients that come late are added up in the dtype they are reduced in.

    Mutation, run here: leave them where autograd puts them, in bfloat16.
    """
    v_shaped = Layout(pp=2, dp=2, layers=4, schedule="zbv", strategy="optim", accumulation=6)
    whole_backward = replace(v_shaped, schedule="gpipe", chunks=2)
    settings = {"bf16": True, "params_dtype": torch.bfloat16}
    wanted = pool.run(gradients_of, whole_backward, True, settings, world_size=4)
    assert largest_error(pool.run(gradients_of, v_shaped, True, settings, world_size=4), wanted) < 1e-5
    assert largest_error(pool.run(gradients_of, v_shaped, False, settings, world_size=4), wanted) > 1e-3


class Products(TorchDispatchMode):
    """Counts multiplications of matrix products. (torch's counter of operations fails in a split backward pass.)"""

    multiplications = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        output = function(*arguments, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.bmm.default):
            self.multiplications += output.numel() * arguments[0].size(-1)
        if function is torch.ops.aten.addmm.default:
            self.multiplications += output.numel() * arguments[1].size(-1)
        return output


def products_of(rank: int, world_size: int, layout: Layout) -> int:
    """Multiplications in this rank's products of a step."""
    chunks, optimizer, how = build(layout)
    with Products() as counter:
        forward_backward(chunks, optimizer, batches_of(layout, chunks), **how)
    return counter.multiplications


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, tp=2, sp=True, layers=4, schedule="zbv", accumulation=3),
        Layout(pp=2, tp=2, sp=True, overlap=True, layers=4, schedule="zbv", accumulation=3),
        Layout(pp=2, moe="gated", layers=4, schedule="zbv", accumulation=3),
    ],
    ids=lambda layout: layout.name,
)
def test_split_backward_computes_nothing_twice(pool, layout):
    """A Function cannot tell the two passes apart by itself. Mutations: not told in either pass."""
    whole_backward = replace(layout, schedule="gpipe", chunks=2)
    found, wanted = (pool.run(products_of, one, world_size=one.world_size) for one in (layout, whole_backward))
    assert sum(found) == sum(wanted) > 0


@pytest.mark.parametrize("settings", [{"bf16": True, "params_dtype": torch.bfloat16, "fp32_residual_connection": True}])
def test_the_residual_stream_travels_in_float32(pool, settings):
    """Mutation: send bfloat16; the loss moves."""
    layout = Layout(pp=2, accumulation=3)
    found = pool.run(gradients_of, layout, True, settings, world_size=2)
    wanted = pool.run(gradients_of, replace(layout, pp=1), True, settings, world_size=1)
    for ranks in found:
        ranks.pop("output_layer.weight", None)  # the copy of the embeddings
    assert largest_error(found, wanted) < 1e-5


def overflow(rank: int, world_size: int, layout: Layout) -> tuple[float, float, bool, list[float]]:
    """A float16 step in which one gradient of the second rank overflows, then some in which none does."""
    config = OptimizerConfig(optimizer="sgd", lr=LEARNING_RATE, fp16=True, initial_loss_scale=2.0**10, hysteresis=1)
    chunks, optimizer, how = build(layout, config, fp16=True, params_dtype=torch.float16)
    before = [local(parameter.detach()).clone() for chunk in chunks for parameter in chunk.parameters()]
    groups = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "pp_group": parallel_state.get_pipeline_model_parallel_group(),
    }
    batches = batches_of(layout, chunks)

    def overflowing(*arguments: Any) -> None:
        finalize_model_grads(*arguments)
        if rank == 1:
            local(next(chunks[0].parameters()).grad).fill_(torch.inf)

    with mock.patch.object(step, "finalize_model_grads", overflowing):
        output = train_step(chunks, optimizer, batches, **groups, **how)
    after = [local(parameter.detach()) for chunk in chunks for parameter in chunk.parameters()]
    unmoved = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    scale = optimizer.get_loss_scale().item()
    optimizer.grad_scaler.scale.fill_(16.0)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    losses = [train_step(chunks, optimizer, batches, **groups, **how).loss.item() for _ in range(3)]
    return output.found_inf.item(), scale, unmoved, losses


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_an_overflow_skips_the_step_of_every_stage(pool, schedule):
    """fp16: one decision for the whole pipeline, and the loss scale falls everywhere. Mutation: a norm by stage."""
    found = pool.run(overflow, Layout(pp=2, layers=4, schedule=schedule, accumulation=2), world_size=2)
    assert [(inf, scale, unmoved) for inf, scale, unmoved, _ in found] == [(1.0, 2.0**9, True)] * 2
    assert found[0][3] == found[1][3]
    assert found[0][3][2] < found[0][3][0]


def reductions(rank: int, world_size: int, layout: Layout) -> int:
    """How often FSDP2 reduces the gradients of a unit in a second step."""
    chunks, optimizer, how = build(layout)
    with mock.patch.object(_fsdp_param_group, "foreach_reduce", wraps=_fsdp_param_group.foreach_reduce) as reduce:
        for step in range(2):
            reduce.reset_mock()
            forward_backward(chunks, optimizer, batches_of(layout, chunks, step), **how)
    return reduce.call_count


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("strategy", ["no_shard", "optim_grads"])
def test_gradients_are_reduced_once_a_step(pool, schedule, strategy):
    """As many reductions with 6 micro-batches as with 1. Mutation: begin_pipelined_step without its first line."""
    layout = Layout(pp=2, dp=2, layers=4, schedule=schedule, strategy=strategy)
    one, six = (pool.run(reductions, replace(layout, accumulation=number), world_size=4)[0] for number in (1, 6))
    assert one == six == 3 + (schedule == "zbv")  # two layers and the embedding; in a V the output layer too


def most_alive(rank: int, world_size: int, layout: Layout, forward_only: bool) -> int:
    """The most hidden states that live at a time on this rank, received, computed by a stage, or sent."""
    chunks, optimizer, how = build(layout)
    seen: list[weakref.ref[Tensor]] = []
    most = [0]

    def watch(*tensors: Tensor) -> None:
        seen.extend(weakref.ref(tensor) for tensor in tensors if tensor.size(-1) == 32)
        alive = {id(tensor()) for tensor in seen} - {id(None)}
        most[0] = max(most[0], len(alive))

    make_room, send = pipelined._make_room, pipelined._Stage._send
    forward = pipelined._ChunkOfMicroBatch.forward

    def watched_room(infos: Any, *arguments: Any) -> None:
        make_room(infos, *arguments)
        watch(*[info.buffer for info in infos if info.buffer is not None])

    def watched_send(self: Any, operations: Any) -> None:
        watch(*[operation.tensor for operation in operations])
        send(self, operations)

    def watched_forward(self: Any, received: Tensor, number: Tensor) -> Tensor:
        output = forward(self, received, number)
        watch(output)
        return output

    with (
        mock.patch.object(pipelined, "_make_room", watched_room),
        mock.patch.object(pipelined._Stage, "_send", watched_send),
        mock.patch.object(pipelined._ChunkOfMicroBatch, "forward", watched_forward),
        torch.set_grad_enabled(not forward_only),
    ):
        batches = batches_of(layout, chunks)
        if forward_only:
            how["forward_backward_func"](
                step.forward_step, chunks, batches, lambda number, losses: losses.sum(), forward_only=True
            )
        else:
            forward_backward(chunks, optimizer, batches, **how)
    return most[0]


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_memory_does_not_grow_with_the_number_of_micro_batches(pool, schedule, forward_only):
    """Twice as many micro-batches, as many hidden states alive. torch's own stages keep some for each of them.

    Mutations: buffers that are not let go; losses that are not detached (training); outputs kept in an evaluation;
    sends that are waited for at the end of the step.
    """
    layout = Layout(pp=2, layers=4, schedule=schedule)
    few, many = (
        pool.run(most_alive, replace(layout, accumulation=number), forward_only, world_size=2) for number in (6, 12)
    )
    assert all(b <= a + 1 for a, b in zip(few, many, strict=True)), (few, many)


def failing(rank: int, world_size: int, layout: Layout) -> str:
    """What is raised where a stage fails."""
    chunks, _, how = build(layout)
    batches = batches_of(layout, chunks)

    def forward_step(*arguments: Any) -> Tensor:
        raise ConfigError("a mistake of the user")

    # The other rank loses its connection.
    with pytest.raises(ConfigError if rank == 0 else RuntimeError) as caught:
        how["forward_backward_func"](forward_step, chunks, batches, lambda number, losses: losses)
    return str(caught.value)


def test_an_error_in_a_stage_is_the_error(pool):
    """torch would raise a RuntimeError about the stage, and log the work of all ranks. Mutation: let it."""
    assert pool.run(failing, Layout(pp=2), world_size=2)[0] == "a mistake of the user"


def changing_numbers(rank: int, world_size: int, layout: Layout) -> list[float]:
    """Losses of steps whose batches are cut into other numbers of micro-batches, as when the batch grows."""
    chunks, optimizer, how = build(layout)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    losses = []
    for accumulation in (1, 4, 2, 4):
        batches = batches_of(replace(layout, accumulation=accumulation), chunks)
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        losses.append(train_step(chunks, optimizer, batches, tp_group=None, pp_group=pp_group, **how).loss.item())
    return losses


def test_the_number_of_micro_batches_may_change(pool):
    """Nothing is learned (the learning rate is 0), so all losses are equal; on all ranks."""
    found = pool.run(changing_numbers, Layout(pp=2, schedule="interleaved", chunks=2, layers=4), world_size=2)
    assert found[0] == found[1]
    assert found[0] == pytest.approx([found[0][0]] * 4, rel=1e-5)


def what_is_read(rank: int, world_size: int, layout: Layout) -> tuple[set[str], set[str]]:
    chunks, *_ = build(layout)
    return names_read(chunks), set(batches_of(layout, chunks)[0])


def test_only_the_ends_read_the_text(pool):
    """T52. Mutations: labels in the first stage; tokens in all."""
    common = {"position_ids", "token_numbers"}
    expected = [{"tokens"}, set(), {"labels", "loss_mask"}]
    for (names, found), wanted in zip(
        pool.run(what_is_read, Layout(pp=3, layers=3), world_size=3), expected, strict=True
    ):
        assert names == wanted
        assert found == common | wanted
    v_shaped = pool.run(what_is_read, Layout(pp=2, layers=4, schedule="zbv"), world_size=2)
    assert [names for names, _ in v_shaped] == [{"tokens", "labels", "loss_mask"}, set()]


def test_positions_stand_for_samples_nobody_reads():
    positions = PositionsOnly(["sample"] * 7, 5)
    assert len(positions) == 7
    assert positions[3]["position_ids"].tolist() == [0, 1, 2, 3, 4]


def drawn(rank: int, world_size: int, layout: Layout) -> float:
    """The first random number of this rank's default stream."""
    initialize(layout)
    set_random_seed(SEED)
    return torch.rand(()).item()


def test_stages_draw_numbers_of_their_own(pool):
    """T12. Tensor parallel ranks of a stage share the default stream. Mutation: a seed without the stage."""
    first, same, second, also = pool.run(drawn, Layout(pp=2, tp=2), world_size=4)
    assert (first, second) == (same, also)
    assert first != second


def drifted(rank: int, world_size: int, layout: Layout) -> str:
    """What is said before a save when the copy of the embeddings is not what it should be."""
    chunks, *_ = build(layout)
    tied = tied_weights(chunks)
    if tied is not None and tied.copy is not None:
        with torch.no_grad():
            local(tied.copy)[0, 0] += 1e-3
    try:
        verify_replicas(chunks, embedding_group=parallel_state.get_embedding_group(check_initialized=False))
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_copy_that_drifted_is_noticed(pool):
    """T33. Mutation: compare over the data parallel ranks."""
    for message in pool.run(drifted, Layout(pp=3, layers=3), world_size=3):
        assert "first and last pipeline stage should hold equal copies of the tied embeddings" in message
