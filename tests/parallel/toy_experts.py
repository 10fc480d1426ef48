"""A small model of dense parameters and experts, its rows dispatched by hand.

Every rank of the world has tokens of its own, as in a MoE layer. Each token's experts are given by its number alone.
"""

import torch
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.distributed import DistributedDataParallelConfig, finalize_model_grads, wrap_data_parallel
from megatron_lite.distributed.data_parallel import set_is_last_microbatch
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, StepResult, get_megatron_optimizer
from megatron_lite.process_groups import group_rank
from megatron_lite.tensor_parallel import create_parameter, initialize_parameters, local
from megatron_lite.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.transformer_config import TransformerConfig

HIDDEN, WIDTH, EXPERTS, TOPK, LAYERS = 6, 4, 4, 2, 2
TOKENS = 48


def _normal(tensor: Tensor) -> Tensor:
    return nn.init.normal_(tensor, std=0.5)


def choices(numbers: Tensor, only: int | None = None) -> Tensor:
    """The experts of tokens, by their numbers in the batch: [t] -> [t, k]; `only` sends all to this one and the next.

    Unequal loads, and none at all for the last expert in the first quarter of the batch.
    """
    if only is not None:
        return torch.tensor([only, (only + 1) % EXPERTS]).expand(len(numbers), TOPK)
    first = torch.where(numbers < TOKENS // 4, numbers % 2, numbers * numbers % EXPERTS)
    second = (first + 1 + numbers % 3) % EXPERTS
    second = torch.where((numbers < TOKENS // 4) & (second == EXPERTS - 1), 2, second)
    return torch.stack([first, second], dim=1)


class ToyMoELayer(nn.Module):
    """x + experts(x W) weighed by sigmoid(x R); W and R are dense, each rank sees its own tokens of them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.group = parallel_state.get_expert_tensor_and_model_parallel_group()
        dtype, partial = config.main_params_dtype, parallel_state.get_tensor_model_parallel_world_size() > 1
        create_parameter(self, "weight", (HIDDEN, HIDDEN), init_method=_normal, dtype=dtype, partial_over_tp=partial)
        create_parameter(self, "router", (TOPK, HIDDEN), init_method=_normal, dtype=dtype, partial_over_tp=partial)
        self.experts = GroupedMLP(EXPERTS // parallel_state.get_expert_model_parallel_world_size(), config)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        """[t, h], [t, k] -> [t, h]."""
        tokens, probs = x @ local(self.weight).t(), torch.sigmoid(x @ local(self.router).t())
        tokens = gather_from_sequence_parallel_region(tokens, group=self.group)
        probs = gather_from_sequence_parallel_region(probs, group=self.group)
        indices = gather_from_sequence_parallel_region(indices, group=self.group).flatten()
        count = self.experts.num_local_experts
        first = count * parallel_state.get_expert_model_parallel_rank()
        order = torch.argsort(indices, stable=True)
        mine = order[(indices[order] >= first) & (indices[order] < first + count)]
        loads = torch.bincount(indices, minlength=EXPERTS)[first : first + count]
        rows = self.experts.forward_dispatched(tokens[mine // TOPK], probs.flatten()[mine], loads)
        out = torch.zeros_like(tokens).index_add(0, mine // TOPK, rows)
        return x + reduce_scatter_to_sequence_parallel_region(out, self.group)


class ToyMoEModel(nn.Module):
    """Some layers; the loss is a sum over tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({str(number): ToyMoELayer(config) for number in range(LAYERS)})

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        """[t, h], [t, k] -> scalar."""
        for layer in self.layers.values():
            x = layer(x, indices)
        return x.pow(2).sum() / (2 * TOKENS)


def build(
    optimizer_config: OptimizerConfig,
    *,
    tp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    strategy: str = "no_shard",
    replicas: int = 1,
    **config: object,
) -> tuple[ToyMoEModel, MegatronOptimizer]:
    """Groups, model and optimizer of this rank, the way a training run makes them: without storage, split, filled."""
    ddp = DistributedDataParallelConfig(
        data_parallel_sharding_strategy=strategy, num_distributed_optimizer_instances=replicas
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        num_distributed_optimizer_instances=ddp.number_of_replicas(torch.distributed.get_world_size() // tp),
    )
    transformer = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        init_method=_normal,
        output_layer_init_method=_normal,
        tensor_model_parallel_size=tp,
        expert_tensor_parallel_size=etp,
        **{"fp64": True, "swiglu": True, **config},  # type: ignore[arg-type]
    )
    with torch.device("meta"):
        model = ToyMoEModel(transformer)
    wrap_data_parallel(model, transformer, ddp, parallel_state.get_dense_mesh(), parallel_state.get_expert_mesh())
    model.to_empty(device="cpu")
    initialize_parameters(model, 1234)
    return model, get_megatron_optimizer(optimizer_config, model)


def backward(
    model: ToyMoEModel, optimizer: MegatronOptimizer, step: int, micro_batches: int = 1, only: int | None = None
) -> None:
    """Gradients of the mean over the global batch, accumulated over `micro_batches`."""
    optimizer.zero_grad()
    dtype = model.config.params_dtype
    batch = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    ranks, rank = torch.distributed.get_world_size(), group_rank(torch.distributed.group.WORLD)
    pieces = torch.arange(TOKENS).chunk(micro_batches * ranks)
    for number in range(micro_batches):
        set_is_last_microbatch(model, number == micro_batches - 1)
        numbers = pieces[number * ranks + rank]
        loss = model(batch[numbers], choices(numbers, only))
        optimizer.scale_loss(loss).backward()
    finalize_model_grads(model, parallel_state.get_tensor_model_parallel_group())


def train(model: ToyMoEModel, optimizer: MegatronOptimizer, steps: range, micro_batches: int = 1) -> list[StepResult]:
    """Some steps of training."""
    results = []
    for step in steps:
        backward(model, optimizer, step, micro_batches)
        results.append(optimizer.step())
    return results
