"""Linear layers of several experts as one grouped product: each group of rows meets the weight of its own expert.

| backend      | needs                                                              | reads the counts on the host |
|--------------|--------------------------------------------------------------------|------------------------------|
| torch        | F.grouped_mm; sizes that are multiples of 16 bytes; not float64    | no                           |
| grouped_gemm | the package of that name, a GPU, bfloat16                          | yes                          |
| loop         | nothing: the reference, in any dtype                               | yes                          |
"""

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron_lite.errors import ConfigError

BACKENDS = ("auto", "torch", "grouped_gemm", "loop")

# The grouped kernels want every row of a matrix to begin at a multiple of this.
_ALIGNMENT_BYTES = 16


@functools.cache
def available_backends() -> tuple[str, ...]:
    """The backends this installation has, the preferred one first; looked up once."""
    found = ["torch"] if hasattr(F, "grouped_mm") else []
    if importlib.util.find_spec("grouped_gemm") is not None:
        found.append("grouped_gemm")
    return (*found, "loop")


def grouped_linear(x: Tensor, weight: Tensor, tokens_per_expert: Tensor, backend: str = "auto") -> Tensor:
    """Rows times the transposed weight of their expert: [m, in] x [E, out, in] -> [m, out].

    The gradient of the weight of an expert without rows is zero, not None, also if there are no rows at all.

    Args:
        x: [m, in], the rows of expert 0 first, then those of expert 1, ...; every row belongs to an expert.
        weight: [E, out, in] in the dtype of x.
        tokens_per_expert: [E] int64 numbers of rows, on the device of x; they sum to m.
        backend: one of BACKENDS. One that is there but cannot take these sizes or this dtype gives way to the loop.

    Raises:
        ConfigError: a backend that is unknown or not installed.
    """
    wanted = _chosen(backend)
    if x.size(0) == 0:
        return _loop(x, weight, tokens_per_expert)
    if wanted == "torch" and _suits_grouped_mm(x, weight):
        return _torch(x, weight, tokens_per_expert)
    if wanted == "grouped_gemm" and x.is_cuda and x.dtype == torch.bfloat16:
        return _grouped_gemm(x, weight, tokens_per_expert)
    return _loop(x, weight, tokens_per_expert)


def _chosen(backend: str) -> str:
    available = available_backends()
    if backend == "auto":
        return available[0]
    if backend not in BACKENDS:
        raise ConfigError(f"the backend of grouped_linear is {backend!r}, but must be one of {', '.join(BACKENDS)}.")
    if backend not in available:
        raise ConfigError(
            f"the backend of grouped_linear is {backend}, which is not installed here; write one of "
            f"{', '.join(available)}, or auto."
        )
    return backend


def _suits_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm and its backward take this dtype and keep the rows of x, weight and output aligned."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * x.element_size() % _ALIGNMENT_BYTES == 0 for size in weight.shape[1:])


def _loop(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    groups = x.split(tokens_per_expert.tolist())
    return torch.cat([F.linear(group, matrix) for group, matrix in zip(groups, weight.unbind(0), strict=True)])


def _torch(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    output = F.grouped_mm(x.contiguous(), weight.contiguous().transpose(-2, -1), offs=ends)
    return _WithContiguousGradient.apply(output)  # type: ignore[no-any-return]


def _grouped_gemm(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    from grouped_gemm import ops

    output: Tensor = ops.gmm(x.contiguous(), weight.contiguous(), tokens_per_expert.cpu(), trans_b=True)
    return _WithContiguousGradient.apply(output)  # type: ignore[no-any-return]


class _WithContiguousGradient(Function):
    """Forward: nothing. Backward: a gradient in rows, as the kernels need it (that of a bare sum is expanded)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
