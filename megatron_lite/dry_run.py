"""--dry-run: what one rank of a run would hold, worked out without a cluster.

Rank 0 is built exactly as for training, on the meta device (shapes without storage) and under a process group whose
collectives do nothing. So layout, parameters and bytes are read off the real modules rather than estimated.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.distributed import wrap_data_parallel
from megatron_lite.errors import ConfigError
from megatron_lite.num_microbatches_calculator import build_num_microbatches_calculator
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.tokenizers import build_tokenizer
from megatron_lite.training.initialize import initialize_parallel_groups
from megatron_lite.training.setup import build_gpt
from megatron_lite.transformer.attention_choices import describe_communication

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of the whole model and of what one rank is responsible for.

    Attributes:
        total: logical elements, each once, padding of the vocabulary included.
        padding: how many of `total` belong to vocabulary entries that do not exist.
        tensor_parallel_shard: elements of this rank's tensor parallel part, the ones it computes with.
        stored: elements this rank keeps between steps, as master weights and optimizer state.
        largest_layer: tensor parallel part of the largest transformer layer.
    """

    total: int
    padding: int
    tensor_parallel_shard: int
    stored: int
    largest_layer: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at the end of the backward pass of the last micro-batch."""

    master_weights: int
    compute_weights: int
    gradients: int
    optimizer_state: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.master_weights + self.compute_weights + self.gradients + self.optimizer_state + self.activations


def dry_run(run: RunConfig) -> None:
    """Print the report of `describe`; under torchrun the first rank speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(describe(run))


def describe(run: RunConfig) -> str:
    """Layout, parameters, memory per rank and batch arithmetic of a run.

    Raises:
        ConfigError: the size of the vocabulary is not known without files that are missing.
    """
    vocab_size = _vocab_size(run)
    with fake_cluster(run):
        with torch.device("meta"):
            model = build_gpt(run.transformer, run.gpt, vocab_size, run.data.seq_length or 0)
        tensor_shards = _tensor_parallel_sizes(model)
        padding = (model.padded_vocab_size - vocab_size) * (run.transformer.hidden_size or 0)
        padding *= 1 if run.gpt.share_embeddings_and_output_weights else 2
        wrap_data_parallel(model, run.transformer, run.ddp, parallel_state.get_dense_mesh())
        size = _model_size(model, tensor_shards, padding)
        layout = list(_layout_lines(run))
    memory = memory_of(run, size)
    sections = {
        f"Layout of {run.world_size:,} rank{'s' if run.world_size > 1 else ''}": layout,
        "Parameters": list(_parameter_lines(run, size)),
        "Memory of rank 0": list(_memory_lines(run, memory)),
        "Batch": list(_batch_lines(run)),
    }
    blocks = ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()]
    return "\n".join([*run.notices, *blocks])


@contextmanager
def fake_cluster(run: RunConfig) -> Iterator[None]:
    """This process as rank 0 of `run.world_size` ranks, whose collectives return at once without moving data."""
    if dist.is_initialized():
        raise ConfigError("A dry run makes its own process group, but torch.distributed is already initialized.")
    dist.init_process_group("fake", rank=0, world_size=run.world_size, store=FakeStore())
    try:
        initialize_parallel_groups(run)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def _vocab_size(run: RunConfig) -> int:
    """The vocabulary before padding: as given, or the tokenizer's if its files are here."""
    if run.gpt.vocab_size is not None:
        return run.gpt.vocab_size
    try:
        return build_tokenizer(run.tokenizer).vocab_size
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"The tokenizer does not tell its vocabulary size ({error}); write --vocab-size N."
        ) from error


def _tensor_parallel_sizes(model: nn.Module) -> dict[str, int]:
    """Elements of this rank's tensor parallel part of each parameter, before data parallel sharding."""
    return {name: local(parameter).numel() for name, parameter in model.named_parameters()}


