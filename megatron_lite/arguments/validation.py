"""The rules between groups of settings. Rules inside one group are that group's `violations()`."""

import importlib.util
from collections.abc import Iterator

from megatron_lite.arguments.compilation import compilation_problems
from megatron_lite.arguments.huggingface_settings import huggingface_violations
from megatron_lite.arguments.moe_rules import experts_between_groups
from megatron_lite.arguments.run_config import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.num_microbatches_calculator import NumMicroBatchesCalculator, build_num_microbatches_calculator
from megatron_lite.transformer.transformer_config import divisors, nearest_multiples


def all_violations(run: RunConfig) -> list[str]:
    """Every rule the run breaks, inside and between its groups, one sentence each."""
    found = run.violations()
    # Later rules compute with the sizes, so sizes that make no sense are reported alone.
    rules = (
        (_required,)
        if _sizes_are_broken(run)
        else (
            _required,
            _layout,
            _sequence,
            _batch,
            _duration,
            _features,
            experts_between_groups,
            huggingface_violations,
        )
    )
    for rule in rules:
        found += rule(run)
    return list(dict.fromkeys(found))


def validate(run: RunConfig) -> RunConfig:
    """`run` itself, frozen, if it breaks no rule.

    Raises:
        ConfigError: with every violated rule at once.
    """
    found = all_violations(run)
    if found:
        raise ConfigError.from_violations(found)
    run.freeze()
    return run


def _sizes_are_broken(run: RunConfig) -> bool:
    sizes = run.transformer
    numbers = (
        sizes.tensor_model_parallel_size,
        sizes.pipeline_model_parallel_size,
        sizes.context_parallel_size,
        sizes.expert_model_parallel_size,
        sizes.expert_tensor_parallel_size or 1,
        run.world_size,
        1 if run.training.micro_batch_size is None else run.training.micro_batch_size,
        1 if run.training.global_batch_size is None else run.training.global_batch_size,
    )
    return min(numbers) < 1


def _required(run: RunConfig) -> Iterator[str]:
    needed = {
        "num_layers": run.transformer.num_layers,
        "hidden_size": run.transformer.hidden_size,
        "num_attention_heads": run.transformer.num_attention_heads,
        "seq_length": run.data.seq_length,
    }
    for name, value in needed.items():
        flag = "--" + name.replace("_", "-")
        if value is None or (value == 0 and name != "seq_length"):
            yield f"{name} is not given, but every model has one: write {flag} N, or start from a preset in configs/."
        elif value < 0 and name != "seq_length":
            yield f"{name} is {value}, but must be at least 1: write {flag} 1 or more."
    if run.dry_run:
        return
    if run.tokenizer.tokenizer_type in (None, "GPT2BPETokenizer") and not (
        run.tokenizer.vocab_file and run.tokenizer.merge_file
    ):
        yield (
            f"tokenizer_type is {run.tokenizer.tokenizer_type}, which means GPT2BPETokenizer, but its files are not "
            "named: write --vocab-file and --merge-file, or choose another --tokenizer-type."
        )
    if run.tokenizer.lacks_model:
        yield f"tokenizer_type is {run.tokenizer.tokenizer_type}, which needs --tokenizer-model FILE or FOLDER."
    data = run.data
    sources = (data.data_path, data.data_args_path, data.per_split_data_args_path, data.train_data_path)
    if not data.mock_data and not any(sources):
        yield "No training data is named: write --data-path with the prefix of a .bin/.idx pair, or --mock-data."


def _layout(run: RunConfig) -> Iterator[str]:
    sizes, world = run.transformer, run.world_size
    tp, cp, pp = sizes.tensor_model_parallel_size, sizes.context_parallel_size, sizes.pipeline_model_parallel_size
    dense = tp * cp * pp
    if world % dense:
        yield (
            f"world_size is {world}, but must be a multiple of tensor x context x pipeline parallel size "
            f"({tp} x {cp} x {pp} = {dense}): start {nearest_multiples(world, dense)} ranks, or choose sizes whose "
            f"product divides {world}."
        )
    etp, ep = sizes.expert_tensor_parallel_size or tp, sizes.expert_model_parallel_size
    expert = etp * ep * pp
    if world % expert and expert != dense:
        yield (
            f"world_size is {world}, but must be a multiple of expert tensor x expert x pipeline parallel size "
            f"({etp} x {ep} x {pp} = {expert}): start {nearest_multiples(world, expert)} ranks, or choose smaller "
            "sizes."
        )
    ranks = run.data_parallel_size * cp
    instances = run.ddp.num_distributed_optimizer_instances
    if world % dense == 0 and (instances < 1 or ranks % instances):
        yield (
            f"num_distributed_optimizer_instances is {instances}, but must divide data x context parallel size "
            f"({ranks}): use one of {divisors(ranks)}."
        )


