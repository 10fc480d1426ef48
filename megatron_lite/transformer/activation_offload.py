"""Activations that wait in the host's memory for their backward pass: --cpu-offloading-num-layers.

    layer 0      | forward | copies to the host    |   ...   | copies back       | backward |
    layer 1                | forward | copies ...  |   ...   | backward          |
                                                               layer 1, or behind it

While a layer runs forward, what the one before it keeps for backward goes to pinned memory, on a stream of its own.
When the layer is done, that is freed on the device. While a layer runs backward, what the one before it needs comes
back. So the device holds the activations of two of these layers at a time, and its stream waits for copies, the host
never.

Whole storages travel, so that tensors that are views of one another (queries, keys and values) are copied once and come
back with their strides. On a CPU the same is done with plain copies: nothing is gained, but it can be tested.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from megatron_lite.host_copies import beside
from megatron_lite.pinned_memory import HostBytes
from megatron_lite.tensor_parallel.parameters import local

SMALLEST_BYTES = 1 << 20
"""Smaller storages stay: a copy of them costs more than it frees."""


class Storage:
    """The bytes of one storage, on the device (uint8 [bytes]), on the host, or on both while they travel."""

    def __init__(self, device_copy: Tensor) -> None:
        self.device, self.bytes = device_copy.device, len(device_copy)
        self.device_copy: Tensor | None = device_copy
        self.host_copy: HostBytes | None = None

    def send(self) -> None:
        """Begin to copy to the host."""
        assert self.device_copy is not None, "what has been sent was on the device"
        self.host_copy = HostBytes(self.bytes, self.device)
        self.host_copy.copy_from(self.device_copy)

    def fetch(self) -> None:
        """Begin to copy to the device, into memory that is there."""
        assert self.device_copy is not None, "there is room"
        assert self.host_copy is not None, "it was sent"
        self.host_copy.copy_to(self.device_copy)


class SavedView:
    """What autograd keeps in place of a tensor: where the tensor is in a storage of `layer`."""

    def __init__(self, layer: "LayerActivations", storage: Storage, tensor: Tensor) -> None:
        self.layer, self.storage, self.dtype = layer, storage, tensor.dtype
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def restore(self) -> Tensor:
        """The tensor again, on the device."""
        self.layer.fetch()
        self.layer.wait()
        whole = self.storage.device_copy
        assert whole is not None, "it was fetched"
        if whole.is_cuda:
            whole.record_stream(torch.cuda.current_stream())  # of shared experts' backward, for example
        elements = whole[: len(whole) // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return elements.as_strided(*self.place)


class LayerActivations:
    """What one layer keeps in one forward pass.

    Args:
        layer: whose parameters, and views and casts of them, stay on the device.
        given: tensors that all layers share, which stay too.
    """

    def __init__(self, layer: nn.Module, given: Iterable[Tensor]) -> None:
        self._layer = layer
        self._given = {one.untyped_storage().data_ptr() for one in given}
        self._being_saved: dict[tuple[int, int], Storage] = {}
        # Autograd's nodes hold the storages, each until it has run; nobody else does.
        self._sent: weakref.WeakSet[Storage] = weakref.WeakSet()
        self._is_back = True
        self._copied: torch.cuda.Event | None = None

    def pack(self, tensor: Tensor) -> Tensor | SavedView:
        """What autograd keeps in place of `tensor`: itself, or where to find it."""
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST_BYTES:
            return tensor
        key = storage.data_ptr(), tensor._version
        if key not in self._being_saved:
            if key[0] in self._given or self._is_of_parameter(tensor):
                return tensor
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._being_saved[key] = Storage(whole)
        return SavedView(self, self._being_saved[key], tensor)

    def _is_of_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter of the layer, or made of one alone."""
        node: Any = tensor.grad_fn
        while node is not None and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        # Where the chain ends, not in a node of several inputs or of none, is a leaf of the graph.
        leaf = tensor if node is None else getattr(node, "variable", None)
        if leaf is None:
            return False
        # Asked for late: FSDP puts gathered parameters in their place when the layer needs them.
        return _address(leaf) in map(_address, self._layer.parameters())

    def send(self) -> None:
        """Behind the layer's forward: begin to copy all of it to the host."""
        self._sent.update(self._being_saved.values())
        self._copied = _copy_beside(self._being_saved.values(), Storage.send)

    def free(self) -> None:
        """Behind the next layer's forward: the device needs it no longer."""
        self.wait()
        for storage in self._being_saved.values():
            storage.device_copy = None
        self._being_saved.clear()
        self._is_back = False

    def fetch(self) -> None:
        """Before the next layer's backward: begin to copy it back, once."""
        if self._is_back:
            return
        storages = list(self._sent)
        for storage in storages:
            # Memory of the main stream, so that it is free for others when autograd lets go of it.
            storage.device_copy = torch.empty(storage.bytes, dtype=torch.uint8, device=storage.device)
        self._copied = _copy_beside(storages, Storage.fetch)
        self._is_back = True

    def wait(self) -> None:
        """What the device does from here on finds all copies made."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def run_offloaded(layers: Sequence[nn.Module], number: int, hidden_states: Tensor, *context: Any) -> Tensor:
    """Run layers, [s, b, h] -> [s, b, h], the first `number` of which keep their activations on the host.

    Args:
        layers: more than `number`: the copies of each are made while the next one runs.
        number: how many.
        hidden_states: [s, b, h].
        context: further arguments of each layer. Tensors among them stay on the device.
    """
    given = [one for one in tree_leaves(context) if isinstance(one, Tensor)]
    before: LayerActivations | None = None
    for index, layer in enumerate(layers):
        activations = None
        if index < number:
            activations = LayerActivations(layer, given)
            with saved_tensors_hooks(activations.pack, _unpack):
                hidden_states = layer(hidden_states, *context)
            activations.send()
        else:
            hidden_states = layer(hidden_states, *context)
        if before is not None:
            before.free()
            hidden_states.register_hook(functools.partial(_before_backward, before))
        before = activations
    return hidden_states


@torch.no_grad()
def _address(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def _unpack(kept: Tensor | SavedView) -> Tensor:
    return kept.restore() if isinstance(kept, SavedView) else kept


def _before_backward(previous: LayerActivations, gradient: Tensor) -> None:
    """The gradient of a layer's output is known, its backward begins: what the layer before it needs may come."""
    previous.fetch()


def _copy_beside(storages: Iterable[Storage], copy: Callable[[Storage], None]) -> torch.cuda.Event | None:
    """Copy all of them, one way or the other: on one stream for both ways, as `HostBytes` asks."""
    todo = list(storages)

    def copy_all() -> None:
        for storage in todo:
            copy(storage)

    return beside(todo[0].device, copy_all, "activations") if todo else None
