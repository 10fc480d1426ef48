"""Linear layers of several experts as one grouped product: each group of rows meets the weight of its own expert.

| backend            | needs                                                        | reads the counts on the host |
|--------------------|--------------------------------------------------------------|------------------------------|
| torch              | F.grouped_mm; rows of multiples of 16 bytes; on a GPU not    | on a GPU not for bfloat16    |
|                    | float64, on a CPU float32 only                               | from Hopper on               |
| transformer_engine | that package, a GPU; otherwise as torch                      | yes                          |
| grouped_gemm       | that package, a GPU, bfloat16; rows of multiples of 16 bytes | yes                          |
| loop               | nothing: the reference, in any dtype                         | yes                          |

Symbols: m rows, E experts.
"""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_lite.errors import ConfigError
from megatron_lite.gradient_pass import computes
from megatron_lite.ops.swiglu import gates_then_ups

# The grouped kernels want every row of a matrix to begin at a multiple of this.
_ALIGNMENT_BYTES = 16


class Before(NamedTuple):
    """What happens to the rows before the product, in their own row each: function(x, factor) -> [m, in].

    Attributes:
        function: of x [m, ...] and factor.
        factor: [m], a number for each row.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    factor: Tensor


class Products(NamedTuple):
    """The three products of a linear layer, for groups of rows; everything contiguous."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]  # x [m, in], weight [E, out, in], counts -> [m, out]
    grad_x: Callable[[Tensor, Tensor, Tensor], Tensor]  # grad [m, out], weight, counts -> [m, in]
    grad_weight: Callable[[Tensor, Tensor, Tensor], Tensor]  # grad [m, out], x [m, in], counts -> [E, out, in]


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    tokens_per_expert: Tensor,
    backend: str = "auto",
    gates_first: bool = False,
    before: Before | None = None,
    fp8: Callable[[Products], Products] | None = None,
) -> Tensor:
    """Rows times the transposed weight of their expert: [m, in] x [E, out, in] -> [m, out].

    For the backward pass x, weight and `before.factor` are kept, as they came: what is made of them here is made again.
    The gradient of the weight of an expert without rows is zero, not None, also if there are no rows at all.

    Args:
        x: [m, in], the rows of expert 0 first, then those of expert 1, ...; every row belongs to an expert.
        weight: [E, out, in] in the dtype of x.
        tokens_per_expert: [E] int64 numbers of rows, on the device of x; they sum to m.
        backend: see `choose_backend`.
        gates_first: the outputs 0, 2, 4, ... come first, then 1, 3, 5, ...: gates and ups in halves.
        before: applied to x.
        fp8: makes of a backend's products those in fp8 (ops/fp8_grouped_linear.py); None: the dtype of x.

    Raises:
        ConfigError: a backend that is unknown or not installed.
    """
    _, size_out, size_in = weight.shape
    chosen = choose_backend(x.dtype, x.device, size_in, size_out, backend) if x.size(0) else "loop"
    compiling = torch.compiler.is_compiling()
    if chosen == "transformer_engine" and (fp8 is not None or compiling):
        chosen = choose_backend(x.dtype, x.device, size_in, size_out, "torch")
    if chosen == "transformer_engine":
        rows = x if before is None else before.function(x, before.factor)
        return _transformer_engine(rows, gates_then_ups(weight, 1) if gates_first else weight, tokens_per_expert)
    function, factor = (None, None) if before is None else before
    products = _in_one_piece(chosen) if compiling else _PRODUCTS[chosen]
    products = products if fp8 is None else fp8(products)
    products = _gates_first(products) if gates_first else products
    return _GroupedLinear.apply(x, factor, weight, tokens_per_expert, function, products)  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result
