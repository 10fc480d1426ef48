"""Sharding strategies, gradient accumulation, the global norm, skipping and resharding on several ranks.

Every check is also run on code broken in a known way (BROKEN, at the end), and must then fail.
"""

import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule

from megatron_lite.distributed import reshard_parameters
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.optimizer import OptimizerConfig, clip_grads
from megatron_lite.optimizer import optimizer as optimizer_module
from megatron_lite.tensor_parallel import local
from tests.parallel import toy_model
from tests.parallel.pool import WorkerError
from tests.parallel.toy_model import backward, build, train, whole, whole_gradients, whole_weights

FP64 = ModelParallelConfig(fp64=True)
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
# Names of layouts: (world size, tensor parallel size, strategy, replicas).
LAYOUTS = {
    "one": (1, 1, "no_shard", 1),
    "one-optim": (1, 1, "optim_grads_params", 1),
    "tp2": (2, 2, "no_shard", 1),
    "dp2": (2, 1, "no_shard", 1),
    "dp3": (3, 1, "no_shard", 1),
    "dp3-optim": (3, 1, "optim", 1),
    "dp3-grads": (3, 1, "optim_grads", 1),
    "dp3-params": (3, 1, "optim_grads_params", 1),
    "dp4-params": (4, 1, "optim_grads_params", 1),
    "dp4-x2": (4, 1, "optim_grads", 2),
    "tp2-dp2": (4, 2, "no_shard", 1),
    "tp2-dp2-optim": (4, 2, "optim", 1),
    "tp2-dp3-params": (6, 2, "optim_grads_params", 1),
    "tp2-dp4-x2": (8, 2, "optim_grads_params", 2),
    "tp4-dp2-optim": (8, 4, "optim", 1),
}


def adam(**changes) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 0.05, "weight_decay": 0.1, "clip_grad": 0.3, "adam_eps": 1e-3, **changes})


def run(pool, layout: str, function, *arguments, broken: str | None = None):
    """`function(layout, *arguments)` on the ranks of a layout, with the code broken as named; results by rank."""
    return pool.run(_in_layout, layout, function, arguments, broken, world_size=LAYOUTS[layout][0])


def _in_layout(rank, world_size, layout, function, arguments, broken):
    with nullcontext() if broken is None else BROKEN[broken]():
        return function(LAYOUTS[layout], *arguments)


def build_in(layout, config=FP64, optimizer_config=None, **options):
    _, tp, strategy, replicas = layout
    return build(config, optimizer_config or adam(), tp=tp, strategy=strategy, replicas=replicas, **options)


def all_state(optimizer) -> dict:
    """Weights, moments, counters and loss scale by name."""
    return {**optimizer.named_parameters, **optimizer.state_dict()}


