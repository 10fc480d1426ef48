"""What is left to do with gradients after the backward pass and the data parallel reduction."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite.process_groups import group_size
from megatron_lite.tensor_parallel.parameters import local, named_parameter_specs


@torch.no_grad()
def finalize_model_grads(model: nn.Module | Sequence[nn.Module], tp_group: ProcessGroup | None) -> None:
    """Sum over the tensor parallel ranks the gradients that are declared partial sums over them.

    These belong to parameters that every tensor parallel rank holds whole but of which it saw only a part: norms, row
    biases and gates under sequence parallelism, and the norms of query and key heads always. All other gradients are
    complete, or shards of their own, and must not be touched.

    Args:
        model: one module, or one per virtual pipeline stage, after backward.
        tp_group: the tensor parallel group; None or one rank: nothing to do.

    Collectives: one all-reduce (SUM) over `tp_group` for each dtype, of the local data parallel shards.
    """
    if group_size(tp_group) == 1:
        return
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    partial: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, spec in named_parameter_specs(chunk).items():
            gradient = parameters[name].grad
            if spec.partial_over_tp and gradient is not None:
                shard = local(gradient)
                partial[shard.dtype].append(shard)
    for shards in partial.values():
        flat = torch.cat([shard.reshape(-1) for shard in shards])
        dist.all_reduce(flat, group=tp_group)
        pieces = flat.split([shard.numel() for shard in shards])
        torch._foreach_copy_(shards, [piece.view_as(shard) for piece, shard in zip(pieces, shards, strict=True)])
