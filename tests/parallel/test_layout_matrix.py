"""The layout never changes the mathematics: every row equals plain torch on one process, in float64.

Mutations that make these tests fail are in test_mutations.py, one for each trap.
"""

import functools

import pytest

from tests.parallel.layouts import Layout, Result, deviations, reference, run_layout, train_and_evaluate

STEPS = 20
GRADIENT_BOUND = 1e-9
WEIGHT_BOUND = 1e-8

LAYOUTS = [
    Layout(),
    Layout(accumulation=3, tied=False),
    Layout(tp=2),
    Layout(tp=2, sp=True, normalization="RMSNorm"),
    Layout(tp=2, tied=False, swiglu=True, query_groups=2, positions="rope"),
    Layout(tp=4, accumulation=2),
    Layout(tp=4, sp=True, accumulation=3, tied=False, normalization="RMSNorm", swiglu=True, positions="rope"),
    Layout(dp=2, accumulation=3),
    Layout(dp=2, strategy="optim", accumulation=2, tied=False),
    Layout(dp=3, strategy="optim_grads", accumulation=2),
    Layout(dp=4, strategy="optim_grads_params", accumulation=3, normalization="RMSNorm"),
    Layout(dp=4, strategy="optim_grads", replicas=2, accumulation=3),
    Layout(dp=3, strategy="no_shard", accumulation=4, tied=False),
    Layout(tp=4, query_groups=2, positions="rope"),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads_params", query_groups=1, tied=False),
    Layout(tp=2, dp=2, accumulation=3),
    Layout(tp=2, sp=True, dp=2, strategy="optim", accumulation=2),
    Layout(tp=2, sp=True, dp=3, strategy="optim_grads_params", accumulation=2, tied=False, swiglu=True),
    Layout(tp=2, sp=True, dp=4, strategy="optim_grads_params", replicas=2, query_groups=4, positions="rope"),
    Layout(tp=4, sp=True, dp=2, strategy="optim_grads_params", accumulation=3),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads", accumulation=2, recompute="selective"),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads_params", recompute="uniform", swiglu=True),
    Layout(tp=2, dp=2, strategy="optim_grads_params", recompute="block", tied=False),
    Layout(dp=2, strategy="optim_grads", accumulation=3, per_token_loss=False),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads_params", accumulation=2, compiled=True),
]

LAYOUTS += [  # context parallelism
    Layout(cp=2, accumulation=2),
    Layout(cp=4, positions="rope", tied=False, swiglu=True, normalization="RMSNorm"),
    Layout(cp=2, comm="all_gather", query_groups=2, positions="rope", hole=True),
    Layout(cp=4, comm="all_gather", strategy="optim_grads_params", tied=False),
    Layout(cp=2, comm="a2a", query_groups=1, documents=True),
    Layout(cp=4, comm="a2a", query_groups=2, positions="rope", accumulation=3),
    Layout(cp=4, comm="a2a+p2p", hierarchy=(2, 2), query_groups=4, documents=True, positions="rope"),
    Layout(cp=4, comm="a2a+p2p", hierarchy=(2, 2), strategy="optim", hole=True, accumulation=2),
    Layout(documents=True, accumulation=2),
    Layout(cp=2, documents=True, hole=True, positions="rope", accumulation=2),
    Layout(cp=4, documents=True, query_groups=2, tied=False),
    Layout(cp=2, comm="all_gather", documents=True, strategy="optim_grads_params", recompute="selective"),
    Layout(cp=2, comm=("p2p", "a2a"), documents=True, positions="rope"),  # one type for each layer
    Layout(tp=2, cp=2, query_groups=2, positions="rope"),
    Layout(tp=2, sp=True, cp=2, strategy="optim_grads_params", recompute="uniform", normalization="RMSNorm"),
    Layout(tp=2, sp=True, cp=2, comm="a2a", strategy="optim_grads", documents=True, accumulation=2),
    Layout(tp=2, sp=True, cp=2, comm="all_gather", dp=2, strategy="optim_grads_params", replicas=2, hole=True),
    Layout(tp=2, sp=True, cp=2, dp=2, strategy="optim_grads_params", accumulation=3, documents=True, positions="rope"),
    Layout(tp=2, sp=True, cp=4, comm="a2a+p2p", hierarchy=(2, 2), strategy="optim_grads", query_groups=4),
    Layout(cp=2, dp=2, strategy="optim_grads", accumulation=3, recompute="block", tied=False),
    Layout(cp=2, dp=2, accumulation=2, per_token_loss=False),
    Layout(cp=4, per_token_loss=False, hole=True),
    Layout(cp=2, dp=3, comm="a2a", strategy="no_shard", accumulation=2, swiglu=True),
    Layout(tp=2, sp=True, cp=2, strategy="optim_grads", documents=True, compiled=True),
]


