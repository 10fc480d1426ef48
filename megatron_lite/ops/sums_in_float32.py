"""Products of 16-bit matrices whose parts cuBLAS adds up in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Within, cuBLAS may not add up parts of a product in bfloat16 or float16; the setting is one of the process."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before
