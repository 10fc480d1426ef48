"""Each known defect, put back on purpose, is caught by the comparison of test_layout_matrix.py.

A row names the mutation, a layout that shows it, what has to deviate, and the traps it stands for. Defects that leave
the loss exact are the reason why gradients are compared. Mutations that need exact ties, capacities, low precision or a
hang to show are run beside the tests of their traps, in the CASES of the modules imported below.
"""

import pytest
from _pytest.mark.structures import ParameterSet

from tests.parallel import test_experts, test_moe_router, test_token_dispatcher
from tests.parallel.layouts import Layout, deviations, run_layout
from tests.parallel.mutations import MUTATIONS
from tests.parallel.test_layout_matrix import GRADIENT_BOUND, WEIGHT_BOUND, expected

STEPS = 4  # enough for biases, zero at first, to take part

SEQUENCE_PARALLEL = Layout(tp=2, sp=True, normalization="RMSNorm")
TENSOR_PARALLEL = Layout(tp=2)
OVERLAPPED = Layout(tp=4, sp=True, overlap=True)
DATA_PARALLEL = Layout(dp=2, strategy="optim_grads", accumulation=3)

CONTEXT_PARALLEL = Layout(cp=2, positions="rope")
DOCUMENTS = Layout(cp=2, documents=True, hole=True, positions="rope", accumulation=2)

EXPERTS = Layout(moe="aux", ep=2, dp=4, strategy="optim_grads")
EXPERTS_UNDER_TENSOR_PARALLELISM = Layout(moe="gated", tp=2, sp=True)
EXPERT_BIAS = Layout(moe="bias", ep=2, dp=2)
EVALUATED = Layout(moe="bias", ep=2, dp=2, evaluated=True)
GLOBAL_BALANCE = Layout(moe="global", dp=2)
TWO_EXPERT_RANKS = Layout(moe="aux", ep=2, dp=2)
GATHERED_TOKENS = Layout(moe="aux", ep=2, dp=2, dispatcher="allgather")

PIPELINE = Layout(pp=2, accumulation=3)
INTERLEAVED = Layout(pp=2, schedule="interleaved", chunks=2, layers=4, accumulation=2)
V_SHAPED = Layout(pp=2, schedule="zbv", layers=4, accumulation=2)
EXPERTS_IN_STAGES = Layout(moe="bias", pp=2, ep=2, dp=2, layers=4, schedule="zbv", accumulation=2)

LATENT = Layout(variant="latent", tp=2, sp=True, positions="rope")
FURTHER = Layout(variant="further", tp=2, sp=True, positions="rope")
SINKS = Layout(variant="sinks", tp=2, sp=True, swiglu=True)

