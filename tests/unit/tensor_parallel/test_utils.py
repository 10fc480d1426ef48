"""Splitting sizes and tensors."""

import pytest
import torch

from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel import VocabUtility, broadcast_data, divide, split_tensor_along_last_dim


def test_divide() -> None:
    assert divide(12, 4) == 3
    with pytest.raises(ConfigError, match="13 is not divisible by 4; the nearest multiples are 12 and 16"):
        divide(13, 4)


def test_split_along_the_last_dim() -> None:
    x = torch.arange(12).view(2, 6)
    views = split_tensor_along_last_dim(x, 3)
    assert [view.tolist() for view in views] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert not views[0].is_contiguous()
    assert split_tensor_along_last_dim(x, 3, contiguous_split_chunks=True)[0].is_contiguous()


def test_vocabulary_ranges() -> None:
    assert VocabUtility.vocab_range_from_global_vocab_size(24, 1, 4) == (6, 12)
    assert VocabUtility.vocab_range_from_per_partition_vocab_size(6, 3, 4) == (18, 24)
    with pytest.raises(ConfigError, match="rank is 4"):
        VocabUtility.vocab_range_from_per_partition_vocab_size(6, 4, 4)


def test_broadcast_without_a_group_returns_the_batch() -> None:
    batch = {"tokens": torch.arange(4), "unused": torch.arange(2)}
    assert broadcast_data(["tokens"], batch, torch.int64).keys() == {"tokens"}
    with pytest.raises(ConfigError, match=r"tokens is torch\.int64"):
        broadcast_data(["tokens"], batch, torch.int32)