LAYOUTS += [  # experts
    Layout(moe="aux", accumulation=3),
    Layout(moe="aux", ep=2, dp=2, accumulation=3, tied=False),
    Layout(moe="aux", ep=2, dp=2, accumulation=3, dispatcher="allgather", strategy="optim_grads_params"),
    Layout(moe="aux", ep=2, dp=4, strategy="optim_grads", accumulation=3),
    Layout(moe="aux", ep=4, dp=4, accumulation=3, strategy="optim"),
    Layout(moe="aux", dp=2, strategy="optim_grads_params", accumulation=2),  # experts whole on each rank
    Layout(moe="gated", tp=2, accumulation=2),  # no sequence parallelism: the layer splits the tokens itself
    Layout(moe="gated", tp=2, sp=True, accumulation=2, swiglu=True, tied=False),
    Layout(moe="gated", tp=2, etp=1, accumulation=2),
    Layout(moe="gated", tp=2, sp=True, etp=1, ep=2, accumulation=2, normalization="RMSNorm"),
    Layout(moe="sequence", tp=2, sp=True, ep=2, etp=1, dp=2, strategy="optim_grads_params", accumulation=3),
    Layout(moe="sequence", tp=2, ep=2, dp=2, accumulation=3, dispatcher="allgather", swiglu=True),
    Layout(moe="bias", tp=2, sp=True, ep=2, dp=2, strategy="optim_grads", accumulation=2, positions="rope"),
    Layout(moe="bias", tp=2, sp=True, etp=1, ep=4, dp=2, strategy="optim_grads_params", swiglu=True),  # tp2, ep4
    Layout(moe="bias", etp=2, ep=2, dp=4, accumulation=3, strategy="optim_grads_params"),  # tp1, etp2, ep2
    Layout(moe="aux", tp=4, etp=1, ep=2, accumulation=2),  # copies of experts where dense parameters have none
    Layout(moe="aux", tp=2, sp=True, ep=4, dp=4, strategy="optim_grads_params", accumulation=3),
    Layout(moe="aux", cp=2, ep=2, accumulation=3, query_groups=2),
    Layout(moe="sequence", cp=2, ep=4, dp=2, comm="a2a", strategy="optim_grads", documents=True),  # cp2, ep4
    Layout(moe="sequence", tp=2, sp=True, cp=2, ep=4, etp=1, comm="all_gather", strategy="optim", accumulation=2),
    Layout(moe="gmlp", tp=2, sp=True, cp=2, dp=2, ep=2, etp=2, strategy="optim_grads_params", positions="rope"),
    Layout(moe="gmlp", ep=2, dp=2, replicas=2, strategy="optim_grads", accumulation=2, dispatcher="allgather"),
    Layout(moe="global", tp=2, sp=True, ep=2, etp=1, accumulation=3),
    Layout(moe="global", cp=2, ep=2, accumulation=2),
    Layout(moe="global", ep=2, dp=2, accumulation=3, strategy="optim_grads_params"),
    Layout(moe="global", tp=2, sp=True, ep=2, etp=1, dp=2, accumulation=2),
    Layout(moe="sinkhorn", dp=2, ep=2, accumulation=3),
    Layout(moe="aux", ep=2, dp=2, accumulation=3, recompute="uniform", strategy="optim_grads_params"),
    Layout(moe="bias", tp=2, sp=True, ep=2, etp=1, accumulation=2, recompute="selective"),
    Layout(moe="aux", ep=2, dp=2, accumulation=3, per_token_loss=False),
]


@functools.cache
def expected(model: Layout, steps: int) -> Result:
    """The reference of a model, computed once for all layouts that train it."""
    return reference(model, steps)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(pool, layout):
    """Loss, global norm, each gradient (before clipping), and weights after 20 clipped SGD steps with momentum."""
    found = deviations(
        pool.run(run_layout, layout, STEPS, world_size=layout.world_size)[0], expected(layout.model, STEPS)
    )
    assert found["loss"] <= GRADIENT_BOUND, found
    assert found["grad_norm"] <= GRADIENT_BOUND, found
    assert found["gradients"] <= GRADIENT_BOUND, found
    assert found["losses"] <= WEIGHT_BOUND, found
    assert found["weights"] <= WEIGHT_BOUND, found
    assert found["choices"] == 0, found


# The all-to-all, because dropout acts on the probabilities too.
EVALUATED = Layout(tp=2, sp=True, cp=2, comm="a2a", strategy="optim_grads_params", query_groups=2)


@pytest.mark.parametrize("layout", [LAYOUTS[3], LAYOUTS[10], LAYOUTS[18], EVALUATED], ids=lambda layout: layout.name)
def test_evaluation_equals_one_process_and_moves_nothing(pool, layout):
    """T55: the held-out loss at every layout, and dropout draws on as if nobody had evaluated.

    Mutations: average the ranks' means; leave the dropout on.
    """
    _, held_out = pool.run(train_and_evaluate, layout.model, True, world_size=1)[0]
    found = pool.run(train_and_evaluate, layout, True, world_size=layout.world_size)
    undisturbed = pool.run(train_and_evaluate, layout, False, world_size=layout.world_size)
    for (losses, means), (expected, _) in zip(found, undisturbed, strict=True):
        assert losses == expected
        assert means[0] == pytest.approx(held_out[0], rel=1e-9)
        assert means[1] != means[0]


def test_reference_trains():
    """The comparison would be idle if nothing moved: the reference's loss falls on data it has not seen before."""
    result = expected(Layout().model, STEPS)
    assert result.grad_norm > 0.5, "clipping does not act"
    invisible = "k_layernorm.bias"  # see relative_error
    assert all(g.abs().max() > 1e-3 for name, g in result.gradients.items() if not name.endswith(invisible))
    assert result.losses[-1] < result.losses[0]
