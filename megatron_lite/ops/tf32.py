"""Products of float32 tensors in TF32, whose operands keep 10 bits behind the first."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32() -> Iterator[None]:
    """Within, devices that have TF32 multiply float32 tensors in it; the setting is one of the process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
