"""What start-up says about settings that do less than one may think."""

from collections.abc import Iterator

from megatron_lite.arguments.run_config import RunConfig
from megatron_lite.pipeline_parallel.config import SPLIT_BACKWARD


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
    whole = "--compile" if run.training.compile else "--recompute-granularity"
    if sizes.schedule in SPLIT_BACKWARD and (run.training.compile or sizes.recompute_granularity is not None):
        yield (
            f"--pipeline-schedule {sizes.schedule}: with {whole} the gradients of weights are computed together with "
            "those of activations, so there is nothing to fill idle time with; interleaved idles less (tools/plan.py)."
        )
