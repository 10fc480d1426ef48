"""Train one small GPT at a parallel layout, in float64, the way `pretrain_gpt.py` does, and once in plain torch.

The reference knows nothing of layouts: one process, the whole global batch in one forward, whole logits, torch's own
cross entropy, clipping and SGD. Every layout has to reproduce its loss, its gradient norm, each parameter's gradient,
and its weights after many steps.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_lite import parallel_state
from megatron_lite.checkpoint import verify_all_replicas
from megatron_lite.checkpoint.model_state import copies_of
from megatron_lite.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron_lite.pipeline_parallel import get_forward_backward_func
from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel.parameters import initialize_parameters
from megatron_lite.training.batches import TEXT, MicroBatch, MicroBatchStream, names_read
from megatron_lite.training.evaluate import evaluate
from megatron_lite.training.initialize import set_random_seed
from megatron_lite.training.setup import build_gpt, build_model, compile_layer
from megatron_lite.training.step import forward_backward, train_step
from megatron_lite.transformer.moe import auxiliary_losses
from megatron_lite.transformer.moe.statistics import is_recomputation, routers_of, update_expert_bias
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.parallel.mutations import mutation

GLOBAL_BATCH = 12
SEQUENCE = 16
VOCABULARY = 127  # divisible by no tensor parallel size
SEED = 4321
LEARNING_RATE = 0.3
WEIGHT_DECAY = 0.1
MOMENTUM = 0.9
CLIP = 0.5  # small enough to act, so that the norm takes part in the weights


@dataclass(frozen=True)
class Layout:
    """One row of the matrix: how the ranks are used, and which model is trained."""

    tp: int = 1
    sp: bool = False
    overlap: bool = False
    cp: int = 1
    comm: str | tuple[str, ...] = "p2p"
    hierarchy: tuple[int, int] | None = None
    dp: int = 1
    strategy: str = "no_shard"
    replicas: int = 1
    accumulation: int = 1
    tied: bool = True
    normalization: str = "LayerNorm"
    swiglu: bool = False
    query_groups: int = 8
    positions: str = "learned_absolute"
    recompute: str | None = None
    per_token_loss: bool = True
    compiled: bool = False
    documents: bool = False
    hole: bool = False
    moe: str | None = None
    ep: int = 1
    etp: int | None = None
    dispatcher: str = "alltoall"
    evaluated: bool = False
    pp: int = 1
    schedule: str | None = None
    chunks: int | None = None
    stages: str | None = None
    layers: int = 2
    variant: str | None = None

    @property
    def world_size(self) -> int:
        """Processes it takes."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one micro-batch on one data parallel rank."""
        size, rest = divmod(GLOBAL_BATCH, self.dp * self.accumulation)
        assert rest == 0, f"{GLOBAL_BATCH} sequences do not split over {self}"
        return size

    @property
    def name(self) -> str:
        """Short, for the test's id."""
        comm = self.comm if isinstance(self.comm, str) else "+".join(self.comm)
        parts = [f"tp{self.tp}"] + ["sp"] * self.sp + ["overlap"] * self.overlap
        parts += [f"cp{self.cp}-{comm}"] * (self.cp > 1)
        if self.pp > 1:
            parts += [f"pp{self.pp}"] + [f"vpp{self.chunks}"] * (self.chunks is not None)
            parts += [self.schedule or "default"] + [f"stages-{self.stages}"] * (self.stages is not None)
        parts += [f"dp{self.dp}", self.strategy]
        parts += [f"x{self.replicas}"] * (self.replicas > 1) + [f"acc{self.accumulation}"]
        parts += ["tied" if self.tied else "untied", self.normalization] + ["swiglu"] * self.swiglu
        parts += [f"gqa{self.query_groups}"] * (self.query_groups != 8) + [self.positions.split("_")[0]]
        parts += [f"recompute-{self.recompute}"] * (self.recompute is not None)
        parts += ["mean-of-means"] * (not self.per_token_loss) + ["compiled"] * self.compiled
        parts += ["documents"] * self.documents + ["hole"] * self.hole
        if self.moe is not None:
            parts += [f"moe-{self.moe}", f"ep{self.ep}"] + [f"etp{self.etp}"] * (self.etp is not None)
            parts += [self.dispatcher]
        parts += [self.variant] * (self.variant is not None) + ["evaluated"] * self.evaluated
        return "-".join(parts)

    @property
    def model(self) -> "Layout":
        """The same model on one process: what its reference is computed with.

        The mean of micro-batch means and the balance losses of experts are another objective for each number of
        micro-batches, and the scales of fp8 are those of one, so that number is kept. To the global balance loss the
        micro-batches of all data parallel ranks that are computed at a time are one.
        """
        in_fp8 = "fp8" in VARIANTS.get(self.variant or "", {})
        by_micro_batch = not self.per_token_loss or self.moe is not None or in_fp8
        replicas = 1 if self.moe == "global" else self.dp
        return Layout(
            layers=self.layers,
            accumulation=replicas * self.accumulation if by_micro_batch else 1,
            per_token_loss=self.per_token_loss,
            tied=self.tied,
            normalization=self.normalization,
            swiglu=self.swiglu,
            query_groups=self.query_groups,
            positions=self.positions,
            documents=self.documents,
            hole=self.hole,
            moe=self.moe,
            variant=self.variant,
        )


