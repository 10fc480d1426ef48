"""A linear layer whose three products are multiplied in 8-bit floating point (fp8).

A tensor t becomes 8-bit numbers and float32 scales: with the format's largest number M (448 for e4m3, 57344 for e5m2)

    encode = M / amax(|t|)        data = fp8(clamp(t encode, -M, M))        t is about data / encode

and a product of two such is a product of their data, divided by both scales. By the recipe, amax is taken

    tensorwise  over the whole tensor
    rowwise     over the dimension that the product sums over: of x weight^T one scale for each row of x and of weight.
                Scales are rounded down to a power of two, so that the two roundings of a tensor (its rows for one
                product, its columns for another) put a number on the same grid.

Scales are those of the tensor at hand, not of earlier steps. Formats: Micikevicius et al. 2022, arXiv:2209.05433.

The scale belongs to the logical tensor of a micro-batch: where ranks hold parts of what amax is taken over, it is their
largest. So a number is rounded alike at every layout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from megatron_lite.gradient_pass import computes
from megatron_lite.ops import fp8_choices
from megatron_lite.process_groups import computes_on_gpu, group_size
from megatron_lite.tensor_parallel import collectives

FORMATS = dict(zip(fp8_choices.FORMATS, (torch.float8_e4m3fn, torch.float8_e5m2), strict=True))
"""Name of a format -> the dtype of gradients; inputs and weights are e4m3 in both."""
RECIPES = fp8_choices.RECIPES
MULTIPLE = 16
"""What the sizes of operands must be a multiple of, for the kernels."""

E4M3 = torch.float8_e4m3fn
SMALLEST_AMAX = 2.0**-100  # below it, M / amax leaves float32
Groups = tuple[ProcessGroup | None, ...]


class Quantized(NamedTuple):
    """A matrix in fp8, or several, [E, rows, columns].

    Attributes:
        data: [rows, columns] in an fp8 dtype.
        encode: float32, what it was multiplied with: [] for all, [rows, 1] or [1, columns].
    """

    data: Tensor
    encode: Tensor

    def transposed(self) -> "Quantized":
        """[columns, rows], its rows contiguous in memory, as the kernels want both operands."""
        return Quantized(self.data.t().contiguous(), self.encode.t())

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """What is left of the matrix, in `dtype`; no digit of it is lost in bfloat16 if scales are powers of two."""
        return (self.data.float() / self.encode).to(dtype)


def has_fp8_kernels() -> bool:
    """Return True if this process computes on a GPU that multiplies fp8 (capability 8.9: Ada, Hopper and later)."""
    if not computes_on_gpu() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (8, 9)


def encode_scale(tensor: Tensor, dtype: torch.dtype, along: int | None, groups: Groups = ()) -> Tensor:
    """M / amax as float32: [] with `along` None, else for each slice along that dimension, which becomes 1.

    Args:
        tensor: [rows, columns], or several matrices, [E, rows, columns].
        dtype: the fp8 dtype.
        along: the dimension amax is taken over; None for all.
        groups: ranks that hold other parts of what amax is taken over. Collectives: all-reduce (max) over each.
    """
    if tensor.numel() == 0:  # the largest of no numbers is 0 here, which leaves the scale to the other ranks
        amax = tensor.sum(along, keepdim=along is not None).float()
    else:
        amax = torch.linalg.vector_norm(tensor, math.inf, dim=along, keepdim=along is not None).float()
    for group in groups:
        if group is not None and group_size(group) > 1:
            amax = collectives.all_reduce(amax, group, "max")
    scale = torch.finfo(dtype).max / amax.clamp(min=SMALLEST_AMAX)
    if along is not None:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    return scale


def quantize(tensor: Tensor, dtype: torch.dtype, encode: Tensor) -> Quantized:
    """What does not fit saturates. NaN stays NaN, and infinity, whose scale is 0, becomes NaN."""
    limit = torch.finfo(dtype).max
    return Quantized((tensor.float() * encode).clamp(-limit, limit).to(dtype).contiguous(), encode)


def multiply(a: Quantized, b: Quantized, dtype: torch.dtype, kernels: bool, fast: bool = False) -> Tensor:
    """a b^T, [m, c] x [n, c] -> [m, n] in `dtype`.

    Args:
        a, b: with one scale, or one for each row.
        dtype: of the result.
        kernels: multiply in fp8 where that is possible. Else the same numbers are multiplied in `dtype`.
        fast: kernels may accumulate with less precision, as is usual in forward.
    """
    if kernels and a.data.is_cuda and dtype == torch.bfloat16 and b.data.size(0) % MULTIPLE == 0 and a.data.numel():
        return scaled_mm(a, b, dtype, fast)
    product = a.data.to(dtype) @ b.data.to(dtype).t()
    product = product.to(torch.promote_types(dtype, torch.float32))
    return (product / a.encode / b.encode.t()).to(dtype)


def scaled_mm(a: Quantized, b: Quantized, dtype: torch.dtype, fast: bool) -> Tensor:
    """`multiply` by torch's kernels: c is filled up to a multiple of 16, n must be one, not both may be e5m2."""
    missing = -a.data.size(1) % MULTIPLE
    left, right = a.data, b.data
    if missing:
        left, right = (F.pad(x.view(torch.uint8), (0, missing)).view(x.dtype) for x in (left, right))
    decode = a.encode.reciprocal(), b.encode.t().reciprocal()
    return torch._scaled_mm(left, right.t(), *decode, out_dtype=dtype, use_fast_accum=fast)


