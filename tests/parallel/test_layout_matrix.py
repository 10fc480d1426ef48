"""The layout never changes the mathematics: every row equals plain torch on one process, in float64.

By default a part of the matrix runs, in which each axis meets each other one. All of it, and the table in the
documentation:

    scripts/test.sh tests/parallel/test_layout_matrix.py --full-matrix --layout-table docs/layout_matrix.md

Mutations that make these tests fail are in test_mutations.py, one for each trap.
"""

import functools
import itertools
from pathlib import Path

import pytest

from megatron_lite.pipeline_parallel_config import SCHEDULES, SPLIT_BACKWARD
from tests.conftest import MEASURED
from tests.parallel.layout_table import TABLE, layout_table, row_name
from tests.parallel.layouts import (
    VARIANTS,
    Layout,
    Result,
    deviations,
    reference,
    run_layout,
    train_and_evaluate,
    transformer_config,
)

STEPS = 20
STEPS_BY_DEFAULT = 3
GRADIENT_BOUND = 1e-9
WEIGHT_BOUND = 1e-8

TENSOR_AND_DATA = [
    Layout(),
    Layout(accumulation=3, tied=False),
    Layout(tp=2),
    Layout(tp=2, sp=True, normalization="RMSNorm"),
    Layout(tp=2, tied=False, swiglu=True, query_groups=2, positions="rope"),
    Layout(tp=4, sp=True, accumulation=3, tied=False, normalization="RMSNorm", swiglu=True, positions="rope"),
    Layout(dp=2, accumulation=3),
    Layout(dp=3, strategy="optim_grads", accumulation=2),
    Layout(dp=4, strategy="optim_grads_params", accumulation=3, normalization="RMSNorm"),
    Layout(tp=4, query_groups=2, positions="rope"),
    Layout(tp=2, sp=True, overlap=True, dp=2, strategy="optim_grads_params", accumulation=2, swiglu=True),
    Layout(tp=4, sp=True, overlap=True, query_groups=2, positions="rope"),
    Layout(tp=2, sp=True, dp=2, strategy="optim", accumulation=2),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads", accumulation=2, recompute="selective"),
    Layout(tp=2, dp=2, strategy="optim_grads_params", recompute="block", tied=False),
    Layout(dp=2, strategy="optim_grads", accumulation=3, per_token_loss=False),
]
TENSOR_AND_DATA_IN_FULL = [
    Layout(tp=4, accumulation=2),
    Layout(tp=4, sp=True, overlap=True, tied=False, compiled=True),
    Layout(dp=2, strategy="optim", accumulation=2, tied=False),
    Layout(dp=4, strategy="optim_grads", replicas=2, accumulation=3),
    Layout(dp=3, strategy="no_shard", accumulation=4, tied=False),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads_params", query_groups=1, tied=False),
    Layout(tp=2, dp=2, accumulation=3),
    Layout(tp=2, sp=True, dp=3, strategy="optim_grads_params", accumulation=2, tied=False, swiglu=True),
    Layout(tp=2, sp=True, dp=4, strategy="optim_grads_params", replicas=2, query_groups=4, positions="rope"),
    Layout(tp=4, sp=True, dp=2, strategy="optim_grads_params", accumulation=3),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads_params", recompute="uniform", swiglu=True),
    Layout(tp=2, sp=True, dp=2, strategy="optim_grads_params", accumulation=2, compiled=True),
]

