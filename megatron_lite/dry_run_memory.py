"""Bytes of one rank, worked out from the numbers of parameters and the shape of the activations."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_lite.arguments import RunConfig
from megatron_lite.optimizer.config import moment_dtype
from megatron_lite.transformer.attention_choices import cp_comm_type_of
from megatron_lite.transformer.mlp import is_swiglu
from megatron_lite.transformer.moe.experts import weighs_output
from megatron_lite.transformer.moe.moe_config import is_moe_layer


@dataclass(frozen=True)
class Part:
    """Elements of the dense parameters, or of the routed experts, of one rank.

    Attributes:
        shard: its tensor (and expert) parallel part, the one it computes with.
        stored: what it keeps of that between steps, as master weights and optimizer state.
        largest_layer: the shard's part in the largest transformer layer.
        in_layers: the shard's part in all transformer layers.
        matrices: the part of `stored` that Muon updates, if it is the optimizer.
    """

    shard: int = 0
    stored: int = 0
    largest_layer: int = 0
    in_layers: int = 0
    matrices: int = 0


def joined(parts: Iterable[Part]) -> Part:
    """The parts of several model chunks as one."""
    several = list(parts)
    return Part(
        sum(part.shard for part in several),
        sum(part.stored for part in several),
        max(part.largest_layer for part in several),
        sum(part.in_layers for part in several),
        sum(part.matrices for part in several),
    )


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a model, or of the pipeline stages of a rank, and of what one rank is responsible for.

    Attributes:
        total: logical elements, each once, padding of the vocabulary included.
        active: those that one token is computed with.
        padding: how many of `total` belong to vocabulary entries that do not exist.
        dense: all that belongs to no routed expert, split over tensor and data (and context) parallel ranks.
        experts: the routed experts, split over expert, expert tensor and expert data parallel ranks.
        moments_on_host: those of both whose moments the host keeps.
    """

    total: int
    active: int
    padding: int
    dense: Part
    experts: Part = Part()
    moments_on_host: Part = Part()

    @property
    def shard(self) -> int:
        """What the rank computes with."""
        return self.dense.shard + self.experts.shard

    @property
    def stored(self) -> int:
        """What the rank keeps between steps."""
        return self.dense.stored + self.experts.stored


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at the end of the backward pass of the last micro-batch.

    Attributes:
        on_host: activations that wait in the host's memory (--cpu-offloading-num-layers).
        moments_on_host: optimizer state that the host keeps (--optimizer-cpu-offload).
        saved_on_host: the copy of weights and optimizer state that is written in the background (--async-save).
    """

    master_weights: int
    compute_weights: int
    gradients: int
    optimizer_state: int
    activations: int
    on_host: int = 0
    moments_on_host: int = 0
    saved_on_host: int = 0

    @property
    def total(self) -> int:
        """All of them on the device."""
        return self.master_weights + self.compute_weights + self.gradients + self.optimizer_state + self.activations

    @property
    def host_total(self) -> int:
        """All of them in the host's memory."""
        return self.on_host + self.moments_on_host + self.saved_on_host


def expert_data_parallel_size(run: RunConfig) -> int:
    """Ranks that hold the same part of the same experts."""
    sizes = run.transformer
    etp = sizes.expert_tensor_parallel_size or sizes.tensor_model_parallel_size
    return run.world_size // (etp * sizes.expert_model_parallel_size * sizes.pipeline_model_parallel_size)


def memory_of(run: RunConfig, size: ModelSize, activations: int | None = None) -> Memory:
    """Bytes of one rank under its data parallel strategy; those of its activations default to all layers'.

    Master weights, gradients and optimizer state are as stored. Weights are computed with in `params_dtype`, gathered:
    the whole shard, or under optim_grads_params two layers (one in use, one on its way) and what belongs to no layer.
    Under optim, gradients of several micro-batches also wait whole for their one reduction. A rank that shares its part
    with none (data and context parallel, or expert data parallel) reduces nothing, and has a second copy of the weights
    only if it computes in another dtype than the masters': then one of all of them, made in the forward pass. Under
    pipelining weights stay gathered and gradients whole during a step, whatever the strategy. What of the
    host's moments is on the device during the update is not counted: activations are gone by then.
    """
    main = run.transformer.main_params_dtype.itemsize
    reduce = 2 if run.ddp.grad_reduce_in_bf16 else main
    parts = (
        (size.dense, run.data_parallel_size * run.transformer.context_parallel_size),
        (size.experts, expert_data_parallel_size(run)),
    )
    gathered = sum(_gathered(run, part, ranks) for part, ranks in parts)
    several = run.ddp.data_parallel_sharding_strategy == "optim" and micro_batches(run) > 1
    waits_whole = several or (_pipelined(run) and run.ddp.data_parallel_sharding_strategy != "no_shard")
    waiting = sum(part.shard for part, ranks in parts if waits_whole and ranks > 1)
    moments = _optimizer_state(run, size.stored, size.dense.matrices + size.experts.matrices)
    moments_on_host = _optimizer_state(run, size.moments_on_host.stored, size.moments_on_host.matrices)
    weights, checkpoint = size.stored * main, run.checkpoint
    saved = weights + moments * checkpoint.save_optim if checkpoint.async_save and checkpoint.save else 0
    return Memory(
        master_weights=weights,
        compute_weights=gathered * run.transformer.params_dtype.itemsize,
        gradients=size.stored * main + waiting * reduce,
        optimizer_state=moments - moments_on_host,
        activations=activation_bytes(run) if activations is None else activations,
        on_host=offloaded_bytes(run),
        moments_on_host=moments_on_host,
        saved_on_host=saved,
    )