@dataclass(frozen=True)
class Fp8Linear:
    """x weight^T + b in fp8, gradients too: [..., k] x [n, k] -> [..., n] in the dtype of x.

    Attributes:
        gradient_dtype: fp8 dtype of the gradient of the output.
        recipe: one of RECIPES.
        kernels: as in `multiply`.
        column_group: ranks over which n is split, and over which the gradient of x is summed.
        row_group: ranks over which k is split; the caller sums the result.
        sequence_group: the ranks of column_group if x is a part of the sequence (dim 0), which is gathered, and whose
            gradient is scattered again.
        context_group: ranks that hold other tokens of the same micro-batch.
    """

    gradient_dtype: torch.dtype
    recipe: str
    kernels: bool = False
    column_group: ProcessGroup | None = None
    row_group: ProcessGroup | None = None
    sequence_group: ProcessGroup | None = None
    context_group: ProcessGroup | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Collectives in forward: amaxes, and x along dim 0; in backward amaxes, x again, and the gradient of x."""
        output: Tensor = _Fp8Product.apply(x, weight, self)
        return output if bias is None else output + bias

    def quantize_input(self, x: Tensor, dim: int) -> Quantized:
        """Of x, [tokens, k], for a product that sums over `dim`."""
        return self._quantize(x, E4M3, dim, (self.context_group, self.sequence_group), (self.row_group,))

    def quantize_weight(self, weight: Tensor, dim: int) -> Quantized:
        """Of the weight, [n, k]."""
        return self._quantize(weight, E4M3, dim, (self.column_group,), (self.row_group,))

    def quantize_gradient(self, grad: Tensor, dim: int) -> Quantized:
        """Of the output's gradient, [tokens, n]."""
        return self._quantize(grad, self.gradient_dtype, dim, (self.context_group,), (self.column_group,))

    def _quantize(
        self, tensor: Tensor, dtype: torch.dtype, dim: int, *splits: tuple[ProcessGroup | None, ...]
    ) -> Quantized:
        """`splits` are the ranks over which dimension 0, and over which dimension 1 is split."""
        along = None if self.recipe == "tensorwise" else dim
        groups = splits[0] + splits[1] if along is None else splits[along]
        return quantize(tensor, dtype, encode_scale(tensor, dtype, along, groups))


class _Fp8Product(Function):
    """Kept for backward: the weight as it came, and x in fp8 (tensorwise) or as it came (rowwise rounds it anew)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fp8: Fp8Linear) -> Tensor:
        tokens = x.reshape(-1, x.size(-1))
        leading: tuple[int, ...] = x.shape[:-1]
        ctx.fp8, ctx.tensorwise = fp8, fp8.recipe == "tensorwise"
        inputs, weights = fp8.quantize_input(tokens, 1), fp8.quantize_weight(weight, 1)
        ctx.save_for_backward(inputs.data if ctx.tensorwise else tokens, inputs.encode, weight, weights.encode)
        if fp8.sequence_group is not None:
            encode = inputs.encode
            if not ctx.tensorwise:
                encode = collectives.all_gather(encode, 0, fp8.sequence_group)
            inputs = Quantized(_wait(_start_gather(inputs.data, fp8.sequence_group), E4M3), encode)
            leading = (leading[0] * fp8.sequence_group.size(), *leading[1:])
        output = multiply(inputs, weights, x.dtype, fp8.kernels, fast=True)
        return output.view(*leading, output.size(-1))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved, input_encode, weight, weight_encode = ctx.saved_tensors
        fp8: Fp8Linear = ctx.fp8
        wants_input = ctx.needs_input_grad[0] and computes("activations")
        wants_weight = ctx.needs_input_grad[1] and computes("weights")
        grad = grad_output.reshape(-1, grad_output.size(-1))
        inputs, grad_input, grad_weight = Quantized(saved, input_encode), None, None
        sum_of_grads: Callable[[], Tensor] | None = None
        if wants_weight:
            if not ctx.tensorwise:
                inputs = fp8.quantize_input(saved, 0)
            if fp8.sequence_group is not None:
                inputs = inputs._replace(data=_start_gather(inputs.data, fp8.sequence_group))
        gradient = fp8.quantize_gradient(grad, 1)
        if wants_input:
            weights = quantize(weight, E4M3, weight_encode) if ctx.tensorwise else fp8.quantize_weight(weight, 0)
            grad_input = multiply(gradient, weights.transposed(), grad.dtype, fp8.kernels)
            grad_input = grad_input.view(*grad_output.shape[:-1], weight.size(1))
            if fp8.sequence_group is not None:
                sum_of_grads = collectives.start_reduce_scatter(grad_input, fp8.sequence_group)
            elif fp8.column_group is not None:
                sum_of_grads = collectives.start_all_reduce(grad_input, fp8.column_group)
        if wants_weight:
            if fp8.sequence_group is not None:
                inputs = inputs._replace(data=_wait(inputs.data, E4M3))
            if not ctx.tensorwise:
                gradient = fp8.quantize_gradient(grad, 0)
            grad_weight = multiply(gradient.transposed(), inputs.transposed(), weight.dtype, fp8.kernels)
        if sum_of_grads is not None:
            grad_input = sum_of_grads()
        return grad_input, grad_weight, None


def _start_gather(data: Tensor, group: ProcessGroup) -> Tensor:
    """Launch the concatenation of fp8 rows, as bytes."""
    return collectives.start_all_gather(data.view(torch.uint8), group)


def _wait(pending: Tensor, dtype: torch.dtype) -> Tensor:
    return collectives.wait(pending).view(dtype)