def choose_backend(dtype: torch.dtype, device: torch.device, size_in: int, size_out: int, backend: str = "auto") -> str:
    """The backend for [m, size_in] -> [m, size_out]: the best that is there and takes these sizes; at last the loop.

    Args:
        dtype: of the rows and weights.
        device: of both.
        size_in: numbers in a row.
        size_out: numbers in a row of the result.
        backend: auto, or the only one to ask besides the loop.

    Raises:
        ConfigError: a backend that is unknown or not installed.
    """
    available = available_backends()
    if backend not in ("auto", *_DTYPES, "loop"):
        raise ConfigError(
            f"the backend of grouped_linear is {backend!r}, but must be one of auto, {', '.join(_DTYPES)}, loop."
        )
    if backend not in ("auto", *available):
        raise ConfigError(
            f"the backend of grouped_linear is {backend}, which is not installed here; write one of "
            f"{', '.join(available)}, or auto."
        )
    on_gpu = device.type == "cuda"
    wanted = preference(dtype, _capability(device) if on_gpu else None) if backend == "auto" else (backend,)
    if device.type == "cpu" and dtype.itemsize == 2:
        return "loop"  # it knows what makes such products slow there
    if any(size * dtype.itemsize % _ALIGNMENT_BYTES for size in (size_in, size_out)):
        return "loop"
    for name in wanted:
        if name in available and dtype in _DTYPES.get(name, ()) and (on_gpu or name == "torch"):
            return name
    return "loop"


