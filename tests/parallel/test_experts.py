"""Experts at every layout: gradients, norm, initial weights and training equal those of one process, in float64.

Every check is also run on code broken in a known way (BROKEN, at the end), and must then fail.
"""

import math
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule

from megatron_lite import parallel_state
from megatron_lite.checkpoint import CheckpointError, verify_replicas
from megatron_lite.distributed import data_parallel, finalize_model_grads
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import OptimizerConfig
from megatron_lite.optimizer import optimizer as optimizer_module
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel import local, parameters
from megatron_lite.transformer.moe import experts as experts_module
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.parallel import toy_experts
from tests.parallel.pool import WorkerError
from tests.parallel.toy_experts import EXPERTS, HIDDEN, LAYERS, TOKENS, TOPK, WIDTH, backward, build, train
from tests.parallel.toy_model import whole, whole_gradients, whole_weights

# Names of layouts: world size, and what `build` is told. dp is the dense data parallel size, edp that of the experts.
LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),  # dp 2, edp 1
    "etp2": (2, {"etp": 2, "strategy": "optim_grads_params"}),  # dp 2, edp 1
    "dp2": (2, {}),  # dp 2, edp 2
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),  # dp 1, edp 1
    "tp2-etp2": (2, {"tp": 2, "etp": 2}),  # dp 1, edp 1
    "tp2-edp2": (2, {"tp": 2, "strategy": "optim"}),  # dp 1, edp 2
    "tp4-ep2": (4, {"tp": 4, "ep": 2}),  # dp 1, edp 2
    "tp4-ep2-params": (4, {"tp": 4, "ep": 2, "strategy": "optim_grads_params"}),  # dp 1, edp 2
    "ep2-optim": (4, {"ep": 2, "strategy": "optim"}),  # dp 4, edp 2
    "ep2-grads": (4, {"ep": 2, "strategy": "optim_grads"}),  # dp 4, edp 2
    "ep2-params": (4, {"ep": 2, "strategy": "optim_grads_params"}),  # dp 4, edp 2
    "ep4": (4, {"ep": 4}),  # dp 4, edp 1
    "cp2-ep2-etp2-none": (8, {"cp": 2, "ep": 2, "etp": 2}),  # dp 4, edp 2
    "tp2-cp2-ep4": (8, {"tp": 2, "cp": 2, "ep": 4, "strategy": "optim_grads_params"}),  # dp 2, edp 2, one expert each
    "tp2-ep2-dp3": (6, {"tp": 2, "ep": 2, "strategy": "optim_grads"}),  # dp 3, edp 3: two experts over three ranks
    "ep2-etp2": (8, {"ep": 2, "etp": 2, "strategy": "optim"}),  # dp 8, edp 2
    "tp2-ep2-etp2": (8, {"tp": 2, "ep": 2, "etp": 2, "strategy": "optim_grads_params"}),  # dp 4, edp 2
    "ep2-x2": (8, {"ep": 2, "strategy": "optim_grads", "replicas": 2}),  # dp 8, edp 4 = 2 replicas of 2 shards
    "ep2-etp2-x2": (8, {"ep": 2, "etp": 2, "strategy": "optim", "replicas": 2}),  # edp 2 = 2 replicas of 1 shard
}
# What tests/parallel/test_layout_matrix.py does not have: replicas, shards that do not divide, one expert on a rank.
# Layouts that are in no row of the layout matrix; the others run with --full-matrix.
BY_DEFAULT = ("tp4-ep2-params", "tp2-cp2-ep4")
OTHERS = ("ep2-etp2-x2", "cp2-ep2-etp2-none", "tp2-ep2-dp3", "tp2-ep2-etp2", "ep2-x2", "ep2-params", "tp4-ep2")
SGD = {"optimizer": "sgd", "lr": 0.1, "sgd_momentum": 0.9, "weight_decay": 0.1, "clip_grad": 0.5}