def _model_size(model: nn.Module, tensor_shards: dict[str, int], padding: int) -> ModelSize:
    """Count a model wrapped for data parallelism."""
    total = stored = 0
    layers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        stored += local(parameter).numel()
        if ".layers." in name:
            layer = name.split(".layers.")[1].split(".")[0]
            layers[layer] = layers.get(layer, 0) + tensor_shards[name]
    return ModelSize(total, padding, sum(tensor_shards.values()), stored, max(layers.values(), default=0))


def memory_of(run: RunConfig, size: ModelSize) -> Memory:
    """Bytes of one rank under its data parallel strategy.

    Master weights, gradients and optimizer state are as stored. Weights are computed with in `params_dtype`, gathered:
    the whole tensor parallel part, or under optim_grads_params two layers (one in use, one on its way) and what
    belongs to no layer. A rank that shares its part with none (data and context parallel) has no second copy if it
    computes in the masters' dtype. Under optim, gradients of several micro-batches also wait whole for their one
    reduction.
    """
    main, compute = run.transformer.main_params_dtype.itemsize, run.transformer.params_dtype.itemsize
    split_parameters = run.ddp.data_parallel_sharding_strategy == "optim_grads_params"
    outside_layers = size.tensor_parallel_shard - size.largest_layer * run.transformer.num_layers
    gathered = size.tensor_parallel_shard
    if split_parameters:
        gathered = min(gathered, 2 * size.largest_layer + max(outside_layers, 0))
    if run.data_parallel_size * run.transformer.context_parallel_size == 1 and main == compute:
        gathered = 0
    waits_whole = run.ddp.data_parallel_sharding_strategy == "optim" and _micro_batches(run) > 1
    reduce = 2 if run.ddp.grad_reduce_in_bf16 else main
    moments = 2 if run.optimizer.optimizer == "adam" else int(run.optimizer.sgd_momentum > 0)
    return Memory(
        master_weights=size.stored * main,
        compute_weights=gathered * compute,
        gradients=size.stored * main + (size.tensor_parallel_shard * reduce if waits_whole else 0),
        optimizer_state=size.stored * main * moments,
        activations=activation_bytes(run),
    )


def activation_bytes(run: RunConfig) -> int:
    """Bytes that the layers keep for the backward of one micro-batch, attention as one fused operation.

    The tokens are this context parallel rank's part of the sequences, padding included.
    Per token and layer: the inputs of both norms and of the two matrices after them (4 h, split over tensor ranks
    only with sequence parallelism), queries, keys, values and the attention's output, and two or three activations
    of the MLP (f each, split over tensor ranks). Full recomputation keeps one layer input (h) for each recomputed
    unit, and one unit's activations while it is recomputed. Left out: dropout masks, the loss (it runs in chunks), and
    what context parallel ranks have of each other's keys and values.
    """
    c = run.transformer
    tp = c.tensor_model_parallel_size
    heads = c.kv_channels or 0
    tokens = (run.training.micro_batch_size or 1) * run.padded_sequence_length // c.context_parallel_size
    stream = c.hidden_size / (tp if c.sequence_parallel else 1)
    attention = (2 * c.num_attention_heads + 2 * (c.num_query_groups or 0)) * heads / tp
    mlp = (3 if c.gated_linear_unit else 2) * (c.ffn_hidden_size or 0) / tp
    layer = 4 * stream + attention + mlp
    layers = float(c.num_layers)
    elements = layers * layer
    if c.recompute_granularity == "full" and c.recompute_num_layers:
        n = min(c.recompute_num_layers, c.num_layers)
        if c.recompute_method == "uniform":
            elements = math.ceil(layers / n) * stream + n * layer
        else:
            elements = n * stream + (layers - n) * layer + layer
    return int(tokens * elements * c.params_dtype.itemsize)


def _micro_batches(run: RunConfig) -> int:
    return run.global_batch_size // ((run.training.micro_batch_size or 1) * run.data_parallel_size)


