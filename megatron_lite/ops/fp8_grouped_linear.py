"""Products of `grouped_linear` in 8-bit floating point (fp8): two of the three, with a scale for each row.

x weight^T and the gradient of x sum over the columns of x, or of the output's gradient, and of a matrix of each expert:
rows [m, c], matrices [E, n, c] -> [m, n]. There is a scale for each of the m rows and one for each of the E n rows of
the matrices, a power of two (rowwise, ops/fp8_linear.py). An expert's row knows nothing of the others, so it is rounded
alike on whatever rank, and beside whatever rows, it is computed.

The gradient of the weight sums over the rows of an expert. Its scales would depend on which of them a rank has, so it
is multiplied in the dtype of the rows.

Gradients are e4m3, as all else: torch's kernel takes nothing else, and a scale for each row leaves little to e5m2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite.ops.fp8_linear import E4M3, MULTIPLE, Quantized, encode_scale, has_fp8_kernels, quantize
from megatron_lite.ops.grouped_linear import Products, ends_of_groups


def has_grouped_fp8_kernels() -> bool:
    """Whether torch has a grouped product in fp8 for this process's GPU: on Hopper (compute capability 9) alone."""
    return has_fp8_kernels() and torch.cuda.get_device_capability()[0] == 9


def quantize_rows(tensor: Tensor, group: ProcessGroup | None) -> Quantized:
    """[..., rows, columns] with a scale for each row, of which the ranks of `group` hold other columns."""
    return quantize(tensor, E4M3, encode_scale(tensor, E4M3, -1, (group,)))


def scaled_grouped_mm(rows: Quantized, matrices: Quantized, counts: Tensor, fast: bool) -> Tensor:
    """[m, c] times the transpose of their expert's [E, n, c]: [m, n] in bfloat16, by torch's kernel.

    c and n must be multiples of 16; an expert may have any number of rows.
    """
    return torch._scaled_grouped_mm(
        rows.data,
        matrices.data.transpose(1, 2),
        rows.encode.reciprocal().squeeze(1),
        matrices.encode.reciprocal().squeeze(2),
        offs=ends_of_groups(counts),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


@dataclass(frozen=True)
class Fp8GroupedLinear:
    """Makes of the products of a backend of `grouped_linear` those in fp8.

    Attributes:
        kernels: multiply in fp8 where that is possible. Else the backend multiplies the same numbers.
        column_group: ranks over which n, the outputs, is split.
        row_group: ranks over which k, the inputs, is split; the caller sums the result.
        quantize_rows: that function, or what a compiler made of it.
    """

    kernels: bool = False
    column_group: ProcessGroup | None = None
    row_group: ProcessGroup | None = None
    quantize_rows: Callable[[Tensor, ProcessGroup | None], Quantized] = quantize_rows

    def __call__(self, products: Products) -> Products:
        """Collectives: in forward and for the gradient of x the amaxes of either operand, where they are split."""

        def forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
            return self._multiply(products, x, weight, counts, self.row_group, fast=True)

        def grad_x(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
            return self._multiply(products, grad, weight.transpose(1, 2), counts, self.column_group, fast=False)

        return products._replace(forward=forward, grad_x=grad_x)

    def _multiply(
        self, products: Products, x: Tensor, weight: Tensor, counts: Tensor, group: ProcessGroup | None, fast: bool
    ) -> Tensor:
        """[m, c] times the transpose of their expert's [E, n, c]: [m, n]. The ranks of `group` hold other columns."""
        # Detached, so that those with and without a gradient are one case to the compiler.
        rows, matrices = self.quantize_rows(x.detach(), group), self.quantize_rows(weight.detach(), group)
        fits = x.size(0) > 0 and weight.size(1) % MULTIPLE == 0 and weight.size(2) % MULTIPLE == 0
        if self.kernels and fits and x.device.type != "cpu" and x.dtype == torch.bfloat16:
            return scaled_grouped_mm(rows, matrices, counts, fast)
        return products.forward(rows.decoded(x.dtype), matrices.decoded(x.dtype), counts)

    def compiled(self, backend: str = "inductor") -> "Fp8GroupedLinear":
        """The same, with one kernel of each amax and each cast, for any number of rows."""
        return replace(self, quantize_rows=torch.compile(quantize_rows, dynamic=True, backend=backend))
