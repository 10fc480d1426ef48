"""Copies of --async-save from a GPU: pinned, complete when training goes on, and in the same memory the next time."""

import pytest
import torch

from megatron_lite.checkpoint import BackgroundSaver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


def test_copies_are_pinned_and_complete() -> None:
    saver = BackgroundSaver()
    state = torch.randn(1 << 22, device="cuda")
    expected = state.cpu()
    copied = saver.copies({"state": state})["state"]
    state.zero_()
    assert copied.is_pinned()
    assert torch.equal(copied, expected)
    again = saver.copies({"state": state})["state"]
    assert again.data_ptr() == copied.data_ptr()
    assert not again.any()