CASES = [
    ("norms_not_summed", SEQUENCE_PARALLEL, "gradients", "T1"),
    ("row_bias_not_summed", SEQUENCE_PARALLEL, "gradients", "T1"),
    ("partial_gradients_averaged", SEQUENCE_PARALLEL, "gradients", "T1"),
    ("qk_norms_not_summed", TENSOR_PARALLEL, "gradients", "T2"),
    ("qk_norms_not_summed", SEQUENCE_PARALLEL, "gradients", "T2"),
    ("shared_group_not_summed", Layout(tp=4, query_groups=2), "gradients", "T10"),
    ("row_bias_on_every_rank", TENSOR_PARALLEL, "losses", "T5"),
    ("row_bias_on_every_rank", SEQUENCE_PARALLEL, "losses", "T5"),
    ("local_softmax_denominator", TENSOR_PARALLEL, "loss", "T7"),
    ("padded_vocabulary_in_softmax", Layout(tp=4), "loss", "T8"),
    ("mean_of_local_means", DATA_PARALLEL, "gradients", "T22"),
    ("tokens_counted_locally", DATA_PARALLEL, "gradients", "T17, T22"),
    ("gradients_averaged_over_data_parallel", DATA_PARALLEL, "gradients", "T22, T24"),
    ("last_micro_batch_not_reduced", Layout(dp=2, strategy="optim", accumulation=3), "gradients", "T24, T25"),
    ("replicas_counted_in_norm", TENSOR_PARALLEL, "grad_norm", "T26"),
    ("replicas_counted_in_norm", Layout(dp=2), "grad_norm", "T26"),
    ("local_norm", TENSOR_PARALLEL, "grad_norm", "T26"),
    ("weight_decay_on_vectors", TENSOR_PARALLEL, "weights", "T28"),
    ("contiguous_split", CONTEXT_PARALLEL, "loss", "T14"),
    ("local_positions", CONTEXT_PARALLEL, "loss", "T16"),
    ("local_positions", Layout(cp=2), "loss", "T16"),  # learned positions
    ("labels_shifted_after_split", CONTEXT_PARALLEL, "loss", "T18"),
    ("documents_joined", DOCUMENTS, "loss", "T19"),
    ("documents_joined", Layout(cp=2, comm="a2a", documents=True), "loss", "T19"),
    ("documents_joined", Layout(documents=True, accumulation=2), "loss", "T19"),
    ("documents_of_local_lengths", DOCUMENTS, "loss", "T19"),
    ("tokens_counted_locally", CONTEXT_PARALLEL, "gradients", "T17"),
    ("tokens_counted_locally", Layout(cp=4, documents=True), "gradients", "T17"),
    ("not_reduced_over_context", CONTEXT_PARALLEL, "gradients", "T17"),
    ("loss_reported_of_one_rank", CONTEXT_PARALLEL, "loss", "T21"),
    ("micro_batch_means_of_one_rank", Layout(cp=2, dp=2, per_token_loss=False), "gradients", "T17, T22"),
    ("router_not_summed", EXPERTS_UNDER_TENSOR_PARALLELISM, "gradients", "T1"),
    ("router_not_summed", Layout(moe="gated", tp=2), "gradients", "T1"),  # without sequence parallelism too
    ("shared_gate_not_summed", EXPERTS_UNDER_TENSOR_PARALLELISM, "gradients", "T1"),
    ("experts_not_summed_over_their_copies", EXPERTS, "gradients", "T39"),
    ("experts_not_summed_over_their_copies", Layout(moe="aux", tp=4, etp=1, ep=2), "gradients", "T39"),
    ("experts_scaled_by_their_ranks", EXPERTS, "gradients", "T39"),
    ("gradients_averaged_over_data_parallel", EXPERTS, "gradients", "T39"),
    ("replicas_counted_in_norm", Layout(moe="aux", ep=2, dp=4), "grad_norm", "T26"),
    ("load_counted_by_one_rank", EXPERTS_UNDER_TENSOR_PARALLELISM, "gradients", "T43"),
    ("load_counted_by_one_rank", Layout(moe="sequence", cp=2, ep=2), "gradients", "T43"),
    ("load_counted_by_one_rank", Layout(moe="global", cp=2, ep=2, accumulation=2), "gradients", "T43"),
    ("load_counted_by_one_rank", GLOBAL_BALANCE, "gradients", "T43"),
    ("scores_averaged_by_one_rank", Layout(moe="aux", tp=2, sp=True), "gradients", "T43"),
    ("scores_averaged_by_one_rank", Layout(moe="sequence", cp=2, ep=2), "gradients", "T43"),
    ("scores_averaged_over_replicas", GLOBAL_BALANCE, "gradients", "T43"),
    ("global_counts_of_earlier_steps", GLOBAL_BALANCE, "weights", "T43"),
    ("balance_losses_of_every_replica", EXPERTS, "gradients", "T43"),
    ("expert_bias_by_one_rank", EXPERT_BIAS, "choices", "T45"),
    ("expert_bias_by_micro_batch", Layout(moe="bias", ep=2, dp=2, accumulation=2), "choices", "T45"),
    ("expert_bias_by_evaluation", EVALUATED, "choices", "T45"),
    ("expert_bias_in_weights", EXPERT_BIAS, "losses", ""),
    ("router_in_bfloat16", Layout(moe="aux", tp=2, sp=True), "gradients", "T42"),
    ("fc2_bias_on_every_rank", Layout(moe="gated", tp=2, sp=True), "losses", "T5"),
    ("shared_experts_reduced_twice", Layout(moe="gated", tp=2), "losses", "T46"),
    ("shared_experts_divided", EXPERTS_UNDER_TENSOR_PARALLELISM, "losses", "T46"),
    ("shared_experts_not_reduced", Layout(moe="gated", tp=2), "losses", "T46"),
    ("probabilities_by_a_raw_collective", TWO_EXPERT_RANKS, "gradients", "T47"),
    ("tokens_dispatched_without_gradient", TWO_EXPERT_RANKS, "gradients", "T47"),
    ("tokens_dispatched_without_gradient", GATHERED_TOKENS, "gradients", "T47"),
    ("combined_without_gradient", TWO_EXPERT_RANKS, "gradients", "T47"),
    ("combined_without_gradient", GATHERED_TOKENS, "gradients", "T47"),
    ("sequences_counted_together", Layout(moe="sequence", ep=2, dp=2), "gradients", "T43"),
    ("z_loss_of_own_tokens", Layout(moe="aux", tp=2, sp=True), "gradients", "T43"),
    ("tokens_routed_on_every_rank", Layout(moe="gated", tp=2), "gradients", "T3"),
    ("micro_batches_mixed_up", PIPELINE, "loss", "T32"),
    ("micro_batches_mixed_up", V_SHAPED, "loss", "T32"),
    ("loss_of_another_stage", PIPELINE, "loss", ""),
    ("tied_gradients_not_summed", PIPELINE, "gradients", "T33"),
    ("tied_gradients_not_summed", PIPELINE, "tied", "T33"),
    ("tied_gradients_not_summed", V_SHAPED, "tied", "T33"),
    ("tied_gradients_averaged", INTERLEAVED, "gradients", "T33"),
    ("tied_copy_in_norm", PIPELINE, "grad_norm", "T33"),
    ("tied_copy_initialized_apart", V_SHAPED, "loss", "T33"),
    ("balance_losses_of_the_last_stage", Layout(moe="aux", pp=2), "gradients", "T34"),
    ("balance_losses_shared_by_stages", Layout(moe="aux", pp=2), "gradients", "T34"),
    ("expert_bias_of_the_first_chunk", EXPERTS_IN_STAGES, "choices", "T45"),
    ("recomputation_counted", Layout(moe="global", pp=2, accumulation=3, recompute="uniform"), "gradients", "T37"),
    ("norm_of_one_chunk", INTERLEAVED, "grad_norm", "T38"),
    ("norm_of_one_chunk", V_SHAPED, "grad_norm", "T38"),
    ("gradients_averaged_over_data_parallel", Layout(pp=2, dp=2, accumulation=2), "gradients", ""),
    ("replicas_counted_in_norm", Layout(pp=2, tp=2), "grad_norm", "T26"),
    ("local_norm", PIPELINE, "grad_norm", "T38"),
    ("latent_norms_not_summed", LATENT, "gradients", "T1"),
    ("down_projections_not_summed", LATENT, "gradients", "T1"),
    ("joining_projection_not_summed", FURTHER, "gradients", "T1"),
    ("norms_not_summed", FURTHER, "gradients", "T1"),
    ("key_positions_not_copied", Layout(variant="latent", tp=2, positions="rope"), "gradients", "T3"),
    ("future_shifted_after_split", Layout(variant="further", cp=2, positions="rope"), "losses", "T18"),
    ("future_of_other_documents", Layout(variant="further", documents=True, positions="rope"), "losses", "T19"),
    ("further_losses_by_all_tokens", FURTHER, "gradients", "T17"),
    ("tokens_counted_locally", Layout(variant="further", cp=2, positions="rope"), "gradients", "T17"),
    ("tied_gradients_not_summed", Layout(variant="further", pp=2, positions="rope", tied=False), "gradients", "T33"),
    ("tied_copy_in_norm", Layout(variant="further", pp=2, positions="rope", tied=False), "grad_norm", "T33"),
    ("sinks_counted_twice", SINKS, "grad_norm", "T26"),
    ("replicas_counted_in_norm", SINKS, "grad_norm", "T26"),
    ("sinks_of_other_heads", Layout(variant="sinks", cp=2, comm="a2a", swiglu=True), "loss", ""),
    ("sinks_without_a_place", SINKS, "gradients", ""),
    ("last_part_not_multiplied", OVERLAPPED, "loss", ""),
    ("part_of_another_rank_added", OVERLAPPED, "loss", ""),
    ("sums_one_rank_too_far", OVERLAPPED, "loss", ""),
    ("gathered_gradient_of_one_rank", OVERLAPPED, "gradients", ""),
    ("gates_by_group", Layout(variant="gates", tp=4, query_groups=2, positions="rope"), "loss", ""),
]