def run(pool, layout: str, function, *arguments, broken: str | None = None, **limits):
    """`function(options, *arguments)` on the ranks of a layout, with the code broken as named; results by rank."""
    world_size, options = LAYOUTS[layout]
    return pool.run(_in_layout, options, function, arguments, broken, world_size=world_size, **limits)


def _in_layout(rank, world_size, options, function, arguments, broken):
    with nullcontext() if broken is None else BROKEN[broken]():
        return function(options, *arguments)


def assert_close(found: dict, expected: dict, bound: float) -> None:
    """Each tensor within `bound` of the largest expected element; 0 asks for equal bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item() / max(value.abs().max().item(), 1e-300)
        assert error <= bound, f"{name} is off by {error:.1e}"


# T11, T26


def as_built(options):
    """(whole initial weights, norm of gradients whose elements are all one)."""
    _, optimizer = build(OptimizerConfig(lr=0.1), **options)
    weights = whole_weights(optimizer)
    for parameter in optimizer.named_parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return weights, optimizer.step().grad_norm.item()


def check_as_built(pool, layout, broken=None):
    expected = run(pool, "one", as_built)[0][0]
    first = expected["layers.0.experts.weight1"]
    assert first.shape == (EXPERTS, 2 * WIDTH, HIDDEN)
    assert len(first.unique()) == first.numel(), "experts start out different"
    expert = 3 * WIDTH * HIDDEN + 2 * WIDTH + HIDDEN
    elements = LAYERS * (HIDDEN * HIDDEN + TOPK * HIDDEN + EXPERTS * expert)
    for weights, norm in run(pool, layout, as_built, broken=broken):
        assert_close(weights, expected, 0.0)
        assert norm == pytest.approx(math.sqrt(elements), rel=1e-14)


@pytest.mark.parametrize("layout", ["one", *BY_DEFAULT, *(pytest.param(one, marks=pytest.mark.full) for one in OTHERS)])
def test_initial_weights_and_norm_of_ones(pool, layout):
    """T11, to the bit, and T26: each element of each expert is counted once.

    Fails if experts are seeded by their local index (`seeded_by_local_index`), if FSDP's chunk is taken before the
    expert parallel one (`chunked_before_experts`), if every copy counts in the norm (`copies_counted`), or if experts
    are counted on the dense mesh (`experts_counted_as_dense`).
    """
    check_as_built(pool, layout)


# T39


def gradients_and_weights(options, micro_batches, config):
    """Whole gradients of the first step, the norms, and whole weights after four steps of clipped SGD."""
    model, optimizer = build(OptimizerConfig(**SGD), **options, **config)
    backward(model, optimizer, 0, micro_batches)
    gradients = whole_gradients(optimizer)
    norms = [result.grad_norm.item() for result in train(model, optimizer, range(4), micro_batches)]
    return gradients, norms, whole_weights(optimizer)


def check_equals_one_process(pool, layout, micro_batches=1, broken=None, **config):
    gradients, norms, weights = run(pool, "one", gradients_and_weights, 1, config)[0]
    assert min(norms) > SGD["clip_grad"], "every step is clipped, so that the norm matters"
    for found in run(pool, layout, gradients_and_weights, micro_batches, config, broken=broken):
        assert_close(found[0], gradients, 1e-12)
        assert found[1] == pytest.approx(norms, rel=1e-12)
        assert_close(found[2], weights, 1e-11)


@pytest.mark.parametrize(
    ("layout", "micro_batches"),
    [*((layout, 2) for layout in BY_DEFAULT), *(pytest.param(one, 2, marks=pytest.mark.full) for one in OTHERS)],
)
def test_layout_equals_one_process(pool, layout, micro_batches):
    """T39: scale and group of every expert gradient, and the norm that clips.

    Fails with FSDP's mean (`gradients_averaged`), if copies of experts are not summed (`experts_not_reduced`), if
    experts are summed as dense parameters (`experts_reduced_as_dense`), if every rank of an expert adds its bias
    (`bias_added_by_all`), if that bias's gradient is not summed (`bias_not_summed`), and with `copies_counted`.
    """
    check_equals_one_process(pool, layout, micro_batches)


@pytest.mark.parametrize("config", [{"swiglu": False}, {"add_bias_linear": False}])
@pytest.mark.parametrize("layout", ["tp2-etp2", "ep2-params"])
def test_other_activations_equal_one_process(pool, layout, config):
    check_equals_one_process(pool, layout, **config)


# T40


def one_expert_only(options, only):
    """Whole gradients when all tokens go to two experts, and whether any local gradient is missing."""
    model, optimizer = build(OptimizerConfig(**SGD), **options)
    backward(model, optimizer, 0, 2, only)
    missing = [name for name, parameter in optimizer.named_parameters.items() if parameter.grad is None]
    if any(everywhere(missing)):
        return {}, missing, 0.0
    return whole_gradients(optimizer), missing, optimizer.step().grad_norm.item()


def everywhere(value) -> list:
    """The value of each rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@pytest.mark.parametrize("layout", ["ep4", "tp2-ep2", "ep2-etp2", "ep2-grads"])
