"""Padding of the vocabulary to a size that every tensor parallel rank can hold an equal part of."""

import math


def padded_vocab_size(
    vocab_size: int, make_vocab_size_divisible_by: int = 128, tensor_model_parallel_size: int = 1
) -> int:
    """The smallest multiple of both divisor and tensor parallel size that holds `vocab_size` tokens.

    With the usual divisor of 128 it is the same for every tensor parallel size up to 128 that is a power of two, so
    a checkpoint does not depend on it. (Megatron-LM pads to a multiple of divisor times TP.)
    """
    multiple = math.lcm(make_vocab_size_divisible_by, tensor_model_parallel_size)
    return math.ceil(vocab_size / multiple) * multiple