def _sequence(run: RunConfig) -> Iterator[str]:
    length, sizes = run.data.seq_length, run.transformer
    if not length or length < 0:
        return
    longest = run.gpt.max_position_embeddings
    if longest is not None and length > longest:
        yield (
            f"seq_length is {length}, but must be at most max_position_embeddings ({longest}): write --seq-length "
            f"{longest} or --max-position-embeddings {length}."
        )
    tp, cp = sizes.tensor_model_parallel_size, sizes.context_parallel_size
    if not run.padding or run.data.pad_to_multiple:
        return
    if cp > 1:
        factor, rule = 2 * cp, f"context_parallel_size {cp} splits it: sequence length must be divisible by cp_size * 2"
        if sizes.sequence_parallel:
            factor, rule = factor * tp, f"{rule} * tp_size under sequence parallelism (2 x {cp} x {tp})"
        rule = f"{rule} = {factor}"
    else:
        factor, rule = tp, f"sequence parallelism needs a multiple of tensor_model_parallel_size = {tp}"
    yield (
        f"seq_length is {length}, but {rule}: write --seq-length {nearest_multiples(length, factor)}, or let "
        "--pad-to-multiple fill up each sample."
    )


def _batch(run: RunConfig) -> Iterator[str]:
    training, sizes = run.training, run.transformer
    model_ranks = sizes.tensor_model_parallel_size * sizes.context_parallel_size * sizes.pipeline_model_parallel_size
    if training.micro_batch_size is None or run.world_size % model_ranks:
        return
    last_size = training.global_batch_size
    try:
        calculator = build_num_microbatches_calculator(
            training.rampup_batch_size,
            training.global_batch_size,
            training.micro_batch_size,
            run.data_parallel_size,
            training.decrease_batch_size_if_needed,
            training.step_batch_size_schedule,
            run.data.seq_length or None,
        )
        last_size = calculator.schedule.steps[-1][1]
        yield from _growth(run, calculator)
    except ConfigError as error:
        yield str(error)
    if training.rampup_batch_size is not None and training.train_iters is not None:
        yield (
            f"rampup_batch_size is {training.rampup_batch_size} with train_iters {training.train_iters}, but a growing "
            "batch is counted in samples: write --train-samples N instead of --train-iters."
        )
    if training.step_batch_size_schedule is not None and training.global_batch_size not in (None, last_size):
        yield (
            f"global_batch_size is {training.global_batch_size}, but step_batch_size_schedule "
            f"{training.step_batch_size_schedule!r} ends at {last_size}: write --global-batch-size {last_size}, or "
            "leave it out."
        )


def _growth(run: RunConfig, calculator: NumMicroBatchesCalculator) -> Iterator[str]:
    """Sizes of a growing batch that this layout cannot divide, told now and not when the run reaches them.

    With --load, sizes before the first that fits may belong to an earlier part of the run, on fewer ranks.
    """
    chunk = calculator.micro_batch_size * calculator.data_parallel_size
    sizes = [size for _, size in calculator.schedule.steps]
    fitting = [position for position, size in enumerate(sizes) if size % chunk == 0]
    begin = fitting[0] if fitting and run.checkpoint.load is not None else 0
    misfits = [size for size in sizes[begin:] if size % chunk]
    if len(sizes) > 1 and misfits and not calculator.decrease_batch_size_if_needed:
        yield (
            f"the batch grows over the sizes {', '.join(map(str, misfits))}, which are no multiples of "
            f"micro_batch_size ({calculator.micro_batch_size}) x data parallel size "
            f"({calculator.data_parallel_size}) = {chunk}: choose sizes that are, or --decrease-batch-size-if-needed."
        )
    samples = run.training.train_samples
    if samples is not None and samples > 0 and not misfits and calculator.iterations(samples) == 0:
        first = max(sizes[0], chunk)
        yield f"train_samples is {samples}, but the first step takes {first}: write --train-samples {first} or more."


def _duration(run: RunConfig) -> Iterator[str]:
    training, schedule = run.training, run.scheduler
    if run.validation.skip_train:
        return
    if run.optimizer.lr is None:
        yield "lr is not given, but the optimizer needs it: write --lr, for example 3e-4."
    if training.train_iters is None and training.train_samples is None:
        yield "Neither train_iters nor train_samples is given, but a run must end: write --train-iters N."
        return
    unit, other = ("iters", "samples") if training.train_iters is not None else ("samples", "iters")
    for name in (f"lr_decay_{other}", f"lr_warmup_{other}", f"lr_wsd_decay_{other}"):
        value = getattr(schedule, name)
        if value:
            right = name.removesuffix(other) + unit
            yield (
                f"{name} is {value}, but the length of this run is given by train_{unit}: "
                f"write --{right.replace('_', '-')} instead."
            )
    decay = getattr(schedule, f"lr_decay_{unit}") or getattr(training, f"train_{unit}")
    warmup = getattr(schedule, f"lr_warmup_{unit}")
    if warmup and decay and warmup >= decay:
        yield (
            f"lr_warmup_{unit} is {warmup}, but the warm-up must end before the decay does ({decay} {unit}): "
            f"write --lr-warmup-{unit} {max(decay // 10, 1)} or --lr-decay-{unit} more than {warmup}."
        )