@pytest.mark.parametrize("only", [0, pytest.param(2, marks=pytest.mark.full)])
def test_experts_and_ranks_without_tokens(pool, layout, only):
    """T40: no hang, gradients zero and not None. Fails if a rank without rows leaves its weights out
    (`empty_experts_skipped`)."""
    check_without_tokens(pool, layout, only)


def check_without_tokens(pool, layout, only, broken=None):
    expected, _, norm = run(pool, "one", one_expert_only, only)[0]
    idle = [expert for expert in range(EXPERTS) if expert not in (only, only + 1)]
    assert not expected["layers.1.experts.weight1"][idle].any()
    for gradients, missing, found_norm in run(pool, layout, one_expert_only, only, broken=broken, timeout_s=30.0):
        assert not missing
        assert_close(gradients, expected, 1e-12)
        assert found_norm == pytest.approx(norm, rel=1e-12)


# Process groups of the user's own

NEIGHBOURS, STRIDED = [[0, 1], [2, 3]], [[0, 2], [1, 3]]


def own_groups(ep_ranks, etp_ranks) -> ProcessGroupCollection:
    ep, expt_tp = (torch.distributed.new_subgroups_by_enumeration(ranks)[0] for ranks in (ep_ranks, etp_ranks))
    return ProcessGroupCollection(ep=ep, expt_tp=expt_tp, tp_ep=torch.distributed.new_group())