CONTEXT = [
    Layout(cp=2, accumulation=2),
    Layout(cp=2, comm="all_gather", query_groups=2, positions="rope", hole=True),
    Layout(cp=2, comm="a2a", query_groups=1, documents=True),
    Layout(cp=4, comm="a2a+p2p", hierarchy=(2, 2), query_groups=4, documents=True, positions="rope"),
    Layout(documents=True, accumulation=2),
    Layout(cp=2, documents=True, hole=True, positions="rope", accumulation=2),
    Layout(tp=2, sp=True, cp=2, strategy="optim_grads_params", recompute="uniform", normalization="RMSNorm"),
    Layout(cp=2, dp=2, accumulation=2, per_token_loss=False),
]
CONTEXT_IN_FULL = [
    Layout(cp=4, positions="rope", tied=False, swiglu=True, normalization="RMSNorm"),
    Layout(cp=4, comm="all_gather", strategy="optim_grads_params", tied=False),
    Layout(cp=4, comm="a2a", query_groups=2, positions="rope", accumulation=3),
    Layout(cp=4, comm="a2a+p2p", hierarchy=(2, 2), strategy="optim", hole=True, accumulation=2),
    Layout(cp=4, documents=True, query_groups=2, tied=False),
    Layout(cp=2, comm="all_gather", documents=True, strategy="optim_grads_params", recompute="selective"),
    Layout(cp=2, comm=("p2p", "a2a"), documents=True, positions="rope"),  # one type for each layer
    Layout(tp=2, cp=2, query_groups=2, positions="rope"),
    Layout(tp=2, sp=True, cp=2, comm="a2a", strategy="optim_grads", documents=True, accumulation=2),
    Layout(tp=2, sp=True, cp=2, comm="all_gather", dp=2, strategy="optim_grads_params", replicas=2, hole=True),
    Layout(tp=2, sp=True, cp=2, dp=2, strategy="optim_grads_params", accumulation=3, documents=True, positions="rope"),
    Layout(tp=2, sp=True, cp=4, comm="a2a+p2p", hierarchy=(2, 2), strategy="optim_grads", query_groups=4),
    Layout(cp=2, dp=2, strategy="optim_grads", accumulation=3, recompute="block", tied=False),
    Layout(cp=4, per_token_loss=False, hole=True),
    Layout(cp=2, dp=3, comm="a2a", strategy="no_shard", accumulation=2, swiglu=True),
    Layout(tp=2, sp=True, cp=2, strategy="optim_grads", documents=True, compiled=True),
]

EXPERTS = [
    Layout(moe="aux", accumulation=3),
    Layout(moe="aux", ep=2, dp=2, accumulation=3, tied=False),
    Layout(moe="gated", tp=2, sp=True, accumulation=2, swiglu=True, tied=False),
    Layout(moe="gated", tp=2, etp=1, accumulation=2),
    Layout(moe="sequence", tp=2, ep=2, dp=2, accumulation=3, dispatcher="allgather", swiglu=True),
    Layout(moe="aux", tp=4, etp=1, ep=2, accumulation=2),  # copies of experts where dense parameters have none
    Layout(moe="aux", cp=2, ep=2, accumulation=3, query_groups=2),
    Layout(moe="global", ep=2, dp=2, accumulation=3, strategy="optim_grads_params"),
    Layout(moe="bias", tp=2, sp=True, ep=2, etp=1, accumulation=2, recompute="selective"),
]
EXPERTS_IN_FULL = [
    Layout(moe="aux", ep=2, dp=2, accumulation=3, dispatcher="allgather", strategy="optim_grads_params"),
    Layout(moe="bias", etp=2, ep=2, dp=4, accumulation=3, strategy="optim_grads_params"),  # tp1, etp2, ep2
    Layout(moe="aux", ep=2, dp=4, strategy="optim_grads", accumulation=3),
    Layout(moe="aux", ep=4, dp=4, accumulation=3, strategy="optim"),
    Layout(moe="aux", dp=2, strategy="optim_grads_params", accumulation=2),  # experts whole on each rank
    Layout(moe="gated", tp=2, accumulation=2),  # no sequence parallelism: the layer splits the tokens itself
    Layout(moe="gated", tp=2, sp=True, etp=1, ep=2, accumulation=2, normalization="RMSNorm"),
    Layout(moe="gated", tp=2, sp=True, overlap=True, accumulation=2),
    Layout(moe="sequence", tp=2, sp=True, ep=2, etp=1, dp=2, strategy="optim_grads_params", accumulation=3),
    Layout(moe="bias", tp=2, sp=True, ep=2, dp=2, strategy="optim_grads", accumulation=2, positions="rope"),
    Layout(moe="bias", tp=2, sp=True, etp=1, ep=4, dp=2, strategy="optim_grads_params", swiglu=True),  # tp2, ep4
    Layout(moe="aux", tp=2, sp=True, ep=4, dp=4, strategy="optim_grads_params", accumulation=3),
    Layout(moe="sequence", cp=2, ep=4, dp=2, comm="a2a", strategy="optim_grads", documents=True),  # cp2, ep4
    Layout(moe="sequence", tp=2, sp=True, cp=2, ep=4, etp=1, comm="all_gather", strategy="optim", accumulation=2),
    Layout(moe="gmlp", tp=2, sp=True, cp=2, dp=2, ep=2, etp=2, strategy="optim_grads_params", positions="rope"),
    Layout(moe="gmlp", ep=2, dp=2, replicas=2, strategy="optim_grads", accumulation=2, dispatcher="allgather"),
    Layout(moe="global", tp=2, sp=True, ep=2, etp=1, accumulation=3),
    Layout(moe="global", cp=2, ep=2, accumulation=2, compiled=True),
    Layout(moe="global", tp=2, sp=True, ep=2, etp=1, dp=2, accumulation=2),
    Layout(moe="sinkhorn", dp=2, ep=2, accumulation=3),
    Layout(moe="bias", tp=2, ep=2, dp=2, strategy="optim_grads_params", accumulation=2, swiglu=True, compiled=True),
    Layout(moe="sinkhorn", tp=2, sp=True, etp=1, accumulation=2, compiled=True),
    Layout(moe="aux", ep=2, dp=2, accumulation=3, recompute="uniform", strategy="optim_grads_params"),
    Layout(moe="aux", ep=2, dp=2, accumulation=3, per_token_loss=False),
    Layout(moe="aux", tp=2, cp=2, ep=2, etp=1, strategy="optim", accumulation=2, recompute="uniform", tied=False),
]