def _optimizer_state(run: RunConfig, stored: int, matrices: int) -> int:
    """Bytes of moments: two of an element under Adam, one under SGD with momentum and Muon.

    Args:
        run: the optimizer and its dtypes.
        stored: elements of parameters.
        matrices: those of them that Muon updates, if it is the optimizer.
    """
    config, main = run.optimizer, run.transformer.main_params_dtype
    if config.optimizer == "sgd":
        return stored * main.itemsize * int(config.sgd_momentum > 0)
    by_muon = matrices if config.optimizer == "muon" else 0
    names = (config.exp_avg_dtype, config.exp_avg_sq_dtype)
    both = sum(moment_dtype(name, main).itemsize for name in names)
    return by_muon * main.itemsize + (stored - by_muon) * both


def _gathered(run: RunConfig, part: Part, ranks: int) -> int:
    """Elements of a part that exist a second time to compute with; `ranks` share it."""
    if ranks == 1:
        return 0 if run.transformer.main_params_dtype == run.transformer.params_dtype else part.shard
    if run.ddp.data_parallel_sharding_strategy == "optim_grads_params" and not _pipelined(run):
        return min(part.shard, 2 * part.largest_layer + part.shard - part.in_layers)
    return part.shard


def activation_bytes(run: RunConfig) -> int:
    """Bytes that all layers hold for the backward of one micro-batch, at most."""
    return sum(_activations(run, range(run.transformer.num_layers), run.transformer.mtp_num_layers or 0))


def _activations(run: RunConfig, held: Sequence[int], depths: int) -> tuple[int, int]:
    """Bytes that some layers keep for the backward of one micro-batch, and what that backward makes anew for a while.

    Attention counts as one fused operation.

    The tokens are this context parallel rank's part of the sequences, padding included.
    Per token and layer: the inputs of both norms and of the two matrices after them (4 h, split over tensor ranks
    only with sequence parallelism), and what attention and the MLP or the experts keep. A depth of multi-token
    prediction has a layer, and before it the inputs of two norms and of the projection (4 h), behind it of one norm
    (h). Full recomputation keeps one layer input (h) for each recomputed unit, and one unit's activations while it is
    recomputed. Left out: dropout masks, the loss (it runs in chunks), what context parallel ranks have of each
    other's keys and values, and what other recomputed parts of a layer make anew than latent attention's.

    Args:
        run: shapes, layout and recomputation.
        held: global indices of the layers, from 0: those of one pipeline stage, for example.
        depths: of multi-token prediction; they stand in the stage of the loss.
    """
    c = run.transformer
    tokens = (run.training.micro_batch_size or 1) * run.padded_sequence_length // c.context_parallel_size
    stream = c.hidden_size / (c.tensor_model_parallel_size if c.sequence_parallel else 1)
    attention, anew = _of_attention(run)

    def of_layer(index: int) -> float:
        return 4 * stream + attention + (_of_experts(run) if is_moe_layer(c, index + 1) else _of_mlp(run))

    layers, last = [of_layer(index) for index in held], of_layer(c.num_layers)  # like that of multi-token prediction
    elements = sum(layers)
    if (offloaded := c.cpu_offloading_num_layers) > 0:
        # Those that stay; or, before, two layers of which one is coming or going.
        elements = max(sum(layers[offloaded:]), *map(sum, itertools.pairwise(layers[: offloaded + 1])))
    if c.recompute_granularity == "full" and c.recompute_num_layers:
        if held:
            layer = elements / len(held)
            n = min(c.recompute_num_layers, len(held))
            if c.recompute_method == "uniform":
                elements, anew = math.ceil(len(held) / n) * stream, n * layer
            else:
                elements, anew = n * stream + (len(held) - n) * layer, layer
        anew, last = max(anew, last if depths else 0.0), stream
    elements += depths * (5 * stream + last)
    size = tokens * c.params_dtype.itemsize
    return int(size * elements), int(size * anew)


def offloaded_bytes(run: RunConfig) -> int:
    """Bytes of activations that wait in the host's memory: one micro-batch's, as pipelines cannot have them there."""
    c = run.transformer
    everything = dataclasses.replace(c, cpu_offloading_num_layers=0)
    return _activations(dataclasses.replace(run, transformer=everything), range(c.cpu_offloading_num_layers), 0)[0]


