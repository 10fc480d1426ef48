"""What a mixture of experts asks of the other groups of settings."""

from collections.abc import Iterator

from megatron_lite.arguments.run_config import RunConfig
from megatron_lite.model_parallel_config import nearest_multiples


def experts_between_groups(run: RunConfig) -> Iterator[str]:
    """Rules between the experts and the data, the checkpoint and the batch."""
    if run.transformer.num_moe_experts is None:
        return
    yield from _padding(run)
    yield from _tokens_of_a_rank(run)
    yield from _upcycling(run)


def _padding(run: RunConfig) -> Iterator[str]:
    """Padded tokens go through the router like others, so they would count where tokens are counted."""
    config = run.transformer
    if not run.data.pad_to_multiple or not run.data.seq_length or run.data.seq_length < 0 or not run.padding:
        return
    given = config.moe_aux_loss_coeff
    counting = {
        f"the balance losses ({', '.join(config.balance_types)})": any(given if isinstance(given, list) else [given]),
        "sinkhorn": "sinkhorn" in config.balance_types,
        "moe_z_loss_coeff": bool(config.moe_z_loss_coeff),
        "moe_router_enable_expert_bias": config.moe_router_enable_expert_bias,
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
    }
    named = [name for name, is_set in counting.items() if is_set]
    if named:
        yield (
            f"pad_to_multiple adds {run.padding} tokens to each sample, which {' and '.join(named)} would count as if "
            f"they were text: choose a --seq-length that needs no padding instead of {run.data.seq_length}."
        )


def _tokens_of_a_rank(run: RunConfig) -> Iterator[str]:
    """Without sequence parallelism a layer of experts splits its tokens over the tensor ranks itself."""
    config, length = run.transformer, run.data.seq_length or 0
    tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
    if tp == 1 or config.sequence_parallel or length < 1:
        return
    own = run.padded_sequence_length // cp
    if own % tp:
        yield (
            f"seq_length is {length}, {own} tokens a context parallel rank, but layers of experts split these over "
            f"tensor_model_parallel_size ({tp}) ranks: write --seq-length {nearest_multiples(length, cp * tp)}."
        )


def _upcycling(run: RunConfig) -> Iterator[str]:
    config, checkpoint = run.transformer, run.checkpoint
    if not config.moe_use_upcycling:
        return
    if checkpoint.load is None and checkpoint.pretrained_checkpoint is None and not run.dry_run:
        yield (
            "moe_use_upcycling is set, but no dense model is named: write --pretrained-checkpoint (or --load) with the "
            "folder of its checkpoint."
        )
    width, parts = config.moe_ffn_hidden_size or 0, config.moe_upcycling_granularity
    if parts >= 1 and width * parts != config.ffn_hidden_size:
        yield (
            f"moe_ffn_hidden_size is {width}, but upcycling divides the dense ffn_hidden_size "
            f"({config.ffn_hidden_size}) into moe_upcycling_granularity ({parts}) experts: write "
            f"--moe-ffn-hidden-size {(config.ffn_hidden_size or 0) // parts}."
        )