MIXTURES: dict[str, dict[str, Any]] = {
    "aux": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.2, "moe_z_loss_coeff": 0.01},
    "sequence": {
        "moe_router_load_balancing_type": ["seq_aux_loss", "aux_loss"],
        "moe_aux_loss_coeff": [0.3, 0.1],
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 1.5,
    },
    "bias": {  # DeepSeek-V3: sigmoid, groups, expert bias, shared expert
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_shared_expert_intermediate_size": 32,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.05,
    },
    "gated": {  # Qwen2-MoE: gated shared expert, every second layer
        "moe_shared_expert_intermediate_size": 48,
        "moe_shared_expert_gate": True,
        "moe_aux_loss_coeff": 0.1,
    },
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.2},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
    "gmlp": {"moe_router_type": "gmlp", "moe_router_topk": 3, "moe_aux_loss_coeff": 0.1},
}
"""Kinds of mixtures of experts, 8 experts each."""


_LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 12,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "latent": {**_LATENT, "q_lora_rank": 20},
    "latent_keys": {**_LATENT, "v_head_dim": 14},  # queries without a latent, values wider than keys
    "further": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3},
    "deepseek": {**_LATENT, "q_lora_rank": 20, "mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3},
    "sinks": {"softmax_type": "learnable", "glu_linear_offset": 1.0, "activation_func_clamp_value": 0.7},
    "windows": {"softmax_type": "learnable", "window_size": (3, 0), "window_attn_skip_freq": 2},
    "gates": {"attention_output_gate": True, "no_rope_freq": 2, "layernorm_zero_centered_gamma": True},
    "fp8": {"fp8": "hybrid"},
    "fp8_rowwise": {"fp8": "hybrid", "fp8_recipe": "rowwise"},
    "off_by_one": {"softmax_type": "off-by-one", "window_size": (2, 0), "window_attn_skip_freq": [1, 0]},
}
"""Kinds of layers: latent attention, multi-token prediction, attention sinks and windows, gates and layers without
positions, products in fp8."""