def cases() -> list[ParameterSet]:
    """By default the first mutation of each trap, and those without a trap; with --full-matrix all."""
    found, seen = [], set()
    for name, layout, deviates, traps in CASES:
        marks = [] if not traps or not set(traps.split(", ")) <= seen else [pytest.mark.full]
        seen.update(traps.split(", "))
        found.append(pytest.param(name, layout, deviates, id=f"{name}-{layout.name}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "layout", "deviates"), cases())
def test_mutation_is_caught(pool, name, layout, deviates):
    """The broken code deviates by far more than rounding where the comparison looks."""
    result = pool.run(run_layout, layout, STEPS, name, world_size=layout.world_size)[0]
    found = deviations(result, expected(layout.model, STEPS))
    bound = WEIGHT_BOUND if deviates in ("losses", "weights") else GRADIENT_BOUND
    assert found[deviates] > (0 if deviates in ("choices", "tied") else 1000 * bound), found


def test_every_mutation_is_tried():
    """No mutation lies around unused."""
    assert {name for name, *_ in CASES} == set(MUTATIONS)


def test_every_trap_of_experts_has_a_mutation():
    """T39 to T47: a mutation is run for each, here or beside the trap's own tests."""
    cases = [*CASES, *test_experts.CASES, *test_moe_router.CASES, *test_token_dispatcher.CASES]
    tried = {trap for *_, traps in cases for trap in traps.split(", ")}
    assert {f"T{number}" for number in range(39, 48)} <= tried


def test_every_trap_of_pipelines_has_a_mutation():
    """T32, T33, T34, T37, T38."""
    tried = {trap for *_, traps in CASES for trap in traps.split(", ")}
    assert {"T32", "T33", "T34", "T37", "T38"} <= tried


def test_evaluation_moves_no_expert_bias(pool):
    """T45, unbroken: what `expert_bias_by_evaluation` shows is the mutation. No row of the matrix evaluates."""
    found = deviations(pool.run(run_layout, EVALUATED, STEPS, world_size=2)[0], expected(EVALUATED.model, STEPS))
    assert max(found.values()) <= WEIGHT_BOUND, found