def assert_close(found: dict, expected: dict, bound: float) -> None:
    """Each tensor within `bound` of the largest expected element; 0 asks for equal bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item() / max(value.abs().max().item(), 1e-300)
        assert error <= bound, f"{name} is off by {error:.1e}"


# T26


def norm_of_ones(layout, tied):
    """(norm, zeros, logical number of elements) with every gradient element one, the first row of each zero."""
    _, optimizer = build_in(layout, optimizer_config=adam(log_num_zeros_in_grad=True), tied=tied)
    for parameter in optimizer.named_parameters.values():
        parameter.grad = torch.ones_like(parameter)
    result = optimizer.step()
    count = sum(parameter.numel() for parameter in optimizer.named_parameters.values())
    return result.grad_norm.item(), result.num_zeros.item(), count


def check_norm_of_ones(pool, layout, tied, broken=None):
    embedding = toy_model.VOCABULARY * toy_model.HIDDEN
    layer = 2 * toy_model.INNER * toy_model.HIDDEN + toy_model.INNER + toy_model.HEAD + 2 * toy_model.HIDDEN
    expected = 2 * layer + embedding * (1 if tied else 2)
    for norm, zeros, _ in run(pool, layout, norm_of_ones, tied, broken=broken):
        assert norm == pytest.approx(math.sqrt(expected), rel=1e-14)
        assert zeros == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.full)])
def test_norm_counts_each_logical_element_once(pool, layout, tied):
    """T26: all gradients one give the root of the number of logical parameters, on every rank.

    Fails if every replica counts (`replicas_counted`) or if the sum is not reduced (`norm_not_reduced`).
    """
    check_norm_of_ones(pool, layout, tied)


# T22, T23, T24, T1


def gradients_and_weights(layout, micro_batches, steps=3):
    """Whole gradients of the first step, the norms, and whole weights after `steps` steps of clipped Adam."""
    model, optimizer = build_in(layout)
    backward(model, optimizer, 0, micro_batches)
    gradients = whole_gradients(optimizer)
    norms = [result.grad_norm.item() for result in train(model, optimizer, range(steps), micro_batches)]
    return gradients, norms, whole_weights(optimizer)


def check_equals_one_process(pool, layout, micro_batches, broken=None):
    gradients, norms, weights = run(pool, "one", gradients_and_weights, 1)[0]
    for found in run(pool, layout, gradients_and_weights, micro_batches, broken=broken):
        assert_close(found[0], gradients, 1e-12)
        assert found[1] == pytest.approx(norms, rel=1e-12)
        assert_close(found[2], weights, 1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.full), 2])
def test_layout_equals_one_process(pool, layout, micro_batches):
    """T1, T22, T23, T24: gradients, norm, and weights after three clipped steps; uneven and empty shards included.

    Fails with FSDP's mean instead of a sum (`gradients_averaged`), without the reduction that the last micro-batch
    starts (`never_reduced`), if only the last micro-batch counts (`accumulation_forgotten`), and without the sum over
    tensor parallel ranks (`gate_not_summed`).
    """
    check_equals_one_process(pool, layout, micro_batches)


def bits_of(layout, strategy, micro_batches):
    """Gradients and weights in float32 with clipping off: at two ranks every sum has one order."""
    world, tp, _, replicas = layout
    model, optimizer = build_in((world, tp, strategy, replicas), ModelParallelConfig(), adam(clip_grad=0.0))
    backward(model, optimizer, 0, micro_batches)
    gradients = whole_gradients(optimizer)
    train(model, optimizer, range(3), micro_batches)
    return gradients, whole_weights(optimizer)


@pytest.mark.parametrize(
    ("strategies", "micro_batches"),
    [(STRATEGIES, 1), (("no_shard", "optim"), 3), (("optim_grads", "optim_grads_params"), 3)],
)
def test_strategies_agree_bit_for_bit_at_two_ranks(pool, strategies, micro_batches):
    """T24, in float32. With accumulation those that reduce once, and those that reduce each micro-batch, agree.

    The two kinds add the same numbers in another order. Gradients are equal to the bit; weights to one rounding of the
    largest, as torch's fused update rounds the last elements of a shard, for which its vectors are too long, in another
    way than the rest (seen with AVX2). Fails if one of them rounds gradients to bfloat16.
    """
    results = [run(pool, "dp2", bits_of, strategy, micro_batches)[0] for strategy in strategies]
    for gradients, weights in results[1:]:
        assert_close(gradients, results[0][0], 0.0)
        assert_close(weights, results[0][1], 2.0**-23)


# T25


def accumulated(layout, grad_reduce_in_bf16=False):
    """Gradient of a bias whose micro-batches contribute 256 once and 1 eight times, in bfloat16."""
    model, optimizer = build_in(layout, ModelParallelConfig(bf16=True), grad_reduce_in_bf16=grad_reduce_in_bf16)
    ones = torch.ones(1, 1, toy_model.HIDDEN, dtype=torch.bfloat16)
    tokens = toy_model.global_batch(0)[:1]
    for number in range(9):
        toy_model.set_is_last_microbatch(model, number == 8)
        factor = 256.0 if number == 0 else 1.0
        _loss_of_last_layer(model, tokens, ones * factor).backward()
    return whole(optimizer.named_parameters["layers.1.bias"].grad)


def _loss_of_last_layer(model, tokens, factor):
    """Run the whole model, so that FSDP's hooks run, but weigh only the output of the last layer."""
    kept = []
    handle = model.layers["1"].register_forward_hook(lambda module, inputs, output: kept.append(output))
    loss = model(tokens)
    handle.remove()
    return loss * 0.0 + (kept[0][:1, :1] * factor).sum()