@dataclass
class Result:
    """What is compared; gradients and weights by parameter name, whole."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    mtp_losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    choices: list[int] = field(default_factory=list)
    untied: int = 0


def transformer_config(layout: Layout) -> TransformerConfig:
    """Two small layers with everything that has gone wrong somewhere: biases, query and key norms, dropout off."""
    recompute: dict[str, object] = {}
    if layout.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
        latent = VARIANTS.get(layout.variant or "", {}).get("multi_latent_attention", False)
        modules = ["core_attn"] + ["mla_up_proj"] * latent + ["moe"] * (layout.moe is not None)
        recompute["recompute_modules"] = modules
    elif layout.recompute is not None:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": layout.recompute,
            "recompute_num_layers": 1,
        }
    mixture: dict[str, Any] = {}
    if layout.moe is not None:
        mixture = {
            "num_moe_experts": 8,
            "moe_ffn_hidden_size": 32,
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
            "moe_token_dispatcher_type": layout.dispatcher,
            **MIXTURES[layout.moe],
        }
        if layout.moe == "gated":
            mixture["moe_layer_freq"] = [0, 1] * (layout.layers // 2)
    return TransformerConfig(
        num_layers=layout.layers,
        pipeline_model_parallel_size=layout.pp,
        pipeline_schedule=layout.schedule,
        num_virtual_stages_per_pipeline_rank=layout.chunks,
        pipeline_model_parallel_layout=layout.stages,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=layout.query_groups,
        normalization=layout.normalization,
        swiglu=layout.swiglu,
        qk_layernorm=True,
        add_bias_linear=True,
        init_method_std=0.2,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        tp_comm_overlap=layout.overlap,
        context_parallel_size=layout.cp,
        cp_comm_type=layout.comm if isinstance(layout.comm, str) else list(layout.comm),
        hierarchical_context_parallel_sizes=None if layout.hierarchy is None else list(layout.hierarchy),
        fp64=True,
        calculate_per_token_loss=layout.per_token_loss,
        **VARIANTS.get(layout.variant or "", {}),
        **recompute,  # type: ignore[arg-type]
        **mixture,
    )


def gpt_config(layout: Layout) -> GPTModelConfig:
    """Vocabulary and positions of the small model."""
    return GPTModelConfig(
        position_embedding_type=layout.positions,
        max_position_embeddings=SEQUENCE,
        share_embeddings_and_output_weights=layout.tied,
        rotary_scaling_factor=4.0,
        yarn_original_max_position_embeddings=SEQUENCE // 4,
        mscale_all_dim=0.7,
        rope_type="rope",
    )


def global_batch(step: int, layout: Layout) -> dict[str, Tensor]:
    """The sequences of one step, [12, 16] each; the number of valid tokens grows from none to all over the batch.

    With `documents` each sequence is cut at random, one-token documents included, and positions start again in each.
    With `hole` only the first and last eighth of each sequence have a loss: most context parallel shards are empty.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    valid = torch.linspace(0, SEQUENCE, GLOBAL_BATCH).round().long()
    order = torch.rand(GLOBAL_BATCH, SEQUENCE, generator=generator).argsort(dim=1).argsort(dim=1)
    batch = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": (order < valid[:, None]).double(),
        "position_ids": torch.arange(SEQUENCE).repeat(GLOBAL_BATCH, 1),
        "token_numbers": torch.arange(GLOBAL_BATCH * SEQUENCE).view(GLOBAL_BATCH, SEQUENCE),
    }
    if layout.hole:  # chunks 1 to 6 of 8: all that rank 1 of 2, and ranks 1 to 3 of 4, hold
        batch["loss_mask"][:, SEQUENCE // 8 : SEQUENCE * 7 // 8] = 0.0
    if layout.documents:
        begins = torch.rand(GLOBAL_BATCH, SEQUENCE, generator=generator) < 0.3
        starts = torch.where(begins, torch.arange(SEQUENCE), 0).cummax(dim=1).values
        batch["position_ids"] -= starts
        batch["document_starts"] = starts
    return batch


def micro_batches(layout: Layout, step: int, dp_rank: int, names: Collection[str] = TEXT) -> list[MicroBatch]:
    """This rank's share, cut as the sampler cuts it (each block of mbs x dp in rank order) and prepared by the run."""
    batch, size = global_batch(step, layout), layout.micro_batch_size
    starts = [number * size * layout.dp + dp_rank * size for number in range(layout.accumulation)]
    parts = [{name: tensor[start : start + size] for name, tensor in batch.items()} for start in starts]
    cp_group = parallel_state.get_context_parallel_group()
    depths = transformer_config(layout).mtp_num_layers or 0
    stream = MicroBatchStream(parts, torch.device("cpu"), cp_group, names=names, depths=depths)
    return stream.next_global_batch(layout.accumulation)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a DTensor (a collective), on every rank."""
    return tensor.full_tensor().detach().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


class Choices:
    """A number for each step that depends on which experts each token went to, in each layer, and on nothing else.

    Of (token, layer, expert) an integer is made that looks random, and these are added up, over all ranks too.
    """

    def __init__(self, model_chunks: list[nn.Module], tp_rank: int = 0) -> None:
        self.total = torch.zeros((), dtype=torch.int64)
        self.token_numbers = torch.empty(0, dtype=torch.int64)
        self._tp_rank = tp_rank
        # Each pipeline stage sees them in order, but stages not at the same time.
        self._coming: dict[nn.Module, Iterator[MicroBatch]] = {chunk: iter(()) for chunk in model_chunks}
        for chunk in model_chunks:
            chunk.register_forward_pre_hook(self._next)
        for router in routers_of(model_chunks):
            router.register_forward_hook(self._add)

    def _add(self, router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        if not router.training or is_recomputation():
            return
        length = inputs[0].size(0)
        numbers = self.token_numbers.t()
        mine = numbers.split(length)[self._tp_rank if numbers.size(0) > length else 0]
        mixed = (mine.unsqueeze(-1) * 8 + output[1].view(*mine.shape, -1)) * 64 + router.layer_number  # type: ignore[operator]
        mixed = (mixed + 1) * 2654435761
        self.total += (mixed ^ (mixed >> 13)).mul(40503).sum()

    def follow(self, batches: list[MicroBatch]) -> None:
        """The micro-batches that the model will read next."""
        self._coming = {chunk: iter(batches) for chunk in self._coming}

    def _next(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if model.training:
            self.token_numbers = next(self._coming[model])["token_numbers"]

    def of_step(self) -> int:
        """The number of the step that ends; collective."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.total)
        number = int(self.total)
        self.total.zero_()
        return number


def reference(layout: Layout, steps: int) -> Result:
    """The model of `layout` trained by plain torch in this process."""
    model = build_gpt(transformer_config(layout.model), gpt_config(layout.model), VOCABULARY, SEQUENCE)
    model.to_empty(device="cpu")
    initialize_parameters(model, SEED)
    for router in routers_of(model):
        router.reset_buffers()
    choices = Choices([model])
    parameters = dict(model.named_parameters())
    decayed = [p for name, p in parameters.items() if p.dim() > 1 and "bias" not in name]
    others = [p for name, p in parameters.items() if p.dim() == 1 or "bias" in name]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
    )
    result: Result | None = None
    losses, further, chosen = [], [], []
    for step in range(steps):
        optimizer.zero_grad()
        batch = global_batch(step, layout)
        auxiliary_losses.begin_step(torch.tensor(1.0 / layout.model.accumulation, dtype=torch.float64))
        objective, loss, mtp_losses = _plain_losses(model, batch, layout, choices)
        objective.backward()
        gradients = {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        if result is None:
            result = Result(loss.item(), norm.item(), gradients)
        losses.append(loss.item())
        further += [one.item() for one in mtp_losses]
        chosen.append(choices.of_step())
        optimizer.step()
        update_expert_bias(model, None)
    assert result is not None
    result.losses, result.mtp_losses, result.choices = losses, further, chosen
    result.weights = {name: whole(p) for name, p in parameters.items()}
    return result


def _plain_losses(
    model: Any, batch: dict[str, Tensor], layout: Layout, choices: Choices
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What is minimized, and what is reported: the mean over tokens, which is also minimized by default.

    Last the means of the depths of multi-token prediction, of which their share is minimized too.
    One forward for each micro-batch; the balance losses of experts, which depend on them, are attached inside.
    """
    depths = model.config.mtp_num_layers or 0
    weights = [1.0] + [model.config.mtp_loss_scaling_factor / depths for _ in range(depths)]
    sums: list[list[Tensor]] = [[] for _ in weights]
    counts: list[list[Tensor]] = [[] for _ in weights]
    parts = {name: tensor.chunk(layout.model.accumulation) for name, tensor in batch.items()}
    for number in range(layout.model.accumulation):
        part = {name: tensors[number] for name, tensors in parts.items()}
        choices.follow([part])
        mask = _document_mask(part)
        decoded: dict[str, Tensor] = {}
        listener = model.decoder.register_forward_hook(functools.partial(_keep, decoded))
        logits = [model(part["tokens"], part["position_ids"], mask)]
        listener.remove()
        logits += _further_logits(model, part, mask, decoded["output"]) if depths else []
        for depth, of_depth in enumerate(logits):
            labels, valid = (_moved(part, name, depth) for name in ("labels", "loss_mask"))
            losses = F.cross_entropy(of_depth.flatten(0, 1), labels.flatten(), reduction="none")
            sums[depth].append((losses * valid.flatten()).sum())
            counts[depth].append(valid.sum())
    means = [torch.stack(of_depth).sum() / sum(count) for of_depth, count in zip(sums, counts, strict=True)]
    objectives = means
    if not layout.per_token_loss:
        objectives = [
            torch.stack([one / count.clamp(min=1) for one, count in zip(*of_depth, strict=True)]).mean()
            for of_depth in zip(sums, counts, strict=True)
        ]
    objective = sum(weight * one for weight, one in zip(weights, objectives, strict=True))
    return objective, means[0], means[1:]  # type: ignore[return-value]


def _keep(decoded: dict[str, Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    decoded["output"] = output


def _moved(part: dict[str, Tensor], name: str, distance: int) -> Tensor:
    """What stands `distance` tokens further on in the same sequence and document, token by token; else 0."""
    moved = torch.zeros_like(part[name])
    starts = part.get("document_starts", torch.zeros_like(part["tokens"]))
    for row in range(moved.size(0)):
        for position in range(moved.size(1) - distance):
            if starts[row, position + distance] == starts[row, position]:
                moved[row, position] = part[name][row, position + distance]
    return moved


def _further_logits(model: Any, part: dict[str, Tensor], mask: Tensor | None, hidden: Tensor) -> list[Tensor]:
    """Of each depth of multi-token prediction, written out."""
    rotary = None if model.rotary_pos_emb is None else model.rotary_pos_emb(part["position_ids"], torch.float64)
    logits = []
    for depth, layer in enumerate(model.mtp.layers.values(), start=1):
        embedded = F.embedding(_moved(part, "tokens", depth), model.embedding.word_embeddings.weight).transpose(0, 1)
        joined = torch.cat((layer.enorm(embedded), layer.hnorm(hidden)), dim=-1) @ layer.eh_proj.weight.t()
        hidden = layer.final_layernorm(layer.transformer_layer(joined, mask, rotary))
        output = model.shared_embedding_or_output_weight()[: model.vocab_size]
        logits.append((hidden @ output.t()).transpose(0, 1))
    return logits


def _document_mask(batch: dict[str, Tensor]) -> Tensor | None:
    """True where attention is forbidden, [b, 1, s, s]."""
    if "document_starts" not in batch:
        return None
    starts = batch["document_starts"].unsqueeze(1)
    return starts.unsqueeze(-1) != starts.unsqueeze(-2)


def initialize(layout: Layout) -> None:
    """The groups of a layout."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=transformer_config(layout).virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.cp,
        hierarchical_context_parallel_sizes=None if layout.hierarchy is None else list(layout.hierarchy),
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=layout.dp * layout.cp if layout.strategy == "no_shard" else layout.replicas,
    )


def run_layout(
    rank: int,
    world_size: int,
    layout: Layout,
    steps: int,
    broken: str | None = None,
    optimizer_config: OptimizerConfig | None = None,
) -> Result | None:
    """Train at `layout` with the product's code, optionally broken on purpose; rank 0 returns a result."""
    initialize(layout)
    with mutation(broken):
        model, optimizer = build(layout, optimizer_config=optimizer_config)
        names = names_read(model)
        choices = Choices(model, parallel_state.get_tensor_model_parallel_rank())
        tp_group = parallel_state.get_tensor_model_parallel_group()
        dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        cp_group = parallel_state.get_context_parallel_group()
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        dp_rank = parallel_state.get_data_parallel_rank()
        how: dict[str, Any] = {"dp_cp_group": dp_cp_group}
        how["forward_backward_func"] = get_forward_backward_func(transformer_config(layout))
        loss: dict[str, Any] = {"cp_group": cp_group, "per_token_loss": layout.per_token_loss}
        loss["mtp_loss_weights"] = transformer_config(layout).mtp_loss_weights

        first = micro_batches(layout, 0, dp_rank, names)
        choices.follow(first)
        forward_backward(model, optimizer, first, **how, **loss)
        finalize_model_grads(model, tp_group)
        gradients, untied = _of_pipeline(model, lambda parameter: parameter.grad)

        choices.total.zero_()
        outputs, chosen = [], []
        for step in range(steps):
            if layout.evaluated:
                held_out: Any = _HeldOut(layout, dp_rank, names)
                evaluate(model, held_out, iterations=2, num_microbatches=layout.accumulation, pp_group=pp_group, **how)
            batches = micro_batches(layout, step, dp_rank, names)
            choices.follow(batches)
            outputs.append(train_step(model, optimizer, batches, tp_group=tp_group, pp_group=pp_group, **how, **loss))
            chosen.append(choices.of_step())
        weights, still_untied = _of_pipeline(model, lambda parameter: parameter)
    if broken is None:
        # T4, T33: only rank 0 reports, so the others' copies of replicated parameters are compared here, bit for bit.
        verify_all_replicas(model)
    if rank != 0:
        return None
    losses = [output.loss.item() for output in outputs]
    further = [loss for output in outputs for loss in output.mtp_losses.tolist()]
    norm = outputs[0].grad_norm.item()
    return Result(losses[0], norm, gradients, losses, further, weights, chosen, untied + still_untied)


def _of_pipeline(
    model_chunks: list[nn.Module], get: Callable[[nn.Parameter], Tensor | None]
) -> tuple[dict[str, Tensor], int]:
    """A tensor of each parameter of all stages, whole, by name, and how many copies do not equal their original.

    Collective.
    """
    own: dict[str, Tensor] = {}
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            tensor = get(parameter)
            if tensor is not None:
                own[name] = whole(tensor)
    copies = copies_of(model_chunks)
    group = parallel_state.get_pipeline_model_parallel_group()
    if group_size(group) > 1:
        gathered: list[Any] = [None] * group_size(group)
        torch.distributed.all_gather_object(gathered, (own, copies), group=group)
        own = {name: tensor for tensors, _ in gathered for name, tensor in tensors.items()}
        copies = {name: original for _, found in gathered for name, original in found.items()}
    unequal = sum(not torch.equal(own.pop(name), own[original]) for name, original in copies.items())
    return own, unequal


class _HeldOut:
    """Two global batches that training does not see."""

    def __init__(self, layout: Layout, dp_rank: int, names: Collection[str]) -> None:
        self._batches = (micro_batches(layout, step, dp_rank, names) for step in (100, 101))

    def next_global_batch(self, num_microbatches: int) -> list[MicroBatch]:
        return next(self._batches)


def train_and_evaluate(rank: int, world_size: int, layout: Layout, evaluating: bool) -> tuple[list[float], list[float]]:
    """Losses of two steps with dropout, and the held-out loss before each of them if `evaluating`."""
    initialize(layout)
    dp_rank = parallel_state.get_data_parallel_rank()
    model, optimizer = build(layout, dropout=0.1)
    set_random_seed(SEED)
    names = names_read(model)
    how: dict[str, Any] = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pp_group": parallel_state.get_pipeline_model_parallel_group(),
        "forward_backward_func": get_forward_backward_func(transformer_config(layout)),
    }
    losses, held_out = [], []
    for step in range(2):
        if evaluating:
            stream: Any = _HeldOut(layout, dp_rank, names)
            held_out.append(evaluate(model, stream, iterations=2, num_microbatches=layout.accumulation, **how))
        batches = micro_batches(layout, step, dp_rank, names)
        tp_group = parallel_state.get_tensor_model_parallel_group()
        losses.append(train_step(model, optimizer, batches, tp_group=tp_group, **how).loss.item())
    return losses, held_out


