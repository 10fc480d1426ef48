"""A small tensor parallel model with every kind of parameter that data parallelism and the optimizer must tell apart.

Split over tensor parallel ranks by rows and by columns, replicated with a complete gradient, replicated with a partial
one, tied; with row counts that no data parallel size divides, so that some ranks hold short or empty shards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_lite import parallel_state
from megatron_lite.distributed import DistributedDataParallelConfig, finalize_model_grads, wrap_data_parallel
from megatron_lite.distributed.data_parallel import set_is_last_microbatch
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, StepResult, get_megatron_optimizer
from megatron_lite.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    create_parameter,
    declare_parameter,
    initialize_parameters,
    local,
    reduce_from_tensor_model_parallel_region,
)

VOCABULARY, HIDDEN, INNER, HEAD = 10, 6, 16, 4
GLOBAL_BATCH, SEQUENCE = 24, 5


def _normal(tensor: Tensor) -> Tensor:
    return nn.init.normal_(tensor, std=0.5)


class ToyEmbedding(nn.Module):
    """[b, s] -> [b, s, h]; replicated over tensor parallel ranks."""

    def __init__(self) -> None:
        super().__init__()
        create_parameter(self, "weight", (VOCABULARY, HIDDEN), init_method=_normal, dtype=torch.float32)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens, local(self.weight)).to(dtype)


class ToyLayer(nn.Module):
    """Norm, column-parallel, a gate shared by all heads (partial over tensor parallel ranks), row-parallel, bias."""

    def __init__(self) -> None:
        super().__init__()
        group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        self.group = group

        def create(name: str, shape: tuple[int, ...], shard_dim: int | None = None, partial: bool = False) -> None:
            create_parameter(
                self,
                name,
                shape,
                init_method=_normal,
                dtype=torch.float32,
                shard_dim=shard_dim,
                group=group,
                partial_over_tp=partial,
            )

        create("norm", (HIDDEN,))
        create("fc1", (INNER, HIDDEN), shard_dim=0)
        create("fc1_bias", (INNER,), shard_dim=0)
        create("gate", (HEAD,), partial=True)
        create("fc2", (HIDDEN, INNER), shard_dim=1)
        create("bias", (HIDDEN,))

    def forward(self, hidden: Tensor) -> Tensor:
        weights = {name: local(parameter).to(hidden.dtype) for name, parameter in self.named_parameters()}
        inner = F.rms_norm(hidden, (HIDDEN,)) * weights["norm"]
        inner = copy_to_tensor_model_parallel_region(inner, self.group)
        inner = F.linear(inner, weights["fc1"], weights["fc1_bias"])
        inner = torch.tanh(inner.unflatten(-1, (-1, HEAD)) * weights["gate"]).flatten(-2)
        inner = reduce_from_tensor_model_parallel_region(F.linear(inner, weights["fc2"]), self.group)
        return hidden + inner + weights["bias"]


class ToyModel(nn.Module):
    """Tokens [b, s] to a loss summed over all of them."""

    def __init__(self, config: ModelParallelConfig, tied: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = ToyEmbedding()
        self.layers = nn.ModuleDict({str(number): ToyLayer() for number in range(layers)})
        self.output_layer = nn.Module()
        if tied:
            declare_parameter(self.output_layer, "weight", self.word_embeddings.parameter_specs["weight"])
            self.output_layer.weight = self.word_embeddings.weight
        else:
            shape = (VOCABULARY, HIDDEN)
            create_parameter(self.output_layer, "weight", shape, init_method=_normal, dtype=torch.float32)
        self.to(config.main_params_dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.word_embeddings(tokens, self.config.params_dtype)
        for layer in self.layers.values():
            hidden = layer(hidden)
        logits = F.linear(hidden, local(self.output_layer.weight).to(hidden.dtype))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="sum")


def global_batch(step: int) -> Tensor:
    """Tokens of one step, [24, 5]."""
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE), generator=torch.Generator().manual_seed(step))


def build(
    config: ModelParallelConfig,
    optimizer_config: OptimizerConfig,
    *,
    tp: int = 1,
    strategy: str = "no_shard",
    replicas: int = 1,
    tied: bool = True,
    grad_reduce_in_bf16: bool = False,
) -> tuple[ToyModel, MegatronOptimizer]:
    """Groups, model and optimizer of this rank, the way a training run makes them: without storage, split, filled."""
    world_size = torch.distributed.get_world_size()
    ddp = DistributedDataParallelConfig(
        data_parallel_sharding_strategy=strategy,
        num_distributed_optimizer_instances=replicas,
        grad_reduce_in_bf16=grad_reduce_in_bf16,
    )
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            num_distributed_optimizer_instances=ddp.number_of_replicas(world_size // tp),
        )
    with torch.device("meta"):
        model = ToyModel(config, tied)
    wrap_data_parallel(model, config, ddp, parallel_state.get_dense_mesh())
    model.to_empty(device="cpu")
    if tied:  # a plain parameter that leaves the meta device becomes two
        model.output_layer.weight = model.word_embeddings.weight
    initialize_parameters(model, 1234)
    return model, get_megatron_optimizer(optimizer_config, model)


def backward(
    model: ToyModel, optimizer: MegatronOptimizer, step: int, micro_batches: int = 1, loss_factor: float = 1.0
) -> None:
    """Gradients of the mean over the global batch, accumulated over `micro_batches`; `loss_factor` is this rank's."""
    optimizer.zero_grad()
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    pieces = global_batch(step).chunk(micro_batches * ranks)
    for number in range(micro_batches):
        set_is_last_microbatch(model, number == micro_batches - 1)
        loss = model(pieces[number * ranks + rank]) * (loss_factor / (GLOBAL_BATCH * (SEQUENCE - 1)))
        optimizer.scale_loss(loss).backward()
    finalize_model_grads(model, parallel_state.get_tensor_model_parallel_group())


def train(model: ToyModel, optimizer: MegatronOptimizer, steps: range, micro_batches: int = 1) -> list[StepResult]:
    """Some steps of training."""
    results = []
    for step in steps:
        backward(model, optimizer, step, micro_batches)
        results.append(optimizer.step())
    return results


def whole(tensor: Tensor) -> Tensor:
    """The full logical tensor on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_weights(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """Full weights by name."""
    return {name: whole(parameter) for name, parameter in optimizer.named_parameters.items()}


def whole_gradients(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """Full gradients by name."""
    return {name: whole(p.grad) for name, p in optimizer.named_parameters.items() if p.grad is not None}
