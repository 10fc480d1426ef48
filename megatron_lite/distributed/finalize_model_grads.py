"""What is left to do with gradients after the backward pass and the data parallel reduction."""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite import parallel_state
from megatron_lite.distributed.tied_embeddings import sum_tied_gradients
from megatron_lite.model_chunks import ModelChunks, as_chunks
from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel.parameters import local, named_parameter_specs


@torch.no_grad()
def finalize_model_grads(
    model: ModelChunks,
    tp_group: ProcessGroup | None,
    etp_group: ProcessGroup | None = None,
    embedding_group: ProcessGroup | None = None,
) -> None:
    """Sum the gradients that the backward pass left as partial sums over ranks.

    Tied embeddings of a pipeline: the first and the last stage each have a part (`sum_tied_gradients`). The others are
    declared partial sums over the tensor parallel ranks.

    These belong to parameters that every tensor parallel rank holds whole but of which it saw only a part: norms, row
    biases and gates under sequence parallelism, and the norms of query and key heads always. Those of routed experts
    (the bias of their second layer) are summed over the expert tensor parallel ranks. All other gradients are
    complete, or shards of their own, and must not be touched.

    Args:
        model: one module, or one per virtual pipeline stage, after backward.
        tp_group: the tensor parallel group; None or one rank: nothing to do for dense parameters.
        etp_group: the expert tensor parallel group, default that of `parallel_state`.
        embedding_group: the ranks of the first and of the last stage of a pipeline, default that of `parallel_state`.

    Collectives: one all-reduce (SUM) over each group for each dtype, of the local data parallel shards.
    """
    if etp_group is None:
        etp_group = parallel_state.get_expert_tensor_parallel_group(check_initialized=False)
    if embedding_group is None:
        embedding_group = parallel_state.get_embedding_group(check_initialized=False)
    chunks = as_chunks(model)
    for group, of_experts in ((tp_group, False), (etp_group, True)):
        if group_size(group) > 1:
            _sum_partial_gradients(chunks, group, of_experts)
    sum_tied_gradients(chunks, embedding_group)


def _sum_partial_gradients(chunks: list[nn.Module], group: ProcessGroup | None, of_experts: bool) -> None:
    partial: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, spec in named_parameter_specs(chunk).items():
            gradient = parameters[name].grad
            if spec.partial_over_tp and spec.is_expert == of_experts and gradient is not None:
                shard = local(gradient)
                partial[shard.dtype].append(shard)
    for shards in partial.values():
        flat = torch.cat([shard.reshape(-1) for shard in shards])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([shard.numel() for shard in shards])
        torch._foreach_copy_(shards, [piece.view_as(shard) for piece, shard in zip(pieces, shards, strict=True)])