# Every schedule, with fewer micro-batches than stages, as many, and numbers that are no multiple of them.
STAGES = [
    Layout(pp=2, accumulation=3),
    Layout(pp=2, schedule="gpipe", accumulation=1, tied=False),
    Layout(pp=2, schedule="interleaved", chunks=2, layers=4, accumulation=3),
    Layout(pp=2, schedule="interleaved-zero-bubble", chunks=2, layers=4, accumulation=2, tied=False),
    Layout(pp=2, schedule="zbv", layers=4, accumulation=3, positions="rope"),
    Layout(pp=2, schedule="dualpipev", layers=4, accumulation=6, normalization="RMSNorm", swiglu=True),
    Layout(pp=4, schedule="zbv", layers=8, accumulation=3),
    Layout(pp=4, stages="E|t|tt|L", layers=3, accumulation=2),
    Layout(pp=2, stages="Et|ttL", layers=3, accumulation=4, recompute="uniform", tied=False),
    Layout(tp=2, pp=2, dp=2, accumulation=3),
    Layout(tp=2, sp=True, pp=2, schedule="interleaved", chunks=2, layers=4, accumulation=2),
    Layout(cp=2, pp=2, schedule="zbv", layers=4, accumulation=2, documents=True),
    Layout(pp=2, dp=2, strategy="optim_grads_params", schedule="zbv", layers=4, accumulation=3),
    Layout(pp=2, dp=2, strategy="optim", accumulation=2, per_token_loss=False),
    Layout(moe="aux", pp=2, ep=2, dp=2, accumulation=3),
    Layout(moe="bias", pp=2, tp=2, sp=True, etp=1, ep=2, schedule="zbv", layers=4, accumulation=3),
]
STAGES_IN_FULL = [
    Layout(pp=2, schedule="gpipe", chunks=2, layers=4, accumulation=2),
    Layout(pp=2, schedule="interleaved-zero-bubble", accumulation=3),  # one chunk a rank
    Layout(pp=2, schedule="interleaved", chunks=3, layers=6, accumulation=4, tied=False),
    Layout(pp=2, schedule="zbv", layers=4, accumulation=1, tied=False),
    Layout(pp=2, schedule="dualpipev", layers=4, accumulation=3),
    Layout(pp=4, schedule="1f1b", layers=4, accumulation=3),
    Layout(pp=4, schedule="1f1b", layers=4, accumulation=6, tied=False, positions="rope"),
    Layout(pp=4, schedule="gpipe", layers=4, accumulation=4),
    Layout(pp=4, schedule="gpipe", chunks=2, layers=8, accumulation=3),
    Layout(pp=4, schedule="interleaved", chunks=2, layers=8, accumulation=4),
    Layout(pp=4, schedule="interleaved", chunks=2, layers=8, accumulation=6, tied=False),
    Layout(pp=4, schedule="interleaved-zero-bubble", chunks=2, layers=8, accumulation=6),
    Layout(pp=4, schedule="interleaved-zero-bubble", chunks=2, layers=8, accumulation=3, tied=False),
    Layout(pp=4, schedule="zbv", layers=8, accumulation=12, tied=False),
    Layout(pp=4, schedule="dualpipev", layers=8, accumulation=3),
    Layout(pp=4, schedule="dualpipev", layers=8, accumulation=12, tied=False),
    Layout(pp=2, schedule="interleaved", stages="E|t|tt|L", layers=3, accumulation=2),
    Layout(pp=2, schedule="zbv", stages="E|tt|t|L", layers=3, accumulation=3, positions="rope"),
    Layout(pp=2, schedule="zbv", layers=4, accumulation=3, recompute="block"),
    Layout(pp=2, schedule="interleaved-zero-bubble", chunks=2, layers=4, accumulation=3, recompute="selective"),
    Layout(pp=2, dp=2, strategy="optim_grads", accumulation=3, compiled=True),
    Layout(pp=2, schedule="zbv", layers=4, accumulation=3, compiled=True),
    Layout(pp=2, dp=3, strategy="optim_grads", schedule="dualpipev", layers=4, accumulation=4),
    Layout(pp=2, dp=4, strategy="optim_grads_params", replicas=2, accumulation=3, tied=False),
    Layout(pp=4, dp=2, strategy="optim_grads_params", schedule="zbv", layers=8, accumulation=6),
    Layout(tp=2, sp=True, pp=2, dp=2, strategy="optim_grads_params", schedule="dualpipev", layers=4, accumulation=3),
    Layout(tp=4, sp=True, pp=2, schedule="interleaved-zero-bubble", accumulation=3, query_groups=2),
    Layout(tp=2, pp=4, schedule="interleaved", chunks=2, layers=8, accumulation=4, swiglu=True),
    Layout(cp=2, pp=2, accumulation=3, hole=True, tied=False),
    Layout(cp=2, pp=2, comm="a2a", schedule="interleaved", chunks=2, layers=4, accumulation=2, documents=True),
    Layout(cp=4, pp=2, comm="a2a+p2p", hierarchy=(2, 2), accumulation=3, positions="rope"),
    Layout(cp=2, pp=2, dp=2, strategy="optim_grads", schedule="dualpipev", layers=4, accumulation=2, documents=True),
    Layout(tp=2, sp=True, cp=2, pp=2, comm="all_gather", accumulation=3, recompute="selective"),
    Layout(moe="aux", pp=2, layers=4, schedule="zbv", accumulation=3, recompute="uniform"),
    Layout(moe="bias", pp=2, ep=2, dp=2, strategy="optim_grads_params", schedule="zbv", layers=4, accumulation=3),
    Layout(moe="sequence", pp=2, tp=2, sp=True, etp=1, ep=2, schedule="dualpipev", layers=4, accumulation=3),
    Layout(
        moe="gated", pp=2, tp=2, schedule="interleaved-zero-bubble", chunks=2, layers=4, accumulation=2, swiglu=True
    ),
    Layout(moe="aux", pp=2, ep=2, dp=4, strategy="optim_grads", accumulation=3),
    Layout(moe="aux", pp=2, etp=2, ep=2, dp=4, accumulation=3, strategy="optim"),
    Layout(moe="global", pp=2, tp=2, etp=1, ep=2, accumulation=3),
    Layout(moe="gmlp", pp=2, cp=2, ep=2, schedule="zbv", layers=4, accumulation=2),
    Layout(moe="sinkhorn", pp=2, dp=2, ep=2, accumulation=3),
    Layout(moe="sequence", pp=2, schedule="zbv", layers=4, accumulation=3, swiglu=True, compiled=True),
    Layout(moe="aux", pp=2, ep=2, dp=2, schedule="zbv", layers=4, accumulation=3, dispatcher="allgather", tied=False),
    Layout(moe="bias", pp=4, ep=2, dp=2, layers=4, accumulation=3),
    Layout(moe="bias", pp=2, ep=4, dp=4, accumulation=3, recompute="selective"),
    Layout(moe="aux", pp=2, ep=2, dp=2, accumulation=2, per_token_loss=False, documents=True),
]

