"""The training step: what it computes is checked by the layout matrix, that it never waits in test_host_waits.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite import parallel_state
from megatron_lite.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_lite.training import step
from megatron_lite.training.step import count_tokens, loss_weights, train_step
from tests.parallel.layouts import Layout, build, micro_batches

WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class NoScalarReads(TorchDispatchMode):
    """Fails where a program asks a tensor for a Python number or for a shape that depends on data."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        assert function not in WAITING, f"{function} makes the host wait for the device"
        return function(*arguments, **(kwargs or {}))


@pytest.fixture
def groups():
    """A world of one process."""
    parallel_state.initialize_model_parallel()
    yield parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group(True)
    parallel_state.shutdown()


def test_step_with_sgd_reads_no_scalar(groups):
    """What test_host_waits.py shows of Adam. Mutation: `.item()` on the loss scale raises here."""
    tp_group, dp_cp_group = groups
    model, _ = build(Layout(accumulation=2))
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=0.1, fp16=True), model)
    batches = micro_batches(Layout(accumulation=2), 0, 0)
    train_step(model, optimizer, batches, tp_group=tp_group, dp_cp_group=dp_cp_group)
    with NoScalarReads():
        output = train_step(model, optimizer, batches, tp_group=tp_group, dp_cp_group=dp_cp_group)
    assert output.loss.item() > 0
    with pytest.raises(AssertionError, match="makes the host wait"), NoScalarReads():
        output.loss.item()


def test_loss_weights(groups):
    """Per token: one over all valid tokens. Otherwise: the mean over micro-batches of the mean over their tokens."""
    _, dp_cp_group = groups
    masks = [torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.zeros(2, 2)]
    batches = [{"loss_mask": mask} for mask in masks]
    total = count_tokens(batches, dp_cp_group)
    assert total.item() == 4
    assert [weight.item() for weight in loss_weights(batches, total, 2, per_token=True)] == [0.25, 0.25, 0.25]
    by_means = [weight.item() for weight in loss_weights(batches, total, 2, per_token=False)]
    assert by_means == pytest.approx([1 / 6, 1 / 18, 1 / 6])


def test_loss_weights_count_a_micro_batch_over_its_context_parallel_ranks(groups, monkeypatch):
    """The other rank of two has 3 tokens more of the first micro-batch and none of the second.

    Mutation: without the sum over cp_group the weights are 1 / 4 and 1 / 12; counted over four ranks, halves.
    """

    def two_ranks(tensor, group):
        assert group == "both"
        tensor += torch.tensor([[3.0], [0.0]], dtype=tensor.dtype)

    monkeypatch.setattr(step, "sum_over", two_ranks)
    batches = [{"loss_mask": torch.tensor(mask)} for mask in ([[0.0, 1.0]], [[1.0, 1.0, 1.0]])]
    weights = loss_weights(batches, torch.tensor(7.0), 2, per_token=False, cp_group="both")
    assert [weight.item() for weight in weights] == pytest.approx([1 / (4 * 2 * 2), 1 / (3 * 2 * 2)])


def test_documents_reach_the_model():
    """Mutation: forward_step without packed_seq_params."""
    seen = {}

    def model(*arguments, **named):
        seen.update(named)
        return torch.zeros(1)

    batch = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), torch.zeros(1, 1))
    step.forward_step(model, batch)
    assert seen["packed_seq_params"] is None
    step.forward_step(model, batch | {"packed_seq_params": "documents"})
    assert seen["packed_seq_params"] == "documents"


def test_nothing_valid_is_not_a_division_by_zero(groups):
    """A global batch whose tokens are all masked has loss 0 and leaves no NaN."""
    tp_group, dp_cp_group = groups
    model, optimizer = build(Layout())
    batches = micro_batches(Layout(), 0, 0)
    batches[0]["loss_mask"] = torch.zeros_like(batches[0]["loss_mask"])
    output = train_step(model, optimizer, batches, tp_group=tp_group, dp_cp_group=dp_cp_group)
    assert output.loss.item() == 0
    assert output.grad_norm.item() == 0
    assert output.found_inf.item() == 0