def build(
    layout: Layout, dropout: float = 0.0, optimizer_config: OptimizerConfig | None = None
) -> tuple[list[nn.Module], MegatronOptimizer]:
    """The model at this rank of a layout, and its optimizer, by default SGD."""
    ddp = DistributedDataParallelConfig(
        data_parallel_sharding_strategy=layout.strategy, num_distributed_optimizer_instances=layout.replicas
    )
    model = build_model(
        replace(transformer_config(layout), hidden_dropout=dropout, attention_dropout=dropout),
        gpt_config(layout),
        ddp,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        device=torch.device("cpu"),
        seed=SEED,
    )
    if layout.compiled:
        torch.compiler.reset()  # what other tests compiled in this process counts towards torch's limit
        for chunk in model:
            for layer in chunk.decoder.layers.values():  # type: ignore[union-attr, operator]
                compile_layer(layer, backend="aot_eager")
    if optimizer_config is None:
        optimizer_config = OptimizerConfig(
            optimizer="sgd", lr=LEARNING_RATE, sgd_momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, clip_grad=CLIP
        )
    optimizer = get_megatron_optimizer(optimizer_config, model)
    for group in optimizer.param_groups:
        group["lr"] = optimizer_config.lr
        group["weight_decay"] = optimizer_config.weight_decay * group.get("wd_mult", 1.0)
    return model, optimizer


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected element.

    One gradient is zero in exact arithmetic: the bias of the key norm without rotary positions shifts all keys alike,
    which the softmax does not see. Its rounding noise (1e-17) is compared with 1e-6; other gradients exceed 1e-3.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    scale = max(expected.abs().max().item(), 1e-6)
    return (actual - expected).abs().max().item() / scale


def _pairs_of_losses(actual: Result, expected: Result) -> Iterator[tuple[float, float]]:
    yield from zip(actual.losses, expected.losses, strict=True)
    yield from zip(actual.mtp_losses, expected.mtp_losses, strict=True)


def deviations(actual: Result, expected: Result) -> dict[str, float]:
    """The largest relative deviation of each kind, and the steps in which tokens went to other experts.

    A gradient that is missing is infinitely wrong.
    """
    assert actual.gradients.keys() <= expected.gradients.keys()
    assert actual.weights.keys() == expected.weights.keys()
    return {
        "loss": abs(actual.loss / expected.loss - 1.0),
        "grad_norm": abs(actual.grad_norm / expected.grad_norm - 1.0),
        "gradients": max(
            relative_error(actual.gradients[n], g) if n in actual.gradients else math.inf
            for n, g in expected.gradients.items()
        ),
        "losses": max(abs(a / e - 1.0) for a, e in _pairs_of_losses(actual, expected)),
        "weights": max(relative_error(actual.weights[n], w) for n, w in expected.weights.items()),
        "tied": actual.untied,
        "choices": sum(a != e for a, e in zip(actual.choices, expected.choices, strict=True)),
    }