def _layout_lines(run: RunConfig) -> Iterator[str]:
    sizes = run.transformer
    sequence = " with sequence parallelism" if sizes.sequence_parallel else ""
    groups = [
        (
            f"tensor parallel {sizes.tensor_model_parallel_size}{sequence}",
            parallel_state.get_tensor_model_parallel_group(),
        ),
        (f"data parallel {run.data_parallel_size}", parallel_state.get_data_parallel_group()),
    ]
    if sizes.context_parallel_size > 1:
        name = f"context parallel {sizes.context_parallel_size} by {describe_communication(sizes)}"
        groups.insert(1, (name, parallel_state.get_context_parallel_group()))
    for name, group in groups:
        assert group is not None
        yield f"{name}: rank 0 {_company(dist.get_process_group_ranks(group))}"
    mesh = parallel_state.get_dense_mesh()
    shape = ", ".join(f"{name} {size}" for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    yield f"mesh: {shape} (order {run.distributed.order})"
    yield f"data parallel strategy: {run.ddp.data_parallel_sharding_strategy}"


def _company(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return "works alone"
    if len(ranks) <= 8:
        return f"works with ranks {', '.join(str(rank) for rank in ranks)}"
    return f"works with ranks {ranks[0]}, {ranks[1]}, {ranks[2]} ... {ranks[-1]}"


def _parameter_lines(run: RunConfig, size: ModelSize) -> Iterator[str]:
    yield f"whole model: {size.total - size.padding:,}" + (
        f" (+ {size.padding:,} of vocabulary padding)" if size.padding else ""
    )
    yield f"tensor parallel part, computed with by rank 0: {size.tensor_parallel_shard:,}"
    yield f"stored by rank 0 between steps: {size.stored:,}"


def _memory_lines(run: RunConfig, memory: Memory) -> Iterator[str]:
    main = str(run.transformer.main_params_dtype).removeprefix("torch.")
    compute = str(run.transformer.params_dtype).removeprefix("torch.")
    rows = {
        f"master weights ({main})": memory.master_weights,
        f"gathered weights ({compute})": memory.compute_weights,
        "gradients": memory.gradients,
        f"optimizer state ({run.optimizer.optimizer})": memory.optimizer_state,
        "activations (estimate)": memory.activations,
        "sum": memory.total,
    }
    unit, name_of_unit = (GIB, "GiB") if memory.total >= GIB else (MIB, "MiB")
    for name, size in rows.items():
        yield f"{name:<28} {size / unit:>10.3f} {name_of_unit}"
    yield "Not counted: temporary buffers, the loss of one chunk of tokens, the allocator's fragmentation."


def _batch_lines(run: RunConfig) -> Iterator[str]:
    training, length = run.training, run.data.seq_length or 0
    batch = run.global_batch_size
    yield (
        f"{batch:,} sequences a step = {training.micro_batch_size} a micro-batch x {run.data_parallel_size} data "
        f"parallel ranks x {_micro_batches(run)} micro-batches = {batch * length:,} tokens"
    )
    cp, padded = run.transformer.context_parallel_size, run.padded_sequence_length
    if padded != length:
        yield f"each sequence is filled up with {padded - length:,} masked tokens to {padded:,}"
    if cp > 1:
        yield f"each sequence is split over {cp} context parallel ranks, {padded // cp:,} tokens a rank"
    calculator = build_num_microbatches_calculator(
        training.rampup_batch_size,
        batch,
        training.micro_batch_size or 1,
        run.data_parallel_size,
        training.decrease_batch_size_if_needed,
        training.step_batch_size_schedule,
        length,
    )
    if len(calculator.schedule.steps) > 1:
        steps = ", ".join(f"{size} from sample {start:,}" for start, size in calculator.schedule.steps)
        yield f"the batch grows: {steps}"
    if training.train_samples is not None:
        iterations = calculator.iterations(training.train_samples)
        yield f"{training.train_samples:,} samples = {iterations:,} steps = {training.train_samples * length:,} tokens"
    elif training.train_iters is not None:
        yield f"{training.train_iters:,} steps" + (
            f" = {training.train_iters * batch * length:,} tokens" if len(calculator.schedule.steps) == 1 else ""
        )
