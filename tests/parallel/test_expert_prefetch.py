"""When the weights of experts are gathered: before their layer waits for the counts of tokens."""

from unittest import mock

import pytest
import torch.distributed as dist

from megatron_lite import parallel_state
from megatron_lite.distributed import data_parallel
from megatron_lite.tensor_parallel import collectives
from tests.parallel.layouts import Layout, build, initialize, micro_batches
from tests.parallel.pool import WorkerPool

LAYOUT = Layout(moe="aux", ep=2, dp=4, strategy="optim_grads_params")


def order_of_collectives(rank: int, world_size: int, prefetch: bool) -> list[str]:
    """ "g" for each gather of weights, "c" for each exchange of counts, in one forward pass."""
    initialize(LAYOUT)
    with mock.patch.object(data_parallel, "_prefetch_experts", data_parallel._prefetch_experts if prefetch else bool):
        (model,), _ = build(LAYOUT)
    seen: list[str] = []
    # FSDP's name for it, in torch 2.13 and before.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, exchange = getattr(dist, name), collectives.all_to_all

    def watched_gather(*args, **kwargs):
        seen.append("g")
        return gather(*args, **kwargs)

    def watched_exchange(tensor, *args):
        seen.extend("c" * (not tensor.is_floating_point()))
        return exchange(tensor, *args)

    batch = micro_batches(LAYOUT, 0, parallel_state.get_data_parallel_rank())[0]
    with (
        mock.patch.object(dist, name, watched_gather),
        mock.patch.object(collectives, "all_to_all", watched_exchange),
    ):
        model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return seen


@pytest.mark.parametrize("prefetch", [True, False])
def test_experts_are_gathered_with_their_layer(pool: WorkerPool, prefetch: bool) -> None:
    """Root, then for each of two layers: layer, experts, counts. Without prefetching, which is the mutation, the
    experts come after the counts."""
    expected = "g" + ("ggc" if prefetch else "gcg") * 2
    for seen in pool.run(order_of_collectives, prefetch, world_size=LAYOUT.world_size):
        assert "".join(seen) == expected