# Layers of today's model families (VARIANTS), each under each axis.
FAMILIES = [
    Layout(variant="latent", tp=2, sp=True, positions="rope", normalization="RMSNorm", recompute="selective"),
    Layout(variant="latent_keys", tp=4, positions="yarn", accumulation=2),
    Layout(variant="deepseek", cp=2, positions="rope", documents=True, hole=True, accumulation=2),
    Layout(variant="latent", cp=4, comm="a2a+p2p", hierarchy=(2, 2), positions="yarn", tied=False),
    Layout(variant="further", pp=2, positions="rope", accumulation=3),
    Layout(variant="further", tp=2, sp=True, cp=2, positions="none", swiglu=True, tied=False),
    Layout(variant="deepseek", moe="bias", tp=2, sp=True, ep=2, etp=1, positions="rope", accumulation=2, swiglu=True),
    Layout(variant="sinks", tp=2, sp=True, cp=2, swiglu=True, accumulation=2),
    Layout(variant="windows", cp=2, comm="a2a", query_groups=2, documents=True),
    Layout(variant="gates", tp=4, query_groups=2, positions="rope"),
    Layout(variant="off_by_one", dp=2, strategy="optim_grads_params", accumulation=2),
]
FAMILIES_IN_FULL = [
    Layout(
        variant="deepseek", moe="bias", pp=2, ep=2, dp=2, schedule="zbv", layers=4, positions="rope", accumulation=2
    ),
    Layout(variant="latent", accumulation=2, positions="yarn"),
    Layout(variant="latent", tp=2, positions="rope", dp=2, strategy="optim_grads", query_groups=8),
    Layout(variant="latent_keys", tp=2, sp=True, positions="rope", recompute="selective", tied=False),
    Layout(variant="latent_keys", cp=2, comm="all_gather", positions="rope", documents=True, dp=2, strategy="optim"),
    Layout(variant="latent", cp=2, comm="a2a", tp=2, sp=True, positions="yarn", hole=True, normalization="RMSNorm"),
    Layout(
        variant="latent", tp=2, sp=True, cp=2, strategy="optim_grads", positions="rope", documents=True, compiled=True
    ),
    Layout(variant="latent", pp=2, schedule="zbv", layers=4, positions="rope", accumulation=3),
    Layout(variant="deepseek", tp=2, sp=True, cp=2, pp=2, positions="rope", accumulation=2),
    Layout(variant="deepseek", tp=2, sp=True, overlap=True, pp=2, schedule="zbv", layers=4, positions="rope"),
    Layout(variant="deepseek", dp=2, strategy="optim_grads_params", positions="rope", recompute="uniform"),
    Layout(variant="deepseek", pp=4, stages="E|t|t|mL", positions="rope", accumulation=3),
    Layout(variant="deepseek", pp=2, schedule="dualpipev", layers=4, positions="rope", accumulation=3, tied=False),
    Layout(
        variant="deepseek", moe="sequence", cp=2, ep=4, dp=2, positions="rope", strategy="optim_grads", documents=True
    ),
    Layout(variant="deepseek", moe="bias", tp=2, ep=2, dp=2, positions="rope", swiglu=True, recompute="selective"),
    Layout(variant="deepseek", moe="gated", tp=2, sp=True, positions="rope", recompute="uniform", accumulation=2),
    Layout(variant="further", cp=4, comm="a2a", positions="none", hole=True, accumulation=3, tied=False),
    Layout(variant="further", dp=3, strategy="optim_grads", positions="rope", documents=True, accumulation=2),
    Layout(variant="further", cp=2, dp=2, positions="rope", per_token_loss=False, accumulation=2),
    Layout(
        variant="further", pp=2, schedule="interleaved-zero-bubble", chunks=2, layers=4, positions="rope", tied=False
    ),
    Layout(variant="further", pp=2, dp=2, strategy="optim_grads_params", positions="none", accumulation=3),
    Layout(variant="further", tp=2, sp=True, dp=2, strategy="optim_grads", positions="rope", compiled=True),
    Layout(variant="sinks", cp=4, comm="a2a+p2p", hierarchy=(2, 2), swiglu=True, query_groups=4, documents=True),
    Layout(variant="sinks", moe="aux", tp=2, sp=True, ep=2, etp=1, swiglu=True, accumulation=2),
    Layout(variant="sinks", pp=2, schedule="zbv", layers=4, swiglu=True, accumulation=3),
    Layout(variant="windows", tp=2, sp=True, recompute="selective", positions="rope"),
    Layout(variant="windows", moe="aux", ep=2, dp=2, swiglu=True, accumulation=2, strategy="optim_grads_params"),
    Layout(variant="windows", tp=2, sp=True, dp=2, strategy="optim_grads", compiled=True),
    Layout(variant="gates", cp=2, positions="rope", query_groups=4, documents=True, normalization="RMSNorm"),
    Layout(variant="gates", tp=2, sp=True, pp=2, positions="rope", accumulation=2),
    Layout(variant="off_by_one", tp=2, cp=2, comm=("a2a", "p2p"), accumulation=2),
]

