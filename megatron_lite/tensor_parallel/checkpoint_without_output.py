"""Recomputation of what another operation keeps: outputs are freed once they are read, and come back in backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Run(Function):
    """Forward: the function without a graph. Backward: that of the graph which `CheckpointWithoutOutput` made anew."""

    @staticmethod
    def forward(ctx: Any, owner: "CheckpointWithoutOutput", *args: Tensor) -> tuple[Tensor, ...]:
        ctx.owner = owner
        return owner.function(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.owner.backward(grads)


class CheckpointWithoutOutput:
    """Run a function, free its outputs once they have been read, and compute them again just before they are needed.

    Plain recomputation keeps a function's outputs where the operation behind it saves them for its backward pass, as
    attention does with queries, keys and values. Here the memory of the outputs themselves is given back, until the
    gradient of what was made of them arrives.

    Use it once, in training: `outputs = recomputed.checkpoint(function, *inputs)`, then `result = read(*outputs)`, then
    `recomputed.discard_output_and_register_recompute(result)`. There is one backward pass, by `backward()`: parameters
    accumulate their gradients on the way, so `torch.autograd.grad` does not return them.
    """

    def __init__(self) -> None:
        self.function: Callable[..., tuple[Tensor, ...]] = tuple
        self._args: tuple[Tensor, ...] = ()
        self._storages: list[torch.UntypedStorage] = []
        self._leaves: tuple[Tensor, ...] = ()
        self._made: tuple[Tensor, ...] = ()

    def checkpoint(self, function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[Tensor, ...]:
        """function(*args), whose graph is made in backward.

        Args:
            function: draws no random numbers; its outputs do not share memory with each other or with the arguments,
                and its own backward pass does not read them.
            args: what gradients shall flow to, besides the parameters the function reads. If none needs one, as behind
                frozen layers, nothing is freed.
        """
        if not any(arg.requires_grad for arg in args):
            return function(*args)
        self.function, self._args = function, args
        outputs: tuple[Tensor, ...] = _Run.apply(self, *args)
        self._storages = [output.untyped_storage() for output in outputs]
        assert all(output.untyped_storage().nbytes() == output.nbytes for output in outputs), "outputs share memory"
        return outputs

    def discard_output_and_register_recompute(self, result: Tensor) -> None:
        """Free the outputs, from which `result` was made and nothing else, until the gradient of `result` arrives."""
        if not self._storages:
            return
        for storage in self._storages:
            storage.resize_(0)
        result.register_hook(self._recompute)

    def _recompute(self, grad: Tensor) -> None:
        if not self._args:
            raise RuntimeError("what CheckpointWithoutOutput frees has one backward pass, and this is another one")
        self._leaves = tuple(arg.detach().requires_grad_(arg.requires_grad) for arg in self._args)
        with torch.enable_grad():
            self._made = self.function(*self._leaves)
        for storage, output in zip(self._storages, self._made, strict=True):
            # Not a change that autograd should notice: the values are those that were saved.
            made = output.detach().untyped_storage()
            storage.resize_(made.nbytes())
            storage.copy_(made)
            made.resize_(0)  # only its graph is needed
        self._storages = []  # from here on they live as long as who reads them does

    def backward(self, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of the arguments, given those of the outputs; parameters accumulate theirs."""
        assert self._made, "call discard_output_and_register_recompute before backward"
        torch.autograd.backward(self._made, grads)
        found = [leaf.grad for leaf in self._leaves]
        self._args = self._leaves = self._made = ()
        return found