def with_own_groups(rank, world_size, ep_ranks, etp_ranks) -> dict[str, float]:
    """By how much output, weights and gradients differ from those of one process."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        fp64=True,
        init_method_std=0.5,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        moe_token_dispatcher_type="alltoall",
        swiglu=True,
        add_bias_linear=False,
    )
    tokens = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    scores, indices = torch.rand(TOKENS, TOPK, dtype=torch.float64), toy_experts.choices(torch.arange(TOKENS))
    groups = own_groups(ep_ranks, etp_ranks)
    mine = [tensor.chunk(world_size)[rank] for tensor in (tokens, scores, indices)]
    torch.manual_seed(1)
    alone = experts_module.GroupedMLP(EXPERTS, config, ProcessGroupCollection())
    expected = alone(tokens, scores, indices)
    expected.square().sum().backward()
    torch.manual_seed(1)
    experts = experts_module.GroupedMLP(EXPERTS // groups.ep.size(), config, groups)
    found = experts(*mine)
    found.square().sum().backward()

    def held(whole, dim):
        """What this rank has of it."""
        block = whole.chunk(groups.ep.size())[groups.ep.rank()]
        return block.chunk(groups.expt_tp.size(), dim)[groups.expt_tp.rank()]

    pairs = {"output": (found, expected.chunk(world_size)[rank])}
    for name, dim in (("weight1", 1), ("weight2", 2)):
        ours, theirs = getattr(experts, name), getattr(alone, name)
        pairs[name] = (local(ours), held(theirs, dim))
        pairs[f"gradient of {name}"] = (local(ours.grad), held(theirs.grad, dim))
    return {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}


@pytest.mark.parametrize(("ep_ranks", "etp_ranks"), [(STRIDED, NEIGHBOURS), (NEIGHBOURS, STRIDED)])
def test_the_order_of_own_process_groups_is_free(pool, ep_ranks, etp_ranks):
    """Mutation: the expert tensor parallel ranks, or the expert parallel ones, taken for neighbours."""
    for errors in pool.run(with_own_groups, ep_ranks, etp_ranks, world_size=4):
        assert max(errors.values()) < 1e-12, errors


def refuse_groups(rank, world_size) -> str:
    with pytest.raises(ConfigError) as caught:
        experts_module.GroupedMLP(
            EXPERTS // 2,
            TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1),
            own_groups(NEIGHBOURS, [[0, 3], [1, 2]]),
        )
    return str(caught.value)


def test_own_process_groups_that_form_no_grid_are_refused(pool):
    """Mutation: take any order that is not the one for the other."""
    message = pool.run(refuse_groups, world_size=4)[0]
    assert "[0, 1] of ep and [0, 3] of expt_tp are no column and row" in message
    assert "[0, 1, 2, 3] of tp_ep; join in tp_ep" in message


# T28 and resharding


def decay_alone(options):
    _, optimizer = build(OptimizerConfig(lr=0.1, weight_decay=0.5), **options)
    for parameter in optimizer.named_parameters.values():
        local(parameter.detach()).fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name: weight.unique().tolist() for name, weight in whole_weights(optimizer).items()}


@pytest.mark.parametrize("layout", ["one", "tp2-cp2-ep4", "tp2-ep2-dp3"])
def test_biases_of_experts_do_not_decay(pool, layout):
    """T28: by declaration, as [E, n] has two dimensions. Mutation: create them without apply_weight_decay=False."""
    for found in run(pool, layout, decay_alone):
        for name, values in found.items():
            assert values == [1.0 if "bias" in name else 0.95], name


def all_state(optimizer) -> dict:
    return {**optimizer.named_parameters, **optimizer.state_dict()}


def save_state(options, path):
    """Train two steps, save, train one more: (state as saved, weights at the end)."""
    model, optimizer = build(OptimizerConfig(lr=0.05, adam_eps=1e-3), **options)
    train(model, optimizer, range(2))
    state = all_state(optimizer)
    dcp.save(state, checkpoint_id=path)
    saved = {name: whole(value) for name, value in state.items()}
    train(model, optimizer, range(2, 3))
    return saved, whole_weights(optimizer)


def load_state(options, path):
    """Load into a fresh optimizer in place, then train one step: (state as loaded, weights at the end)."""
    model, optimizer = build(OptimizerConfig(lr=0.05, adam_eps=1e-3), **options)
    dcp.load(all_state(optimizer), checkpoint_id=path)
    loaded = {name: whole(value) for name, value in all_state(optimizer).items()}
    train(model, optimizer, range(2, 3))
    return loaded, whole_weights(optimizer)


def check_reshard(pool, path, source, target, broken=None):
    saved, continued = run(pool, source, save_state, str(path), broken=broken)[0]
    for name, value in saved.items():
        if "experts" in name and not name.endswith(".step"):
            assert len(value.unique()) == value.numel(), f"{name} could not tell a permuted tensor"
    for loaded, resumed in run(pool, target, load_state, str(path)):
        assert_close(loaded, saved, 0.0)
        assert_close(resumed, continued, 1e-10)


@pytest.mark.full
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one", "ep2-optim"),
        ("ep2-optim", "ep4"),
        ("ep4", "one"),
        ("one", "etp2"),
        ("etp2", "ep2-etp2"),
        ("tp2-ep2-dp3", "one"),
        ("tp2-ep2-etp2", "tp2-cp2-ep4"),
        ("ep2-etp2-x2", "tp2-ep2-dp3"),
    ],
)
def test_experts_load_at_another_layout(pool, tmp_path, source, target):
    """Bits of weights, moments and counters, then one more step. Fails if experts are stored unsplit over ep
    (`saved_as_local`)."""
    check_reshard(pool, tmp_path, source, target)


# T50


def drifted(options, name, element):
    """What `verify_replicas` says before and after the last rank changes its copy of one parameter or buffer."""
    model, optimizer = build(OptimizerConfig(lr=0.1), **options)
    model.register_buffer("expert_bias", torch.zeros(EXPERTS))
    tensors = {**optimizer.named_parameters, **dict(model.named_buffers())}
    dense, expert = parallel_state.get_dense_mesh(), parallel_state.get_expert_mesh()
    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        dense["dp_replicate"].get_group(),
        parallel_state.get_expert_tensor_parallel_group(),
        expert["edp_replicate"].get_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    verify_replicas(model, *groups)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        local(tensors[name].detach()).view(-1)[element] += 1.0
    try:
        verify_replicas(model, *groups)
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("layout", "name", "says"),
    [
        ("tp2-etp2", "layers.0.experts.bias2", "expert tensor parallel ranks"),
        ("ep2-etp2-x2", "layers.1.experts.weight1", "replicas of the experts"),
        ("dp2", "layers.1.experts.bias1", "replicas of the experts"),
        ("tp2-ep2", "layers.1.router", "tensor parallel ranks"),
        ("tp2-edp2", "expert_bias", "the tensor parallel ranks"),
        ("ep2-optim", "expert_bias", "data parallel ranks"),
        ("ep2-x2", "expert_bias", "data parallel ranks"),
        ("cp2-ep2-etp2-none", "expert_bias", "data parallel ranks"),
        # Shards, not copies: nobody else has them.
        ("tp2-etp2", "layers.0.experts.weight1", "nothing"),
        ("tp2-ep2", "layers.0.experts.bias2", "nothing"),
    ],
)
def test_copies_of_experts_are_compared_where_there_are_copies(pool, layout, name, says):
    """T50. Fails, as the first comparison already complains, if experts are compared over tp (`compared_as_dense`), and
    if buffers, which FSDP does not split, are compared where whole models are alone."""
    for said in run(pool, layout, drifted, name, 0):
        assert says in said
        assert name in said or says == "nothing"


# Mutations


def gradients_averaged():
    return mock.patch.object(FSDPModule, "set_gradient_divide_factor", return_value=None)


def experts_not_reduced():
    original = data_parallel._data_parallel_mesh
    return mock.patch.object(
        data_parallel, "_data_parallel_mesh", lambda mesh, kind: None if kind == "edp" else original(mesh, kind)
    )


def experts_reduced_as_dense():
    """Expert gradients summed over all ranks that the dense ones are summed over."""
    original = toy_experts.finalize_model_grads

    def broken(model, tp_group):
        original(model, tp_group)
        for name, parameter in model.named_parameters():
            if "experts" in name:
                torch.distributed.all_reduce(
                    local(parameter.grad), group=parallel_state.get_data_parallel_group(with_context_parallel=True)
                )

    return mock.patch.object(toy_experts, "finalize_model_grads", broken)


def bias_added_by_all():
    return mock.patch.object(experts_module, "group_rank", return_value=0)


def bias_not_summed():
    module = sys.modules[finalize_model_grads.__module__]
    original = module._sum_partial_gradients
    return mock.patch.object(
        module, "_sum_partial_gradients", lambda chunks, group, experts: experts or original(chunks, group, experts)
    )


def copies_counted():
    return mock.patch.object(optimizer_module, "counts_here", return_value=True)


def experts_counted_as_dense():
    original = optimizer_module.counts_here
    return mock.patch.object(
        optimizer_module, "counts_here", lambda parameter, mesh: original(parameter, parallel_state.get_dense_mesh())
    )


def seeded_by_local_index():
    original = parameters._stored_experts
    return mock.patch.object(parameters, "_stored_experts", lambda parameter: range(len(original(parameter))))


def chunked_before_experts():
    """Mesh dimensions from the first to the last: data parallelism before expert parallelism."""
    return mock.patch.object(parameters, "reversed", iter, create=True)


def compared_as_dense():
    module = sys.modules[verify_replicas.__module__]
    return mock.patch.object(module, "_expert_names", return_value=set())


def empty_experts_skipped():
    original = experts_module.grouped_linear

    def broken(x, weight, tokens_per_expert, backend, **options):
        if len(x):
            return original(x, weight, tokens_per_expert, backend, **options)
        return torch.nn.functional.linear(x, weight[0].detach())

    return mock.patch.object(experts_module, "grouped_linear", broken)


def saved_as_local():
    return mock.patch.object(
        optimizer_module,
        "zeros_like_parameter",
        lambda parameter, dtype: torch.zeros_like(local(parameter.detach()), dtype=dtype),
    )


BROKEN = {
    function.__name__: function
    for function in (
        gradients_averaged,
        experts_not_reduced,
        experts_reduced_as_dense,
        bias_added_by_all,
        bias_not_summed,
        copies_counted,
        experts_counted_as_dense,
        seeded_by_local_index,
        chunked_before_experts,
        compared_as_dense,
        empty_experts_skipped,
        saved_as_local,
    )
}


CASES = [
    ("seeded_by_local_index", check_as_built, ("ep2",), "T11"),
    ("chunked_before_experts", check_as_built, ("ep2-optim",), "T11"),
    ("copies_counted", check_as_built, ("tp2-etp2",), "T26"),
    ("copies_counted", check_as_built, ("dp2",), "T26"),
    ("experts_counted_as_dense", check_as_built, ("tp2-ep2",), "T26"),
    ("experts_counted_as_dense", check_as_built, ("ep2",), "T26"),
    ("gradients_averaged", check_equals_one_process, ("tp2-edp2",), "T39"),
    ("gradients_averaged", check_equals_one_process, ("ep2-params",), "T39"),
    ("experts_not_reduced", check_equals_one_process, ("tp2-edp2",), "T39"),
    ("experts_not_reduced", check_equals_one_process, ("ep2-optim",), "T39"),
    ("experts_reduced_as_dense", check_equals_one_process, ("ep2",), "T39"),
    ("experts_reduced_as_dense", check_equals_one_process, ("etp2",), "T39"),
    ("bias_added_by_all", check_equals_one_process, ("tp2-etp2",), "T5"),
    ("bias_not_summed", check_equals_one_process, ("tp2-etp2",), "T39"),
    ("bias_not_summed", check_equals_one_process, ("ep2-etp2",), "T39"),
    ("copies_counted", check_equals_one_process, ("etp2",), "T26"),
    ("empty_experts_skipped", check_without_tokens, ("tp2-ep2", 0), "T40"),
]
"""Mutation, the check that fails with it and its arguments, and the traps it stands for."""


@pytest.mark.parametrize(("broken", "check", "arguments"), [row[:3] for row in CASES])
def test_broken_code_is_caught(pool, broken, check, arguments):
    with pytest.raises(AssertionError) as caught:
        check(pool, *arguments, broken=broken)
    assert not isinstance(caught.value, WorkerError), "the mutation itself crashed"


def test_broken_checkpoint_is_caught(pool, tmp_path):
    with pytest.raises(WorkerError, match="Size mismatch"):
        check_reshard(pool, tmp_path, "ep2", "one", broken="saved_as_local")


def test_broken_comparison_is_caught(pool):
    with pytest.raises(WorkerError, match=r"(?s)experts.weight1.*should|should.*experts.weight1"):
        run(pool, "tp2-etp2", drifted, "layers.0.router", 0, broken="compared_as_dense")