DEFAULT = TENSOR_AND_DATA + CONTEXT + EXPERTS + STAGES + FAMILIES
IN_FULL = TENSOR_AND_DATA_IN_FULL + CONTEXT_IN_FULL + EXPERTS_IN_FULL + STAGES_IN_FULL + FAMILIES_IN_FULL
LAYOUTS = DEFAULT + IN_FULL


@functools.cache
def expected(model: Layout, steps: int) -> Result:
    """The reference of a model, computed once for all layouts that train it."""
    return reference(model, steps)


def pytest_generate_tests(metafunc):
    """The rows: with --full-matrix all of them."""
    if "row" in metafunc.fixturenames:
        rows = LAYOUTS if metafunc.config.getoption("--full-matrix") else DEFAULT
        metafunc.parametrize("row", rows, ids=lambda layout: layout.name)


def test_layout_equals_one_process(pool, request, row):
    """Loss, global norm, each gradient (before clipping), and weights after 20 clipped SGD steps with momentum.

    After 6 steps in the default part.
    """
    steps = STEPS if request.config.getoption("--full-matrix") else STEPS_BY_DEFAULT
    found = deviations(pool.run(run_layout, row, steps, world_size=row.world_size)[0], expected(row.model, steps))
    request.config.stash[MEASURED][row] = found
    assert found["loss"] <= GRADIENT_BOUND, found
    assert found["grad_norm"] <= GRADIENT_BOUND, found
    assert found["gradients"] <= GRADIENT_BOUND, found
    assert found["losses"] <= WEIGHT_BOUND, found
    assert found["weights"] <= WEIGHT_BOUND, found
    assert found["tied"] == 0, found
    assert found["choices"] == 0, found