def check_accumulation(pool, layout, **options):
    ranks = LAYOUTS[layout][0] // LAYOUTS[layout][1]
    for gradient in run(pool, layout, accumulated, *options.values()):
        assert gradient.dtype == torch.float32
        assert gradient.tolist() == [264.0 * ranks] * toy_model.HIDDEN


@pytest.mark.parametrize("layout", ["one", "dp2", "dp3-optim", "dp3-grads", "dp3-params", "dp4-x2"])
def test_bf16_gradients_accumulate_in_float32(pool, layout):
    """T25: 256 + 8 x 1 is 264; in bfloat16 each 1 would be lost. Fails with `grad_reduce_in_bf16`."""
    check_accumulation(pool, layout)


def test_accumulation_in_bf16_is_seen(pool):
    with pytest.raises(AssertionError):
        check_accumulation(pool, "dp3-optim", grad_reduce_in_bf16=True)


def low_precision(layout, dtype):
    """Gradients in float32 of the model computed in another dtype, unscaled, and the norm the optimizer reports."""
    config = ModelParallelConfig(**({dtype: True} if dtype else {}))
    model, optimizer = build_in(layout, config, adam(initial_loss_scale=2.0**10))
    backward(model, optimizer, 0, micro_batches=2)
    scale = optimizer.get_loss_scale().item()
    gradients = {name: gradient / scale for name, gradient in whole_gradients(optimizer).items()}
    return gradients, optimizer.step().grad_norm.item(), scale


@pytest.mark.parametrize("layout", ["one", "dp2", "dp3-params", "tp2-dp2-optim"])
@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 0.02), ("bf16", 0.1)])
def test_low_precision_stays_near_float32(pool, layout, dtype, bound):
    """The loss scale is on for float16 alone and gone from what the optimizer sees."""
    expected, norm, _ = run(pool, "one", low_precision, None)[0]
    gradients, low_norm, scale = run(pool, layout, low_precision, dtype)[0]
    assert scale == (1024.0 if dtype == "fp16" else 1.0)
    assert low_norm == pytest.approx(norm, rel=bound)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert_close(gradients, expected, bound)


# T27


def poisoned(layout, rank, after_reduction):
    """What each rank saw of a step with a NaN on `rank`: skipped, nothing changed, loss scale, next step skipped."""
    config = adam(fp16=True, initial_loss_scale=8.0, hysteresis=1)
    model, optimizer = build_in(layout, FP64, config)
    train(model, optimizer, range(1))
    before = {n: local(v.detach()).clone() for n, v in all_state(optimizer).items()}
    bad = torch.distributed.get_rank() == rank
    backward(model, optimizer, 1, loss_factor=float("nan") if bad and not after_reduction else 1.0)
    if bad and after_reduction:
        local(optimizer.named_parameters["layers.0.fc1"].grad.detach())[0, 0] = float("nan")
    result = optimizer.step()
    after = {n: local(v.detach()) for n, v in all_state(optimizer).items()}
    unchanged = all(torch.equal(after[n], value) for n, value in before.items() if "grad_scaler" not in n)
    scale = optimizer.get_loss_scale().item()
    return result.found_inf.item(), unchanged, scale, train(model, optimizer, range(2, 3))[0].found_inf.item()


def check_skip(pool, layout, after_reduction, broken=None):
    ranks = LAYOUTS[layout][0]
    for rank in (0, ranks - 1):
        assert run(pool, layout, poisoned, rank, after_reduction, broken=broken) == [(1.0, True, 4.0, 0.0)] * ranks


