"""Cross entropy in one process (tests/parallel has the split vocabulary)."""

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel import vocab_parallel_cross_entropy


@pytest.mark.parametrize("vocab_size", [None, 13])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_torch(vocab_size: int | None, smoothing: float) -> None:
    logits = torch.randn(5, 2, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 13, (5, 2))
    target[0, 1] = -100
    real = vocab_size or 16
    spread = smoothing * real / (real - 1)
    expected = F.cross_entropy(
        logits[..., :real].flatten(0, 1), target.flatten(), reduction="none", label_smoothing=spread
    ).view(5, 2)
    loss = vocab_parallel_cross_entropy(logits, target, smoothing, vocab_size=vocab_size)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.square().sum(), logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_smoothing_shares_alpha_among_the_other_ids() -> None:
    logits, target = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 3, 6])
    distribution = torch.full((3, 7), 0.3 / 6, dtype=torch.float64).scatter(1, target[:, None], 0.7)
    expected = -(distribution * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(vocab_parallel_cross_entropy(logits, target, 0.3), expected)


def test_bfloat16_logits_give_a_float32_loss_and_a_bfloat16_gradient() -> None:
    logits = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([1, 2, 3, 4]))
    loss.sum().backward()
    assert (loss.dtype, logits.grad.dtype) == (torch.float32, torch.bfloat16)


def test_gradient_by_finite_differences() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 4])
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, target, 0.1, vocab_size=5), (logits,))


def test_refusals() -> None:
    logits, target = torch.randn(3, 6), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ConfigError, match="too few for a vocabulary of 7"):
        vocab_parallel_cross_entropy(logits, target, vocab_size=7)
    with pytest.raises(ConfigError, match="padded vocabulary is 8"):
        vocab_parallel_cross_entropy(logits, target, padded_vocab_size=8)
    with pytest.raises(ConfigError, match="the target must have the logits' shape"):
        vocab_parallel_cross_entropy(logits, target[:2])
    with pytest.raises(ConfigError, match=r"label_smoothing is 1\.0"):
        vocab_parallel_cross_entropy(logits, target, 1.0)