def test_write_the_table(request):
    """Not a test but the command that writes the documentation's table, after all layouts have run."""
    path = request.config.getoption("--layout-table")
    if path is None:
        pytest.skip("runs with --layout-table FILE")
    measured = request.config.stash[MEASURED]
    assert measured.keys() == set(LAYOUTS), "the table shows the whole matrix: add --full-matrix"
    Path(path).write_text(layout_table(measured, STEPS))


def test_the_table_shows_this_matrix():
    """Mutation: add a layout without writing the table anew, or without counting it where the number stands."""
    shown = [line for line in TABLE.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    assert [line.split(" | ")[0].removeprefix("| ") for line in shown[1:]] == [row_name(one) for one in LAYOUTS]
    for page in ("README.md", "CHANGELOG.md", "docs/layout_matrix.md"):
        assert f"{len(LAYOUTS)} layouts" in (TABLE.parents[1] / page).read_text(), page


AXES = {
    "tp": lambda one: one.tp > 1,
    "sp": lambda one: one.sp,
    "cp": lambda one: one.cp > 1,
    "pp": lambda one: one.pp > 1,
    "chunks": lambda one: one.pp > 1 and transformer_config(one).chunks_per_rank > 1,
    "split backward": lambda one: one.pp > 1 and transformer_config(one).schedule in SPLIT_BACKWARD,
    "dp": lambda one: one.dp > 1,
    "sharded": lambda one: one.strategy != "no_shard" and one.dp * one.cp > 1,
    "ep": lambda one: one.ep > 1,
    "etp": lambda one: one.moe is not None and one.etp not in (None, one.tp),
    "recompute": lambda one: one.recompute is not None,
    "untied": lambda one: not one.tied,
    "accumulation": lambda one: one.accumulation > 1,
}
MODELS = {"dense": lambda one: one.moe is None, "experts": lambda one: one.moe is not None}


@pytest.mark.parametrize("model", MODELS)
def test_every_pair_of_axes_meets(model):
    """In some row both are on. Mutation: remove the only row of a pair, as cp2-pp2 with untied embeddings."""
    layouts = [one for one in LAYOUTS if MODELS[model](one)]
    axes = {name: is_on for name, is_on in AXES.items() if any(map(is_on, layouts))}
    missing = [
        pair
        for pair in itertools.combinations(axes, 2)
        if not any(all(axes[name](one) for name in pair) for one in layouts)
    ]
    assert axes.keys() == AXES.keys() - (set() if model == "experts" else {"ep", "etp"})
    assert not missing


TRIPLES = (
    {"tp": 2, "pp": 2, "dp": 2},
    {"tp": 2, "sp": True, "cp": 2, "dp": 2},
    {"tp": 2, "ep": 4},
    {"tp": 2, "etp": 1, "ep": 4},
    {"tp": 1, "etp": 2, "ep": 2},
    {"pp": 2, "ep": 2, "dp": 2},
    {"cp": 2, "ep": 4},
    {"pp": 2, "chunks": 2, "tp": 2},
)


def test_the_matrix_is_large():
    """The known troublesome combinations are in it; every schedule at 2 and 4 ranks, by default with few at least."""
    assert len(set(LAYOUTS)) == len(LAYOUTS) >= 60
    assert max(one.world_size for one in LAYOUTS) == 8
    for triple in TRIPLES:
        assert any(all(getattr(one, name) == size for name, size in triple.items()) for one in LAYOUTS), triple
    for schedule in SCHEDULES:
        sizes = {one.pp for one in LAYOUTS if one.pp > 1 and transformer_config(one).schedule == schedule}
        assert sizes == {2, 4}, schedule
        assert any(one.pp > 1 and transformer_config(one).schedule == schedule for one in DEFAULT), schedule
    assert all(any(is_on(one) for one in DEFAULT) for is_on in AXES.values())


def test_every_family_of_layers_meets_every_axis():
    """Mutation: remove the only row of one."""
    rows = [one for one in LAYOUTS if one.variant is not None]
    assert len(rows) >= 40
    rounded = {"fp8", "fp8_rowwise"}  # tests/parallel/test_fp8.py has their layouts
    assert {one.variant for one in DEFAULT} == {None, *VARIANTS} - rounded
    for axis in ("tp", "sp", "cp", "pp", "dp", "ep", "recompute", "split backward"):
        families = {one.variant for one in rows if AXES[axis](one)}
        assert {"latent", "deepseek"} & families, axis
        assert {"further", "deepseek"} & families, axis
        assert {"sinks", "windows"} & families, axis


# The all-to-all, because dropout acts on the probabilities too.
EVALUATED = [
    Layout(tp=2, sp=True, cp=2, comm="a2a", strategy="optim_grads_params", query_groups=2),
    Layout(pp=2, dp=2, schedule="zbv", layers=4, accumulation=3, strategy="optim_grads_params"),
]
EVALUATED_IN_FULL = [
    Layout(tp=2, sp=True, normalization="RMSNorm"),
    Layout(dp=4, strategy="optim_grads_params", accumulation=3, normalization="RMSNorm"),
    Layout(tp=2, sp=True, dp=4, strategy="optim_grads_params", replicas=2, query_groups=4, positions="rope"),
    Layout(pp=2, tp=2, schedule="interleaved", chunks=2, layers=4, accumulation=1),
]


@pytest.mark.parametrize(
    "layout",
    [*EVALUATED, *(pytest.param(one, marks=pytest.mark.full) for one in EVALUATED_IN_FULL)],
    ids=lambda layout: layout.name,
)
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
    result = expected(Layout().model, STEPS_BY_DEFAULT)
    assert result.grad_norm > 0.5, "clipping does not act"
    invisible = "k_layernorm.bias"  # see relative_error
    assert all(g.abs().max() > 1e-3 for name, g in result.gradients.items() if not name.endswith(invisible))
    assert result.losses[-1] < result.losses[0]