def preference(dtype: torch.dtype, capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Backends, the best first, on a GPU of this compute capability, or on a CPU (None).

    Torch's kernel for GPUs is for bfloat16 from Hopper (9.0) on; elsewhere it multiplies expert by expert.
    """
    packages = ("transformer_engine", "grouped_gemm")
    if capability is None or (dtype == torch.bfloat16 and capability >= (9, 0)):
        return ("torch", *packages)
    return (*packages, "torch")


@functools.cache
def available_backends() -> tuple[str, ...]:
    """The backends this installation has; looked up once."""
    found = ["torch"] if hasattr(F, "grouped_mm") else []
    found += [name for name in ("transformer_engine", "grouped_gemm") if importlib.util.find_spec(name) is not None]
    return (*found, "loop")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _gates_first(products: Products) -> Products:
    """Products with a weight whose rows are gate 0, up 0, gate 1, up 1, ..., as if all gates came first."""
    return Products(
        forward=lambda x, weight, counts: products.forward(x, gates_then_ups(weight, 1), counts),
        grad_x=lambda grad, weight, counts: products.grad_x(grad, gates_then_ups(weight, 1), counts),
        grad_weight=lambda grad, x, counts: _interleaved(products.grad_weight(grad, x, counts)),
    )


def _interleaved(weight: Tensor) -> Tensor:
    """Undo `gates_then_ups` of [E, out, in] along `out`."""
    return weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class _GroupedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor | None,
        weight: Tensor,
        counts: Tensor,
        before: Callable[[Tensor, Tensor], Tensor] | None,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x, factor, weight, counts)
        ctx.before, ctx.products = before, products
        rows = x if before is None else before(x, factor)  # type: ignore[arg-type]
        return products.forward(rows.contiguous(), weight.contiguous(), counts)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, weight, counts = ctx.saved_tensors
        grad, rows = grad.contiguous(), x
        if ctx.before is not None:
            x, factor = x.detach().requires_grad_(), factor.detach().requires_grad_()
            with torch.enable_grad():
                rows = ctx.before(x, factor)
        grad_x = grad_factor = grad_weight = None
        if ctx.needs_input_grad[2] and computes("weights"):
            grad_weight = ctx.products.grad_weight(grad, rows.detach().contiguous(), counts)
        if (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]) and computes("activations"):
            grad_x = ctx.products.grad_x(grad, weight.contiguous(), counts)
            if ctx.before is not None:
                grad_x, grad_factor = torch.autograd.grad(rows, (x, factor), grad_x)
        return grad_x, grad_factor, grad_weight, None, None, None


def ends_of_groups(counts: Tensor) -> Tensor:
    """Where the rows of each expert end, as torch's kernels want it: [E] int32."""
    return counts.cumsum(0).to(torch.int32)


_torch = Products(
    forward=lambda x, weight, counts: F.grouped_mm(x, weight.transpose(1, 2), offs=ends_of_groups(counts)),
    grad_x=lambda grad, weight, counts: F.grouped_mm(grad, weight, offs=ends_of_groups(counts)),
    grad_weight=lambda grad, x, counts: F.grouped_mm(grad.t(), x, offs=ends_of_groups(counts)),
)


def _loop_over(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows [m, a] times its own matrix of [E, a, b]: [m, b]."""
    output = x.new_empty(x.size(0), matrices.size(2))
    for group, matrix in zip(_groups(x, counts), matrices.unbind(0), strict=True):
        if group.stop == group.start:
            continue
        window = _window(group, x)
        if window.start == group.start:
            # What is written behind the group, the next groups write again.
            torch.mm(x[window], matrix, out=output[window])
        else:
            output[group] = torch.mm(x[window], matrix)[_inside(group, window)]
    return output


def _loop_of_weights(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Each group's grad^T x: [m, out], [m, in] -> [E, out, in]."""
    result = grad.new_zeros(counts.numel(), grad.size(1), x.size(1))
    for group, matrix in zip(_groups(x, counts), result.unbind(0), strict=True):
        window = _window(group, x)
        rows = grad[group]
        if window != group:
            rows = grad.new_zeros(window.stop - window.start, grad.size(1))
            rows[_inside(group, window)] = grad[group]
        torch.mm(rows.t(), x[window], out=matrix)
    return result


def _inside(group: slice, window: slice) -> slice:
    return slice(group.start - window.start, group.stop - window.start)


def _groups(x: Tensor, counts: Tensor) -> list[slice]:
    ends = list(itertools.accumulate(counts.tolist(), initial=0))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _window(group: slice, x: Tensor) -> slice:
    """The rows to multiply for a group: its own, on a CPU in half precision up to an eighth more.

    There torch compiles a kernel for each number of rows it meets, which takes longer than the product. Rounded to
    four binary digits they soon are the same again.
    """
    rows = group.stop - group.start
    if x.device.type != "cpu" or x.element_size() != 2 or rows == 0:
        return group
    step = max(16, 1 << max(rows.bit_length() - 4, 0))
    rounded = -(-rows // step) * step
    if rounded > x.size(0):
        return group
    start = min(group.start, x.size(0) - rounded)
    return slice(start, start + rounded)


_loop = Products(
    forward=lambda x, weight, counts: _loop_over(x, weight.transpose(1, 2), counts),
    grad_x=_loop_over,
    grad_weight=_loop_of_weights,
)


def _gmm(a: Tensor, b: Tensor, counts: Tensor, **transposed: bool) -> Tensor:
    backend = importlib.import_module("grouped_gemm.backend")
    return backend.gmm(a, b, counts.cpu(), **transposed)  # type: ignore[no-any-return]


_grouped_gemm = Products(
    forward=lambda x, weight, counts: _gmm(x, weight, counts, trans_b=True),
    grad_x=_gmm,
    # It may leave the matrix of an expert without rows unwritten.
    grad_weight=lambda grad, x, counts: torch.where(
        (counts > 0)[:, None, None], _gmm(grad, x, counts, trans_a=True), 0.0
    ),
)


def _transformer_engine(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    module = _transformer_engine_module(*weight.shape, weight.dtype)
    weights = {f"weight{expert}": matrix for expert, matrix in enumerate(weight.contiguous().unbind(0))}
    return torch.func.functional_call(module, weights, (x.contiguous(), counts.tolist()))  # type: ignore[no-any-return]


@functools.cache
def _transformer_engine_module(experts: int, size_out: int, size_in: int, dtype: torch.dtype) -> nn.Module:
    """Transformer Engine's layer of these sizes, without weights of its own: each call lends it ours."""
    layer = importlib.import_module("transformer_engine.pytorch").GroupedLinear
    return layer(experts, size_in, size_out, bias=False, params_dtype=dtype, device="meta")  # type: ignore[no-any-return]


@torch.library.custom_op("megatron_lite::grouped_product", mutates_args=())
def _grouped_product(which: str, backend: str, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """One of the products of a backend, which torch.compile takes as it is: it may read the counts on the host."""
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = getattr(_PRODUCTS[backend], which)
    return product(a.contiguous(), b.contiguous(), counts).contiguous()


@_grouped_product.register_fake
def _(which: str, backend: str, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    if which == "grad_weight":
        return a.new_empty(counts.numel(), a.size(1), b.size(1))
    return a.new_empty(a.size(0), b.size(1 if which == "forward" else 2))


def _in_one_piece(backend: str) -> Products:
    return Products(*(functools.partial(_grouped_product, which, backend) for which in Products._fields))


_PRODUCTS = {"torch": _torch, "grouped_gemm": _grouped_gemm, "loop": _loop}
_DTYPES = {
    "torch": (torch.float32, torch.bfloat16, torch.float16),
    "transformer_engine": (torch.float32, torch.bfloat16, torch.float16),
    "grouped_gemm": (torch.bfloat16,),
}
