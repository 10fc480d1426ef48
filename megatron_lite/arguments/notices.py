"""What start-up says about settings that do less than one may think."""

from collections.abc import Collection, Iterator

from megatron_lite.arguments.run_config import RunConfig
from megatron_lite.pipeline_parallel_config import SPLIT_BACKWARD
from megatron_lite.transformer.attention_choices import cp_comm_type_of


def default_notices(run: RunConfig, given: Collection[str]) -> Iterator[str]:
    """One sentence on what nobody chose, and Megatron-LM would compute otherwise.

    Args:
        run: the settings.
        given: fields that were set, wherever.
    """
    sizes = run.transformer
    narrow_router = sizes.num_moe_experts is not None and sizes.params_dtype.itemsize == 2
    differing = [
        text
        for field, text, concerned in (
            ("hidden_dropout", "--hidden-dropout 0 (there 0.1)", True),
            ("attention_dropout", "--attention-dropout 0 (there 0.1)", True),
            ("calculate_per_token_loss", "--calculate-per-token-loss (there a mean of micro-batch means)", True),
            ("moe_router_dtype", "--moe-router-dtype fp32 (there that of its input)", narrow_router),
        )
        if concerned and field not in given
    ]
    if differing:
        yield (
            f"defaults that are not Megatron-LM's: {', '.join(differing)}; write a value to choose. "
            "Padding of the vocabulary is always outside of the softmax (there inside)."
        )


def recomputation_notices(run: RunConfig) -> Iterator[str]:
    """Where recomputation takes time and frees nothing."""
    sizes = run.transformer
    names = sizes.recompute_modules or [] if sizes.recompute_granularity == "selective" else []
    layers = [n for n in range(1, sizes.num_layers + 1) if cp_comm_type_of(sizes, n) in ("a2a", "a2a+p2p")]
    if "mla_up_proj" in names and sizes.context_parallel_size > 1 and layers:
        yield (
            "--recompute-modules mla_up_proj: attention by all-to-all keeps the heads it has exchanged, so in "
            f"{len(layers)} layers little is freed; --cp-comm-type p2p or all_gather keep what is recomputed."
        )


def expert_notices(run: RunConfig) -> Iterator[str]:
    """The stand-in for a package that is not supported."""
    backend = run.transformer.moe_flex_dispatcher_backend
    if run.transformer.num_moe_experts is not None and backend != "deepep":
        yield (
            f"--moe-flex-dispatcher-backend {backend}: tokens travel by "
            f"{run.transformer.moe_token_dispatcher_type} instead, with the same result; deepep is the package that "
            "flex uses here."
        )


def pipeline_notices(run: RunConfig) -> Iterator[str]:
    """Where pipelining takes the point out of another setting, or the other way round."""
    sizes, strategy = run.transformer, run.ddp.data_parallel_sharding_strategy
    if sizes.pipeline_model_parallel_size == 1:
        return
    if strategy in ("optim_grads", "optim_grads_params"):
        kept = "gradients" if strategy == "optim_grads" else "gradients and gathered parameters"
        yield (
            f"--data-parallel-sharding-strategy {strategy}: under pipelining {kept} stay whole on each rank during a "
            "step, and gradients are reduced once at its end; between steps all is split as asked for."
        )
    if sizes.schedule in SPLIT_BACKWARD and sizes.mtp_num_layers:
        yield (
            f"--pipeline-schedule {sizes.schedule}: the last stage, with multi-token prediction, computes gradients of "
            "weights together with those of activations."
        )
    whole = "--compile" if run.training.compile else sizes.gradients_together
    if sizes.schedule in SPLIT_BACKWARD and whole is not None:
        yield (
            f"--pipeline-schedule {sizes.schedule}: with {whole} the gradients of weights are computed together with "
            "those of activations, so there is nothing to fill idle time with; interleaved idles less (tools/plan.py)."
        )


def fp8_notices(run: RunConfig, recipe_is_given: bool) -> Iterator[str]:
    """The recipe if none was chosen, that of experts, and what layers in fp8 do not take part in."""
    if run.transformer.fp8 is not None and run.transformer.num_moe_experts is not None:
        yield (
            f"--fp8-format {run.transformer.fp8}: routed experts have a scale for each row and e4m3 for gradients too, "
            "whatever --fp8-recipe says; the gradients of their weights are not in fp8."
        )
    if run.transformer.fp8 is not None and run.transformer.tp_comm_overlap:
        yield "--tp-comm-overlap: layers in fp8 gather and reduce-scatter as without it; it is for the others alone."
    if run.transformer.fp8 is not None and not recipe_is_given:
        yield (
            f"--fp8-format {run.transformer.fp8}: scales are those of the tensor at hand (--fp8-recipe "
            f"{run.transformer.fp8_recipe}), where Megatron-LM's default, delayed, takes them from earlier steps."
        )
