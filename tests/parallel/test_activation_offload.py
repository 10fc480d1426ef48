"""Activations on the host where weights are sharded and sequences split: the same bits as without."""

import torch

from megatron_lite import parallel_state
from megatron_lite.training.step import forward_backward
from megatron_lite.transformer import activation_offload
from tests.parallel.layouts import Layout, build, initialize, micro_batches
from tests.parallel.pool import WorkerPool

LAYOUT = Layout(layers=3, tp=2, sp=True, dp=2, strategy="optim_grads_params", accumulation=2, moe="aux", ep=2)


def gradients_differ(rank: int, world_size: int) -> tuple[list[str], int, int]:
    """Parameters whose gradient changes when activations are on the host; storages sent, and those of weights."""
    initialize(LAYOUT)
    smallest, activation_offload.SMALLEST_BYTES = activation_offload.SMALLEST_BYTES, 1
    send, sent, weights = activation_offload.Storage.send, [], []

    def counted(storage: activation_offload.Storage) -> None:
        assert storage.device_copy is not None
        sent.append(storage)
        weights.extend([1] * (storage.device_copy.untyped_storage().data_ptr() in addresses()))
        send(storage)

    def addresses() -> set[int]:
        return {activation_offload._address(parameter) for parameter in model.parameters()}

    activation_offload.Storage.send = counted  # type: ignore[method-assign]
    try:
        found = []
        for number in (0, 2):
            (model,), optimizer = build(LAYOUT)
            model.decoder.config.cpu_offloading_num_layers = number  # type: ignore[union-attr]
            forward_backward(
                [model],
                optimizer,
                micro_batches(LAYOUT, 0, parallel_state.get_data_parallel_rank()),
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
            found.append({name: one.grad.to_local() for name, one in model.named_parameters()})  # type: ignore[union-attr]
    finally:
        activation_offload.Storage.send, activation_offload.SMALLEST_BYTES = send, smallest  # type: ignore[method-assign]
    return [name for name, one in found[0].items() if not torch.equal(one, found[1][name])], len(sent), sum(weights)


def test_gradients_are_the_same_bits(pool: WorkerPool) -> None:
    """Gathered weights stay, though FSDP puts them in place only while a layer runs.

    Mutation: ask for the parameters' addresses when the layer begins (gathered weights are sent after FSDP has freed
    them, and the ranks crash).
    """
    for differing, sent, weights in pool.run(gradients_differ, world_size=LAYOUT.world_size):
        assert differing == []
        assert sent > 20
        assert weights == 0