def activations_of_pipeline(run: RunConfig) -> list[int]:
    """Bytes of activations on each pipeline rank when it holds most, as its schedule goes."""
    layout = run.transformer.pipeline_layout
    if layout.ranks == 1:
        return [activation_bytes(run)]
    from megatron_lite.pipeline_parallel.orders import most_held, pipeline_order  # half a second

    depths = run.transformer.mtp_num_layers or 0
    of_stages = [_activations(run, stage.layers, depths if stage.loss else 0) for stage in layout.stages]
    kept, anew = zip(*of_stages, strict=True)
    order = pipeline_order(run.transformer.schedule, layout, micro_batches(run))
    return [most_held(order[rank], kept) + max(anew[n] for n in layout.stages_of(rank)) for rank in range(layout.ranks)]


def _pipelined(run: RunConfig) -> bool:
    return run.transformer.pipeline_model_parallel_size > 1


def _of_attention(run: RunConfig) -> tuple[float, float]:
    """What one layer's attention keeps, per token, and what it makes anew in backward: both split over tensor ranks.

    It keeps queries, keys and values and its output, with an output gate also the sigmoid and the product. Queries and
    keys that are rotated or normalized exist twice: the values are a view of what was projected, all of it. In latent
    attention all four are as wide as the wider of queries and values, and the output projection reads a copy without
    the filling. Latents are kept before and behind their norms, whole but for sequence parallelism. Recomputing
    mla_up_proj keeps them and the output alone.
    """
    c, heads = run.transformer, run.transformer.num_attention_heads
    tp = c.tensor_model_parallel_size
    if not c.multi_latent_attention:
        groups = c.num_query_groups or 0
        changed = c.qk_layernorm or run.gpt.position_embedding_type in ("rope", "yarn")
        kept = (4 if c.attention_output_gate else 2) * heads + 2 * groups + (heads + groups if changed else 0)
        return kept * (c.kv_channels or 0) / tp, 0.0
    width = max(c.query_channels, c.value_channels)
    projected = 3 * heads * width / tp
    output = heads * (width + (c.value_channels if c.value_channels < width else 0)) / tp
    latents = (1 + c.qk_layernorm) * ((c.q_lora_rank or 0) + c.kv_lora_rank) + c.qk_pos_emb_head_dim
    output += latents / (tp if c.sequence_parallel else 1)
    # All-to-all keeps the heads it has exchanged, however the projections are made.
    types = (
        {cp_comm_type_of(c, number) for number in range(1, c.num_layers + 1)} if c.context_parallel_size > 1 else set()
    )
    freed = c.recompute_granularity == "selective" and not types & {"a2a", "a2a+p2p"}
    if freed and "mla_up_proj" in (c.recompute_modules or []):
        return output, projected
    return projected + output, 0.0


def _kept_activations(run: RunConfig) -> int:
    """How many times its width an MLP keeps, per token: the output of its first product and the input of its second.

    A gated one's first output has two halves, and it keeps what the activation made of the gates, unless that is made
    again, by the compiler or by `swiglu`.
    """
    c = run.transformer
    if not c.gated_linear_unit:
        return 2
    return 3 if run.training.compile or is_swiglu(c) else 4


def _of_mlp(run: RunConfig) -> float:
    """Activations that a dense MLP keeps, per token, split over tensor ranks; nothing if it is recomputed."""
    c = run.transformer
    if c.recompute_granularity == "selective" and "mlp" in (c.recompute_modules or []):
        return 0.0
    return _kept_activations(run) * (c.ffn_hidden_size or 0) / c.tensor_model_parallel_size


def _of_experts(run: RunConfig) -> float:
    """What a layer of experts keeps, per token, when the load is even: for each of the topk choices the row (h) and
    activations of one expert (`_kept_activations`), split over expert tensor ranks, and what its probability weighs,
    one more of them or the output (h); and the shared experts' activations.

    A rank routes 1 / tp of the tokens, and gets as many rows from others as it sends, on each expert tensor rank.
    Recomputing moe_act keeps the output of the first product only (one activation, gated two), recomputing moe none
    of all this.
    """
    c = run.transformer
    recomputed = (c.recompute_modules or []) if c.recompute_granularity == "selective" else []
    if "moe" in recomputed:
        return 0.0
    tp, etp = c.tensor_model_parallel_size, c.expert_tensor_parallel_size or c.tensor_model_parallel_size
    first = 2 if c.gated_linear_unit else 1
    width = (c.moe_ffn_hidden_size or 0) / etp
    kept = first * width
    if "moe_act" not in recomputed:
        kept += (_kept_activations(run) - first) * width + (c.hidden_size if weighs_output(c) else width)
    row = c.hidden_size + kept
    shared = _kept_activations(run) * (c.moe_shared_expert_intermediate_size or 0) / tp
    return c.moe_router_topk * row * etp / tp + shared


def micro_batches(run: RunConfig) -> int:
    """Micro-batches of one data parallel rank in a step."""
    return run.global_batch_size // ((run.training.micro_batch_size or 1) * run.data_parallel_size)
