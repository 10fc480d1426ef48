"""--dry-run: what one rank of a run would hold, worked out without a cluster.

Rank 0 is built exactly as for training, on the meta device (shapes without storage) and under a process group whose
collectives do nothing. So layout, parameters and bytes are read off the real modules rather than estimated.
"""

import os
import re
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.distributed import wrap_data_parallel
from megatron_lite.dry_run_memory import (
    Memory,
    ModelSize,
    Part,
    activations_of_pipeline,
    expert_data_parallel_size,
    joined,
    memory_of,
    micro_batches,
)
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.parameter_count import count_parameters
from megatron_lite.num_microbatches_calculator import build_num_microbatches_calculator
from megatron_lite.optimizer.host_moments import names_on_host
from megatron_lite.optimizer.param_groups import is_updated_by_muon
from megatron_lite.tensor_parallel.parameters import local, named_parameter_specs
from megatron_lite.tokenizers import build_tokenizer
from megatron_lite.training.initialize import initialize_parallel_groups
from megatron_lite.training.setup import build_gpt
from megatron_lite.transformer.attention_choices import describe_communication

GIB, MIB = 2**30, 2**20


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
        sizes = _sizes_of_pipeline(run, vocab_size)
        layout = list(_layout_lines(run))
        pipeline_ranks = _pipeline_ranks()
    memories = _memories(run, sizes)
    fullest = max(range(len(memories)), key=lambda rank: memories[rank].total)
    fullest_host = max(range(len(memories)), key=lambda rank: memories[rank].host_total)
    which, which_host = (
        "rank 0" if len(memories) == 1 else f"pipeline rank {rank}, the fullest" for rank in (fullest, fullest_host)
    )
    sections = {
        f"Layout of {run.world_size:,} rank{'s' if run.world_size > 1 else ''}": layout,
        "Pipeline": list(_pipeline_lines(run, sizes, memories)),
        "Parameters": list(_parameter_lines(run, sizes, fullest)),
        f"Memory of {which}": list(_memory_lines(run, memories[fullest])),
        f"Host memory of {which_host}": list(_host_memory_lines(memories, fullest_host, pipeline_ranks)),
        "Batch": list(_batch_lines(run)),
    }
    blocks = ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items() if lines]
    return "\n".join([*run.notices, *blocks])


def estimated_memory(run: RunConfig) -> Memory:
    """Bytes of the fullest rank.

    Raises:
        ConfigError: as `describe`.
    """
    return max(memories_of_pipeline(run), key=lambda memory: memory.total)


def memories_of_pipeline(run: RunConfig) -> list[Memory]:
    """Bytes of a rank of each pipeline stage.

    Raises:
        ConfigError: as `describe`.
    """
    vocab_size = _vocab_size(run)
    with fake_cluster(run):
        sizes = _sizes_of_pipeline(run, vocab_size)
    return _memories(run, sizes)


def _memories(run: RunConfig, sizes: list[ModelSize]) -> list[Memory]:
    return [memory_of(run, *both) for both in zip(sizes, activations_of_pipeline(run), strict=True)]


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


def _sizes_of_pipeline(run: RunConfig, vocab_size: int) -> list[ModelSize]:
    """What a rank of each pipeline stage (or stages) holds; the only one where there is no pipeline.

    This process is rank 0, of the first stage. All others split their parameters in the same way.
    """
    layout, length = run.transformer.pipeline_layout, run.data.seq_length or 0
    meshes = parallel_state.get_dense_mesh(), parallel_state.get_expert_mesh()
    sizes = []
    for rank in range(layout.ranks):
        own = [layout.stages[number] for number in layout.stages_of(rank)]
        chunks = [build_gpt(run.transformer, run.gpt, vocab_size, length, stage) for stage in own]
        padding = (chunks[0].padded_vocab_size - vocab_size) * run.transformer.hidden_size
        tables = sum(chunk.pre_process for chunk in chunks)
        if not run.gpt.share_embeddings_and_output_weights:
            tables += sum(chunk.post_process for chunk in chunks)
        count = count_parameters(chunks, run.transformer)
        shards = _elements(chunks)
        for chunk in chunks:
            wrap_data_parallel(chunk, run.transformer, run.ddp, meshes[0], expert_mesh=meshes[1])
        on_host = names_on_host(_elements(chunks), run.optimizer.host_fraction)
        parts = []
        for chunk in chunks:
            specs = named_parameter_specs(chunk)
            of_experts = {name for name, spec in specs.items() if spec.is_expert}
            kinds = specs.keys() - of_experts, of_experts, specs.keys() & on_host
            parts.append([_part(chunk, shards, names) for names in kinds])
        dense, experts, offloaded = (joined(same) for same in zip(*parts, strict=True))
        sizes.append(ModelSize(count.total, count.active, padding * tables, dense, experts, offloaded))
    return sizes