def _features(run: RunConfig) -> Iterator[str]:
    sizes = run.transformer
    if sizes.fp32_residual_connection and not (sizes.fp16 or sizes.bf16):
        yield "fp32_residual_connection is set, but all is computed in full precision: add --bf16 or leave it out."
    tp, granularity = sizes.tensor_model_parallel_size, sizes.recompute_granularity
    if sizes.distribute_saved_activations and (tp == 1 or granularity != "full" or sizes.sequence_parallel):
        yield (
            f"distribute_saved_activations is set with tensor_model_parallel_size {tp}, recompute_granularity "
            f"{granularity} and sequence_parallel {sizes.sequence_parallel}, but it splits what full recomputation "
            "stores over tensor ranks, as sequence parallelism does already: write --recompute-granularity full and "
            "--tensor-model-parallel-size above 1 without --sequence-parallel, or leave it out."
        )
    ranks = [rank for rank in run.profiling.profile_ranks if not 0 <= rank < run.world_size]
    if ranks:
        yield f"profile_ranks names {ranks}, but there are ranks 0 to {run.world_size - 1}: choose among these."
    yield from _positions(run)
    checkpoint = run.checkpoint
    starts_from_nothing = not (checkpoint.load or checkpoint.pretrained_checkpoint or checkpoint.load_hf)
    if not sizes.perform_initialization and starts_from_nothing and not run.dry_run:
        yield (
            "no_initialization is set, but no weights are loaded either: write --load, --pretrained-checkpoint or "
            "--load-hf, or leave it out."
        )
    if run.training.compile:
        yield from compilation_problems(run)
    if sizes.transformer_impl == "transformer_engine":
        yield from _package(run, "transformer_impl", "transformer_engine", (), "auto or local")
    if sizes.has_apex_norms:
        yield from _package(run, "norm_impl", "apex", ("fused_layer_norm_cuda",), "torch")
    if run.optimizer.adam_impl == "apex" and run.optimizer.optimizer != "sgd":
        yield from _package(run, "adam_impl", "apex", ("amp_C",), "torch")


def _package(run: RunConfig, setting: str, name: str, extensions: tuple[str, ...], otherwise: str) -> Iterator[str]:
    """What the package `name` asks for, whose modules, and `extensions`, compute what a setting says."""
    remedy = f"write --{setting.replace('_', '-')} {otherwise}"
    import torch

    if run.transformer.fp64:
        yield f"{setting} is {name} with fp64, which that package does not compute in: {remedy}."
    elif run.dry_run:
        return
    elif missing := [module for module in (name, *extensions) if importlib.util.find_spec(module) is None]:
        yield (
            f"{setting} is {name}, but that package is not installed here (there is no module {missing[-1]}): install "
            f"it, see docs/installation.md, or {remedy}."
        )
    elif not torch.cuda.is_available() or run.distributed.distributed_backend == "gloo":
        yield f"{setting} is {name}, but that package needs a GPU: {remedy}."


def _positions(run: RunConfig) -> Iterator[str]:
    """What kinds of positions ask of the layers, and the other way round."""
    sizes, kind = run.transformer, run.gpt.position_embedding_type
    width, rotated = sizes.rotary_channels, int(sizes.rotary_channels * run.gpt.rotary_percent)
    if kind in ("rope", "yarn") and (rotated < 2 or rotated % 2):
        name = "qk_pos_emb_head_dim" if sizes.multi_latent_attention else "kv_channels"
        flag = "--" + name.replace("_", "-")
        yield (
            f"rotary_percent {run.gpt.rotary_percent} of {name} {width} makes {rotated} rotated channels, but they are "
            f"rotated in pairs: choose {flag} and --rotary-percent whose product is even."
        )
    if sizes.multi_latent_attention and kind not in ("rope", "yarn"):
        yield (
            f"position_embedding_type is {kind} with multi_latent_attention, a part of whose queries and keys is there "
            "to be rotated: write --position-embedding-type rope or yarn."
        )
    others = [name for name in ("use_rope_scaling", "rotary_seq_len_interpolation_factor") if getattr(run.gpt, name)]
    stretched = sizes.multi_latent_attention and run.gpt.rotary_scaling_factor > 1.0 and run.gpt.rope_type != "rope"
    if stretched and kind == "rope" and others:
        yield (
            f"rotary_scaling_factor is {run.gpt.rotary_scaling_factor}, which means YaRN in latent attention, together "
            f"with {others[0]}, another way to stretch positions: add --rope-type rope, or leave out one."
        )
    if sizes.mtp_num_layers and kind == "learned_absolute":
        yield (
            "position_embedding_type is learned_absolute with mtp_num_layers, but multi-token prediction embeds tokens "
            "away from their positions: write --position-embedding-type rope, yarn or none."
        )