@pytest.mark.parametrize("layout", ["one", "tp2", "dp2", "dp3-grads", "tp2-dp2-optim"])
def test_all_ranks_skip_a_non_finite_loss(pool, layout):
    """T27: a NaN in one rank's loss: nobody changes anything, the scale halves everywhere, the next step is fine.

    Fails if a skipped step updates nevertheless (`found_inf_ignored`).
    """
    check_skip(pool, layout, after_reduction=False)


@pytest.mark.parametrize("layout", ["one", "dp3-params", "tp2", "tp2-dp2-optim"])
def test_all_ranks_skip_a_non_finite_shard(pool, layout):
    """T27: one bad element in the shard of one rank. Fails if the norm is not reduced (`norm_not_reduced`)."""
    check_skip(pool, layout, after_reduction=True)


# T28


def decayed_only(layout):
    """Weights before and after a step with zero gradients: what decays shrinks, the rest stays."""
    _, optimizer = build_in(layout, tied=False)
    before = whole_weights(optimizer)
    for parameter in optimizer.named_parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return before, whole_weights(optimizer)


def check_weight_decay(pool, layout, broken=None):
    for before, after in run(pool, layout, decayed_only, broken=broken):
        for name, value in before.items():
            shrink = 1 - 0.05 * 0.1 if value.dim() == 2 else 1.0
            torch.testing.assert_close(after[name], value * shrink, rtol=1e-14, atol=0)


@pytest.mark.parametrize("layout", ["one", "dp3-params", "dp4-params", "tp2-dp3-params", "tp4-dp2-optim"])
def test_weight_decay_follows_the_logical_shape(pool, layout):
    """T28: also where a rank's shard of a matrix is one row or nothing. Fails with `decay_by_local_shard`."""
    check_weight_decay(pool, layout)


# Evaluation and resharding


def with_evaluation(layout, evaluate):
    model, optimizer = build_in(layout)
    for step in range(3):
        train(model, optimizer, range(step, step + 1), micro_batches=2)
        if evaluate:
            with torch.no_grad():
                model(toy_model.global_batch(99))
            reshard_parameters(model)
            names = {name for name, _ in model.named_parameters()}
            assert names == optimizer.named_parameters.keys()
            assert all(p is optimizer.named_parameters[name] for name, p in model.named_parameters())
    return whole_weights(optimizer)


@pytest.mark.parametrize("layout", ["dp2", "dp3-optim", "dp3-params"])
def test_evaluation_between_steps_changes_nothing(pool, layout):
    """Fails, by the identity of parameters, if `reshard_parameters` does nothing."""
    expected = run(pool, layout, with_evaluation, False)[0]
    assert_close(run(pool, layout, with_evaluation, True)[0], expected, 0.0)


def save_state(layout, path):
    """Train two steps, save, train one more: (state as saved, weights at the end)."""
    model, optimizer = build_in(layout)
    train(model, optimizer, range(2))
    state = all_state(optimizer)
    dcp.save(state, checkpoint_id=path)
    saved = {name: whole(value) for name, value in state.items()}
    train(model, optimizer, range(2, 3))
    return saved, whole_weights(optimizer)


def load_state(layout, path):
    """Load into a fresh optimizer in place, then train one step: (state as loaded, weights at the end)."""
    model, optimizer = build_in(layout)
    state = all_state(optimizer)
    dcp.load(state, checkpoint_id=path)
    optimizer.load_state_dict({name: value for name, value in state.items() if name.startswith("optimizer.")})
    loaded = {name: whole(value) for name, value in all_state(optimizer).items()}
    train(model, optimizer, range(2, 3))
    return loaded, whole_weights(optimizer)


def check_reshard(pool, path, source, target, broken=None):
    saved, continued = run(pool, source, save_state, str(path), broken=broken)[0]
    for loaded, resumed in run(pool, target, load_state, str(path)):
        assert_close(loaded, saved, 0.0)
        assert_close(resumed, continued, 1e-11)


