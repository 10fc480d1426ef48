"""Orthogonalization: a matrix keeps its singular vectors, and its singular values are brought near one.

Of Muon, by Jordan et al., 2024, kellerjordan.github.io/posts/muon; the sets of polynomials are those of Megatron-LM.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, cycle, islice, repeat

import torch
from torch import Tensor

from megatron_lite.ops.tf32 import tf32
from megatron_lite.optimizer.config import OptimizerConfig

COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Jordan's post: steepest at zero, at the price of singular values anywhere in 0.7 to 1.2.
    "simple": ((3.4445, -4.7750, 2.0315),),
    # One polynomial for each step, as in the modded-nanogpt speed runs.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al., 2025, arXiv:2505.16932, with the paper's safety factor; the last one is repeated.
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
}
_SMALLEST_NORM = 1e-15


def coefficients_of_steps(coefficient_type: str, steps: int) -> Iterator[tuple[float, float, float]]:
    """(a, b, c) of each step; after its last polynomial an iteration begins again, but polar_express repeats that."""
    known = COEFFICIENTS[coefficient_type]
    endless = chain(known, repeat(known[-1])) if coefficient_type == "polar_express" else cycle(known)
    return islice(endless, steps)


def newton_schulz(matrices: Tensor, steps: int, coefficient_type: str = "quintic", precision: str = "medium") -> Tensor:
    """Matrices [..., m, n] with their singular vectors and singular values near one.

    X is divided by its Frobenius norm, then each step makes of it a X + b (X X^T) X + c (X X^T)^2 X, on the smaller
    side. A matrix of zeros stays one.

    Args:
        matrices: [..., m, n].
        steps: number of steps.
        coefficient_type: key of COEFFICIENTS.
        precision: of the products of a float32 matrix: "medium" in bfloat16, "high" in TF32 where the device has it.
            A float64 matrix is computed in float64.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    if x.dtype != torch.float64 and precision == "medium":
        x = x.bfloat16()
    x = x.reshape(-1, *x.shape[-2:])
    with tf32() if precision == "high" else nullcontext():
        for a, b, c in coefficients_of_steps(coefficient_type, steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.to(matrices.dtype).reshape(matrices.shape)


def scale_factor(rows: int, columns: int, mode: str) -> float:
    """The factor s(m, n) on an update whose singular values are one.

    spectral: sqrt(max(m, n)), so that elements have a root mean square of one (arXiv:2502.16982, section 2.2).
    unit_rms_norm: sqrt(m / n), so that a vector of unit root mean square changes by one such
    (Bernstein, 2025, jeremybernste.in/writing/deriving-muon). shape_scaling: sqrt(max(1, m / n)), of Jordan's post.
    """
    if mode == "spectral":
        return max(rows, columns) ** 0.5
    ratio = rows / columns
    return ratio**0.5 if mode == "unit_rms_norm" else max(1.0, ratio) ** 0.5


def orthogonalized(update: Tensor, config: OptimizerConfig, row_blocks: tuple[int, ...] | None = None) -> Tensor:
    """s(m, n) NewtonSchulz(update) of a whole matrix [m, n] or of each one of a stack [..., m, n].

    Args:
        update: the momentum.
        config: scale mode, polynomials, precision.
        row_blocks: see ParameterSpec; with `muon_split_qkv` each kind of block is orthogonalized by itself.
    """
    if row_blocks is not None and config.muon_split_qkv:
        kinds = update.unflatten(-2, (-1, sum(row_blocks))).split(row_blocks, dim=-2)
        done = [orthogonalized(kind.flatten(-3, -2), config).reshape(kind.shape) for kind in kinds]
        return torch.cat(done, dim=-2).reshape(update.shape)
    factor = scale_factor(update.size(-2), update.size(-1), config.muon_scale_mode) * config.muon_extra_scale_factor
    return factor * newton_schulz(
        update, config.muon_num_ns_steps, config.muon_coefficient_type, config.muon_fp32_matmul_prec
    )
