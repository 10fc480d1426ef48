"""Activations on the host: gradients are the same bits, and the device holds those of two layers at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_lite import parallel_state, pinned_memory
from megatron_lite.arguments import parse_args
from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.training.initialize import set_random_seed
from megatron_lite.transformer import activation_offload
from megatron_lite.transformer.activation_offload import LayerActivations, SavedView, Storage, run_offloaded
from tests.parallel.layouts import Layout, build, micro_batches


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", 1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.shutdown()


def gradients(layout: Layout, number: int, dropout: float = 0.0) -> tuple[list[Tensor], set[int]]:
    """Loss and each parameter's gradient, with the activations of `number` layers on the host; where parameters are."""
    (model,), _ = build(layout, dropout)
    model.decoder.config.cpu_offloading_num_layers = number  # type: ignore[union-attr]
    set_random_seed(7)
    model.train()
    for batch in micro_batches(layout, 0, 0):
        loss = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=batch.get("packed_seq_params"),
        )
        loss.sum().backward()
    addresses = {activation_offload._address(parameter) for parameter in model.parameters()}
    return [loss, *(local(parameter.grad) for parameter in model.parameters())], addresses


@pytest.mark.parametrize(
    ("layout", "dropout"),
    [
        (Layout(layers=4, accumulation=2), 0.0),
        (Layout(layers=4, swiglu=True, documents=True), 0.0),
        (Layout(layers=4, normalization="RMSNorm", positions="rope"), 0.1),
        (Layout(layers=4, moe="bias", accumulation=2), 0.1),
        (Layout(layers=4, variant="latent", positions="rope"), 0.0),
        (Layout(layers=4, variant="sinks"), 0.0),
        (Layout(layers=3, compiled=True), 0.0),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else None,
)
def test_gradients_are_the_same_bits(layout: Layout, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no parameter travels. Mutations: a view restored without its offset; parameters told by identity (the
    compiled layer sees the tensor inside of a DTensor).
    """
    sent: list[int] = []
    send = Storage.send
    monkeypatch.setattr(
        Storage, "send", lambda one: (sent.append(activation_offload._address(one.device_copy)), send(one))
    )
    found, parameters = gradients(layout, layout.layers - 1, dropout)
    assert sent
    assert parameters.isdisjoint(sent)
    del sent[:]
    expected, _ = gradients(layout, 0, dropout)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert not sent


def test_the_device_holds_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the forward pass it holds nothing of them; in the backward pass the next one comes before it is needed.

    Mutations: leave out free(), or fetch() in the hook (then one at a time); hold storages by more than autograd's
    nodes (a list in place of the WeakSet).
    """
    layers, held = [], []
    begin, restore = LayerActivations.__init__, SavedView.restore

    def on_device() -> int:
        return sum(any(one.device_copy is not None for one in layer._sent) for layer in layers)

    def watched(self: LayerActivations, *arguments: Any) -> None:
        begin(self, *arguments)
        layers.append(self)
        held.append(on_device())

    def counted(self: SavedView) -> Tensor:
        tensor = restore(self)
        held.append(on_device())
        return tensor

    monkeypatch.setattr(LayerActivations, "__init__", watched)
    monkeypatch.setattr(SavedView, "restore", counted)
    (model,), _ = build(Layout(layers=6))
    model.decoder.config.cpu_offloading_num_layers = 5  # type: ignore[union-attr]
    batch = micro_batches(Layout(layers=6), 0, 0)[0]
    loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    assert len(layers) == 5
    assert held == [0, 1, 1, 1, 1]
    assert on_device() == 0
    assert all(len(layer._sent) > 5 for layer in layers)
    del held[:]
    loss.sum().backward()
    assert max(held) == 2
    assert [len(layer._sent) for layer in layers] == [0] * 5


def test_the_next_micro_batch_takes_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: the host does not wait for the device, and torch's allocator would give it as much again.

    That is right as long as one stream makes all copies of both ways, in turn. Mutations: a stream for each way; room
    that is torch's; a storage held longer than its backward.
    """
    pinned_memory._free_pieces.cache_clear()
    made, streams = [], set()
    make, beside = pinned_memory._piece, activation_offload.beside

    def counted(size: int, device: torch.device) -> Tensor:
        made.append(size)
        return make(size, device)

    def named(device: torch.device, copy: Callable[[], None], which: str) -> None:
        streams.add(which)
        beside(device, copy, which)

    monkeypatch.setattr(pinned_memory, "_piece", counted)
    monkeypatch.setattr(activation_offload, "beside", named)
    gradients(Layout(layers=4), 3)
    taken = len(made)
    assert taken > 20
    gradients(Layout(layers=4, accumulation=3), 3)
    assert len(made) == taken
    assert streams == {"activations"}


def packed(
    layer: nn.Module, run: Callable[[], Any], given: tuple[Tensor, ...] = ()
) -> tuple[list[Any], LayerActivations]:
    """What autograd is given in place of each tensor that `run` saves."""
    activations, kept = LayerActivations(layer, given), []

    def pack(tensor: Tensor) -> Any:
        kept.append(activations.pack(tensor))
        return kept[-1]

    with saved_tensors_hooks(pack, activation_offload._unpack):
        run()
    return kept, activations


def test_views_of_a_storage_travel_once_and_come_back_as_they_were() -> None:
    """Mutation: a copy for each of them, or `empty_like` of a view in place of its storage."""
    x = torch.randn(6, 12, requires_grad=True)
    y = (x * 2).view(6, 3, 4).transpose(0, 1)
    views = [y[0], y[1:], y.transpose(1, 2)]
    kept, activations = packed(nn.Identity(), lambda: [view.square() for view in views])
    activations.send()
    activations.free()
    assert len(activations._sent) == 1
    for view, one in zip(views, kept, strict=True):
        assert isinstance(one, SavedView)
        back = one.restore()
        assert torch.equal(back, view)
        assert (back.stride(), back.storage_offset()) == (view.stride(), view.storage_offset())


def test_what_is_changed_in_place_is_sent_again() -> None:
    """Mutation: leave the version out of the key; the second value comes back as the first."""
    x = torch.randn(5, requires_grad=True)
    y = x * 2
    kept, activations = packed(nn.Identity(), lambda: (y.detach().requires_grad_().square(), y.add_(1), y.square()))
    activations.send()
    activations.free()
    assert len(activations._sent) == 2
    assert torch.equal(kept[-1].restore(), y)


def test_parameters_shared_and_small_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, views and casts of them stay; of what is shared and small the other input travels.

    Mutations: tell parameters by their address alone (the cast travels); leave out `given`.
    """
    layer, shared = nn.Linear(8, 4, bias=False), torch.randn(3, 4)
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = layer.weight

    def run() -> None:
        ((x * 2) @ weight.to(torch.bfloat16).t()).float() * shared

    kept, _ = packed(layer, run, (shared,))
    travelling = [tuple(one.place[0]) for one in kept if isinstance(one, SavedView)]
    assert travelling == [(3, 8)]
    kept, _ = packed(layer, lambda: (x.float() * 2) @ weight.t())
    assert [tuple(one.place[0]) for one in kept if isinstance(one, SavedView)] == [(3, 8)]
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", 1000)
    kept, _ = packed(layer, run, (shared,))
    assert not any(isinstance(one, SavedView) for one in kept)


def test_evaluation_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: ask neither for training nor for gradients."""
    monkeypatch.setattr("megatron_lite.transformer.transformer_block.run_offloaded", None)
    (model,), _ = build(Layout())
    model.decoder.config.cpu_offloading_num_layers = 1  # type: ignore[union-attr]
    batch = micro_batches(Layout(), 0, 0)[0]
    with torch.no_grad():
        model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    model.eval()
    model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])


def test_a_layer_that_keeps_nothing() -> None:
    """Nothing to send is no error."""
    x = torch.randn(3, requires_grad=True)
    run_offloaded([nn.Identity(), nn.Identity()], 1, x * 1.0).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--cpu-offloading-num-layers", "4"], "must be less than num_layers (4)"),
        (["--cpu-offloading-num-layers", "-1"], "not below 0"),
        (
            ["--cpu-offloading-num-layers", "1", "--recompute-granularity", "selective"],
            "moved to the host or recomputed",
        ),
        (
            ["--cpu-offloading-num-layers", "1", "--pipeline-model-parallel-size", "2"],
            "keeps the activations of several",
        ),
    ],
)
def test_rules(words: list[str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    size = ["--num-layers", "4", "--hidden-size", "8", "--num-attention-heads", "2", "--seq-length", "8", "--lr", "1"]
    rest = ["--train-iters", "1", "--mock-data", "--tokenizer-type", "NullTokenizer", "--micro-batch-size", "2"]
    with pytest.raises(ConfigError) as caught:
        parse_args([*size, *rest, *words])
    assert named in str(caught.value)