@pytest.mark.full
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tp2-dp2-optim", "one"),
        ("tp2-dp2-optim", "dp4-params"),
        ("tp2-dp2-optim", "tp4-dp2-optim"),
        ("tp2-dp2-optim", "tp2"),
        ("one", "tp2-dp2-optim"),
        ("dp3-params", "tp2-dp2"),
        ("tp2-dp3-params", "dp4-x2"),
        ("tp2-dp4-x2", "dp3-grads"),
    ],
)
def test_optimizer_state_loads_at_another_layout(pool, tmp_path, source, target):
    """Bits of weights, moments and counters, then one more step. Fails if moments are saved as `local_moments`."""
    check_reshard(pool, tmp_path, source, target)


# Mutations


def replicas_counted():
    return mock.patch.object(optimizer_module, "counts_here", return_value=True)


def norm_not_reduced():
    return mock.patch.object(clip_grads, "dist", mock.Mock(is_initialized=lambda: False))


def gradients_averaged():
    return mock.patch.object(FSDPModule, "set_gradient_divide_factor", return_value=None)


def never_reduced():
    original = toy_model.set_is_last_microbatch
    return mock.patch.object(toy_model, "set_is_last_microbatch", lambda model, is_last: original(model, False))


def accumulation_forgotten():
    original = toy_model.set_is_last_microbatch

    def broken(model, is_last):
        for module in model.modules():
            for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else []:
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = parameter.sharded_param.grad = None
                    if hasattr(parameter, "_unsharded_param"):
                        parameter._unsharded_param.grad = None
        original(model, is_last)

    return mock.patch.object(toy_model, "set_is_last_microbatch", broken)


def gate_not_summed():
    return mock.patch.object(toy_model, "finalize_model_grads", return_value=None)


def found_inf_ignored():
    return mock.patch.object(optimizer_module.torch, "isfinite", torch.ones_like)


def decay_by_local_shard():
    return mock.patch(
        "megatron_lite.optimizer.param_groups.has_weight_decay",
        lambda name, parameter, spec, config: local(parameter.detach()).squeeze().ndim > 1,
    )


def local_moments():
    return mock.patch.object(
        optimizer_module,
        "zeros_like_parameter",
        lambda parameter, dtype: torch.zeros_like(local(parameter.detach()), dtype=dtype),
    )


BROKEN = {
    function.__name__: function
    for function in (
        replicas_counted,
        norm_not_reduced,
        gradients_averaged,
        never_reduced,
        accumulation_forgotten,
        gate_not_summed,
        found_inf_ignored,
        decay_by_local_shard,
        local_moments,
    )
}


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        ("replicas_counted", check_norm_of_ones, ("tp2", True)),
        ("replicas_counted", check_norm_of_ones, ("dp2", True)),
        ("replicas_counted", check_norm_of_ones, ("dp4-x2", True)),
        ("norm_not_reduced", check_norm_of_ones, ("dp3-params", True)),
        ("gradients_averaged", check_equals_one_process, ("dp2", 1)),
        ("gradients_averaged", check_equals_one_process, ("dp3-params", 1)),
        ("never_reduced", check_equals_one_process, ("dp3-optim", 2)),
        ("never_reduced", check_equals_one_process, ("dp4-x2", 2)),
        ("accumulation_forgotten", check_equals_one_process, ("dp2", 2)),
        ("accumulation_forgotten", check_equals_one_process, ("dp3-grads", 2)),
        ("gate_not_summed", check_equals_one_process, ("tp2", 1)),
        ("found_inf_ignored", check_skip, ("dp2", False)),
        ("norm_not_reduced", check_skip, ("dp3-params", True)),
        ("norm_not_reduced", check_skip, ("tp2-dp2-optim", True)),
        ("decay_by_local_shard", check_weight_decay, ("dp4-params",)),
    ],
)
def test_broken_code_is_caught(pool, broken, check, arguments):
    with pytest.raises(AssertionError) as caught:
        check(pool, *arguments, broken=broken)
    assert not isinstance(caught.value, WorkerError), "the mutation itself crashed"


def test_broken_checkpoint_is_caught(pool, tmp_path):
    with pytest.raises(WorkerError, match="Size mismatch"):
        check_reshard(pool, tmp_path, "tp2-dp2-optim", "one", broken="local_moments")
