"""Whether layers are compiled: what forbids it, and what a run that does not say gets."""

from collections.abc import Iterator

from megatron_lite.arguments.run_config import RunConfig
from megatron_lite.pipeline_parallel_config import SPLIT_BACKWARD


def compilation_problems(run: RunConfig) -> Iterator[str]:
    """Every setting that a compiled layer cannot do, one sentence each."""
    sizes = run.transformer
    if sizes.attention_dropout or (sizes.hidden_dropout and sizes.sequence_parallel):
        yield (
            f"compile is set with attention_dropout {sizes.attention_dropout} and hidden_dropout "
            f"{sizes.hidden_dropout}, but a compiled layer cannot draw from the random stream of one tensor parallel "
            "rank: leave out --compile, or the dropout (hidden dropout alone compiles without --sequence-parallel)."
        )
    if sizes.transformer_impl == "transformer_engine":
        yield (
            "compile is set with transformer_impl transformer_engine, whose layers torch cannot compile: leave out "
            "--compile, or write --transformer-impl local."
        )
    if sizes.has_apex_norms:
        yield (
            "compile is set with norm_impl apex, but a compiled layer makes its norms part of its own kernels: leave "
            "out --compile, or --norm-impl apex."
        )
    if sizes.recompute_granularity == "selective":
        yield (
            "compile is set with recompute_granularity selective, but torch cannot recompute a part of a compiled "
            "layer whose weights are DTensors: write --recompute-granularity full, or leave out --compile."
        )


def settle_compilation(run: RunConfig) -> list[str]:
    """Without --compile or --no-compile: compile on a GPU what can be compiled. Returns what start-up should say."""
    if run.training.compile is not None:
        return []
    import torch

    on_gpu = torch.cuda.is_available() and run.distributed.distributed_backend != "gloo"
    obstacles = list(compilation_problems(run))
    if run.transformer.pipeline_model_parallel_size > 1 and run.transformer.schedule in SPLIT_BACKWARD:
        obstacles.append("compiled layers compute both kinds of gradients in one piece, and this schedule splits them.")
    run.training.compile = on_gpu and not obstacles
    if not on_gpu or not obstacles:
        return []
    return [f"layers are not compiled, as they are on a GPU by default: {obstacles[0]}"]