def _elements(chunks: Sequence[nn.Module]) -> dict[str, int]:
    """Elements of this rank's part of each parameter."""
    return {name: local(parameter).numel() for chunk in chunks for name, parameter in chunk.named_parameters()}


def _part(model: nn.Module, shards: dict[str, int], names: Set[str]) -> Part:
    """Count some parameters of a model that is wrapped for data parallelism.

    Args:
        model: rank 0's.
        shards: elements of its part of each parameter before the wrapping.
        names: which of them to count.
    """
    specs, stored, matrices = named_parameter_specs(model), 0, 0
    layers: dict[str, int] = {}
    parameters = dict(model.named_parameters())
    for name in names:
        kept = local(parameters[name]).numel()
        stored += kept
        matrices += kept * is_updated_by_muon(name, parameters[name], specs[name])
        if (found := re.match(r".*?\.layers\.\d+", name)) is not None:
            layer = found[0]  # "decoder.layers.0", or of multi-token prediction "mtp.layers.0"
            layers[layer] = layers.get(layer, 0) + shards[name]
    total = sum(shards[name] for name in names)
    return Part(total, stored, max(layers.values(), default=0), sum(layers.values()), matrices)


def _pipeline_ranks() -> list[int]:
    """The pipeline rank of every rank."""
    found = [0] * dist.get_world_size()
    for rank, stage in enumerate(parallel_state.get_dense_mesh().mesh):
        for one in stage.flatten().tolist():
            found[one] = rank
    return found


def _layout_lines(run: RunConfig) -> Iterator[str]:
    sizes = run.transformer
    sequence = " with sequence parallelism" if sizes.sequence_parallel else ""
    sequence += ", overlapped with products" if sizes.tp_comm_overlap else ""
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
    if sizes.pipeline_model_parallel_size > 1:
        name = f"pipeline parallel {sizes.pipeline_model_parallel_size}"
        groups.insert(0, (name, parallel_state.get_pipeline_model_parallel_group()))
    if sizes.num_moe_experts is not None:
        groups += _expert_groups(run)
    for name, group in groups:
        assert group is not None
        yield f"{name}: rank 0 {_company(dist.get_process_group_ranks(group))}"
    yield f"mesh: {_shape_of(parallel_state.get_dense_mesh())} (order {run.distributed.order})"
    if sizes.num_moe_experts is not None:
        yield f"mesh of the experts: {_shape_of(parallel_state.get_expert_mesh())}"
    yield f"data parallel strategy: {run.ddp.data_parallel_sharding_strategy}"


def _expert_groups(run: RunConfig) -> list[tuple[str, dist.ProcessGroup | None]]:
    sizes = run.transformer
    experts, ep = sizes.num_moe_experts or 0, sizes.expert_model_parallel_size
    own = f"experts 0 to {experts // ep - 1}" if experts > ep else "expert 0"
    return [
        (
            f"expert parallel {ep} ({own} of {experts} here, by {sizes.moe_token_dispatcher_type})",
            parallel_state.get_expert_model_parallel_group(),
        ),
        (
            f"expert tensor parallel {sizes.expert_tensor_parallel_size}",
            parallel_state.get_expert_tensor_parallel_group(),
        ),
        (f"expert data parallel {expert_data_parallel_size(run)}", parallel_state.get_expert_data_parallel_group()),
    ]


def _shape_of(mesh: DeviceMesh) -> str:
    return ", ".join(f"{name} {size}" for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def _company(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return "works alone"
    if len(ranks) <= 8:
        return f"works with ranks {', '.join(str(rank) for rank in ranks)}"
    return f"works with ranks {ranks[0]}, {ranks[1]}, {ranks[2]} ... {ranks[-1]}"


def _pipeline_lines(run: RunConfig, sizes: list[ModelSize], memories: list[Memory]) -> Iterator[str]:
    """What each pipeline rank holds; nothing without a pipeline."""
    if len(sizes) == 1:
        return
    yield f"schedule {run.transformer.schedule}, {micro_batches(run)} micro-batches (tools/plan.py draws it)"
    for line, size, memory in zip(run.transformer.pipeline_layout.describe(), sizes, memories, strict=True):
        yield f"{line}: {size.shard:,} parameters, {memory.total / GIB:.2f} GiB"


def _parameter_lines(run: RunConfig, sizes: list[ModelSize], rank: int) -> Iterator[str]:
    """Of the whole model, and of one pipeline rank."""
    size, who = sizes[rank], "rank 0" if len(sizes) == 1 else f"pipeline rank {rank}"
    padding = sum(one.padding for one in sizes)
    yield f"whole model: {sum(one.total for one in sizes) - padding:,}" + (
        f" (+ {padding:,} of vocabulary padding)" if padding else ""
    )
    if run.transformer.num_moe_experts is not None:
        c, active = run.transformer, sum(one.active for one in sizes) - padding
        yield (
            f"active for a token: {active:,} ({c.moe_router_topk} of {c.num_moe_experts} experts in {c.num_moe_layers} "
            f"of {c.num_layers + (c.mtp_num_layers or 0)} layers)"
        )
    experts = f" ({size.experts.shard:,} of experts)" if size.experts.shard else ""
    stored = f" ({size.experts.stored:,} of experts)" if size.experts.shard else ""
    yield f"tensor parallel part, computed with by {who}: {size.shard:,}{experts}"
    yield f"stored by {who} between steps: {size.stored:,}{stored}"


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
    yield from _table(rows)
    yield "Not counted: temporary buffers, the loss of one chunk of tokens, the allocator's fragmentation."


def _host_memory_lines(memories: list[Memory], rank: int, pipeline_ranks: Sequence[int]) -> Iterator[str]:
    """The host's memory of a pipeline rank, and of all ranks of a node; empty where none is used.

    Args:
        memories: of a rank of each pipeline stage.
        rank: the one with most.
        pipeline_ranks: of all ranks of the run. Which of them share a node torchrun tells, if it is there.
    """
    memory = memories[rank]
    if memory.host_total == 0:
        return
    rows = {
        "optimizer state": memory.moments_on_host,
        "activations (estimate)": memory.on_host,
        "copy for --async-save": memory.saved_on_host,
        "sum": memory.host_total,
    }
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if each > 1:
        nodes = [pipeline_ranks[begin : begin + each] for begin in range(0, len(pipeline_ranks), each)]
        rows[f"sum of a node's {len(nodes[0])} ranks"] = max(
            sum(memories[one].host_total for one in node) for node in nodes
        )
    yield from _table(rows)
    more = "" if each > 0 else "; the other ranks of its node have as much"
    yield f"Not counted: the processes themselves, data workers and their batches{more}."


def _table(rows: dict[str, int]) -> Iterator[str]:
    """Bytes by name, in one unit."""
    unit, name_of_unit = (GIB, "GiB") if max(rows.values()) >= GIB else (MIB, "MiB")
    for name, size in rows.items():
        yield f"{name:<28} {size / unit:>10.3f} {name_of_unit}"


def _batch_lines(run: RunConfig) -> Iterator[str]:
    training, length = run.training, run.data.seq_length or 0
    batch = run.global_batch_size
    yield (
        f"{batch:,} sequences a step = {training.micro_batch_size} a micro-batch x {run.data_parallel_size} data "
        f"parallel ranks x {micro_batches(run)} micro-batches = {batch * length:,} tokens"
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
