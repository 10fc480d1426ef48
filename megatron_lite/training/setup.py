"""Building the parts of a run: model, data, optimizer, and the `Run` that holds them."""

import functools
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import BackgroundSaver
from megatron_lite.datasets.builders import build_train_valid_test_datasets
from megatron_lite.datasets.data_loader import build_pretraining_data_loader
from megatron_lite.distributed import DistributedDataParallelConfig, wrap_data_parallel
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.flops import num_floating_point_operations
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.models.gpt.parameter_count import ParameterCount, count_parameters
from megatron_lite.num_microbatches_calculator import NumMicroBatchesCalculator, build_num_microbatches_calculator
from megatron_lite.optimizer import MegatronOptimizer, OptimizerParamScheduler, get_optimizer_param_scheduler
from megatron_lite.pipeline_parallel import Stage, get_forward_backward_func
from megatron_lite.tensor_parallel.parameters import initialize_parameters
from megatron_lite.tokenizers import MegatronTokenizer
from megatron_lite.training.batches import TEXT, MicroBatchStream, PositionsOnly, names_read
from megatron_lite.training.checkpointing import make_save_folder
from megatron_lite.training.hooks import Hook, build_hooks
from megatron_lite.training.initialize import print_rank_0
from megatron_lite.training.metrics import MetricsBuffer
from megatron_lite.training.progress import Progress
from megatron_lite.training.step import sum_over
from megatron_lite.training.supply import check_supply
from megatron_lite.training.throughput import Throughput, peak_tflops
from megatron_lite.training.train import Run
from megatron_lite.training.writers import Writers
from megatron_lite.transformer.fp8 import fp8_remarks
from megatron_lite.transformer.moe.moe_layer import MoELayer
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer


def build_gpt(
    transformer: TransformerConfig,
    gpt: GPTModelConfig,
    vocab_size: int,
    max_sequence_length: int,
    stage: Stage | None = None,
) -> GPTModel:
    """A GPT, or one pipeline stage of it, whose parameters have shapes and declarations but no storage yet (meta)."""
    part: dict[str, Any] = {}
    if stage is not None:
        part = {"pre_process": stage.embedding, "post_process": stage.loss, "layer_indices": stage.layers}
    with torch.device("meta"):
        return build_gpt_model(transformer, gpt, vocab_size, max_sequence_length, **part)


def build_model(
    transformer: TransformerConfig,
    gpt: GPTModelConfig,
    ddp: DistributedDataParallelConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    device: torch.device,
    seed: int,
    compile_layers: bool = False,
) -> list[nn.Module]:
    """This rank's part of a GPT, a chunk for each of its pipeline stages: built without storage, sharded, then filled.

    So no rank ever holds more than its shard, and the initial weights do not depend on the layout.
    """
    layout = transformer.pipeline_layout
    chunks: list[nn.Module] = []
    for number in layout.stages_of(parallel_state.get_pipeline_model_parallel_rank()):
        model = build_gpt(transformer, gpt, vocab_size, max_sequence_length, layout.stages[number])
        if compile_layers:
            for layer in [module for module in model.modules() if isinstance(module, TransformerLayer)]:
                compile_layer(layer)
        wrap_data_parallel(
            model, transformer, ddp, parallel_state.get_dense_mesh(), expert_mesh=parallel_state.get_expert_mesh()
        )
        model.to_empty(device=device)
        for module in model.modules():
            if hasattr(module, "reset_buffers"):
                module.reset_buffers()  # type: ignore[operator]  # a method, where there is one
        if transformer.perform_initialization:
            initialize_parameters(model, seed, on_cpu=transformer.use_cpu_initialization)
        chunks.append(model)
    return chunks


# All layers are one function to torch.compile, which by default gives up at 8 versions of one. There is a version for
# each kind of layer (with experts or not, windows, positions, fp8), for training and evaluation, and for each kind of
# shape. The limit is one of the process.
_VERSIONS_OF_A_LAYER = 64


def compile_layer(layer: TransformerLayer, backend: str = "inductor") -> None:
    """Compile a layer as one region; of one with experts, where that cannot be (MoELayer.is_one_region), the parts."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS_OF_A_LAYER)
    layer.is_compiled = True
    if not isinstance(layer.mlp, MoELayer) or layer.mlp.is_one_region:
        layer.compile(fullgraph=True, backend=backend)
        return
    layer.attend = torch.compile(layer.attend, fullgraph=True, backend=backend)  # type: ignore[method-assign]
    layer.mlp.compile_parts(backend)


def model_of(config: RunConfig, tokenizer: MegatronTokenizer, device: torch.device) -> list[nn.Module]:
    """This rank's chunks of the model of a run, announced with its number of parameters.

    Raises:
        ConfigError: the tokenizer makes ids that the model has no embedding for, or the device lacks what is asked for.
    """
    if config.gpt.vocab_size is not None and config.gpt.vocab_size < tokenizer.vocab_size:
        remedy = f"write --vocab-size {tokenizer.vocab_size}, or leave it out"
        if config.checkpoint.load_hf is not None:
            remedy = f"the weights in {config.checkpoint.load_hf} have no more; name the tokenizer that belongs to them"
        raise ConfigError(
            f"vocab_size is {config.gpt.vocab_size}, but must hold the {tokenizer.vocab_size} ids of the tokenizer: "
            f"{remedy}."
        )
    if config.transformer.attention_backend == "fused" and device.type == "cpu":
        raise ConfigError(
            "attention_backend is fused, which is cuDNN's and needs a GPU, but this run is on the CPU: write auto."
        )
    model_chunks = build_model(
        config.transformer,
        config.gpt,
        config.ddp,
        vocab_size=tokenizer.vocab_size,
        max_sequence_length=config.sequence_length,
        device=device,
        seed=config.rng.seed,
        compile_layers=bool(config.training.compile),
    )
    own = count_parameters(model_chunks, config.transformer)
    counts = torch.tensor([own.total, own.experts, own.active], device=device)
    sum_over(counts, parallel_state.get_pipeline_model_parallel_group())
    count = ParameterCount(*counts.tolist())
    ways = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
    }
    optional = ("pipeline", "context", "expert")
    shown = ", ".join(
        f"{ranks}-way {axis} parallel" for axis, ranks in ways.items() if axis not in optional or ranks > 1
    )
    active = f", {count.active:,} of them active for a token" if count.experts else ""
    print_rank_0(f" > number of parameters: {count.total:,}{active} ({shown})")
    if config.transformer.fp8 is not None:
        layers = [one for chunk in model_chunks for one in chunk.modules() if isinstance(one, TransformerLayer)]
        for remark in dict.fromkeys(remark for layer in layers for remark in fp8_remarks(layer, device)):
            print_rank_0(f"note: --fp8-format: {remark}")
    return model_chunks


def batch_calculator_of(config: RunConfig) -> NumMicroBatchesCalculator:
    """Micro-batches per step, now and after any ramp-up."""
    training = config.training
    assert training.micro_batch_size is not None, "validation asks for a micro-batch size"
    return build_num_microbatches_calculator(
        training.rampup_batch_size,
        config.global_batch_size,
        training.micro_batch_size,
        config.data_parallel_size,
        training.decrease_batch_size_if_needed,
        training.step_batch_size_schedule,
        config.sequence_length,
    )


def total_iterations(config: RunConfig, calculator: NumMicroBatchesCalculator) -> int:
    """Optimizer steps of the whole run."""
    if config.training.train_samples is not None:
        return calculator.iterations(config.training.train_samples)
    return config.training.train_iters or 0


def scheduler_of(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler | None:
    """Learning rate and weight decay as functions of consumed samples; None for a run that does not train."""
    if config.validation.skip_train:
        return None
    return get_optimizer_param_scheduler(
        optimizer,
        config.optimizer,
        config.scheduler,
        samples_of_iterations=batch_calculator_of(config).samples,
        train_iters=config.training.train_iters,
        train_samples=config.training.train_samples,
    )


def data_streams(
    config: RunConfig,
    tokenizer: MegatronTokenizer,
    model_chunks: Sequence[nn.Module],
    progress: Progress,
    iterations: int,
    device: torch.device,
) -> list[MicroBatchStream | None]:
    """Training, validation and test data, each from where `progress` says; None for a split that is empty.

    Of a sample each pipeline stage reads what it needs: tokens the first, labels the last, and those between neither.

    Raises:
        ConfigError: a split has fewer samples than the run will read.
    """
    batch, validation, calculator = config.global_batch_size, config.validation, batch_calculator_of(config)
    train_samples = config.training.train_samples or calculator.samples(iterations)
    interval = validation.eval_interval or iterations + 1
    evaluated = validation.eval_iters * batch
    # A run resumed with fewer evaluations may have read more already than it would have from the start.
    to_come = max(0, iterations // interval - progress.iteration // interval) + 1
    valid_samples = max((iterations // interval + 1) * evaluated, progress.consumed_valid_samples + to_come * evaluated)
    wanted = (train_samples, valid_samples, evaluated)
    datasets = build_train_valid_test_datasets(config.data, tokenizer, wanted, config.rng.seed)
    check_supply(config, calculator, datasets, (calculator.samples(iterations), *wanted[1:]))
    consumed = (progress.consumed_train_samples, progress.consumed_valid_samples, 0)
    training = config.training
    exit_signals = [signal.Signals[name] for name in training.exit_signal] if training.exit_signal_handler else []
    cp_group = parallel_state.get_context_parallel_group()
    padding = config.padded_sequence_length - config.sequence_length
    names, depths = names_read(model_chunks), config.transformer.mtp_num_layers or 0
    by_position = names.isdisjoint(TEXT) and not config.data.positions_depend_on_text
    streams: list[MicroBatchStream | None] = []
    for samples, start, further in zip(datasets, consumed, (depths, 0, 0), strict=True):
        dataset = PositionsOnly(samples, config.sequence_length) if samples and by_position else samples
        loader = build_pretraining_data_loader(
            dataset,
            start,
            micro_batch_size=config.training.micro_batch_size or 1,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            dataloader_type=config.data.dataloader_type or "single",
            num_workers=config.data.num_workers,
            exit_signals=exit_signals,
        )
        stream = None if loader is None else MicroBatchStream(loader, device, cp_group, padding, names, further)
        streams.append(stream)
    return streams


def check_splits(config: RunConfig, train: MicroBatchStream | None, valid: MicroBatchStream | None) -> None:
    """Say if nothing will be evaluated.

    Raises:
        ConfigError: there is nothing to train on.
    """
    if train is None and not config.validation.skip_train:
        raise ConfigError(
            f"the training split is empty: give it a share (split is {config.data.split!r}) or name --train-data-path."
        )
    if valid is None and config.validation.eval_iters > 0:
        print_rank_0("note: there are no validation data, so nothing is evaluated on them (--eval-iters 0 says so)")


def assemble(
    config: RunConfig,
    device: torch.device,
    tokenizer: MegatronTokenizer,
    model_chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler | None,
    progress: Progress,
    watchdog: Hook | None = None,
) -> Run:
    """Everything the loop needs, once weights and progress are known."""
    calculator = batch_calculator_of(config)
    iterations = total_iterations(config, calculator)
    make_save_folder(config.checkpoint.save)
    open_streams = functools.partial(
        data_streams, config, tokenizer, model_chunks, iterations=iterations, device=device
    )
    train, valid, test = open_streams(progress)
    check_splits(config, train, valid)
    is_last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    padded = model_chunks[0].padded_vocab_size
    assert isinstance(padded, int)
    trace_folder = Path(config.logger.tensorboard_dir or config.checkpoint.save or ".") / "profile"
    return Run(
        config=config,
        device=device,
        model_chunks=model_chunks,
        forward_backward_func=get_forward_backward_func(config.transformer),
        optimizer=optimizer,
        scheduler=scheduler,
        batch_calculator=calculator,
        progress=progress,
        total_iterations=iterations,
        train_stream=train,
        valid_stream=valid,
        test_stream=test,
        throughput=Throughput(
            num_floating_point_operations(config.transformer, padded, 1, config.sequence_length),
            config.sequence_length,
            config.world_size,
            peak_tflops(device),
        ),
        writers=Writers(config.logger, is_last_rank, progress.iteration + 1, config.to_dict()),
        metrics=MetricsBuffer(device),
        background=BackgroundSaver() if config.checkpoint.async_save and config.checkpoint.save else None,
        hooks=[*build_hooks(config.training, config.profiling, trace_folder), *filter(None, [watchdog])],
        open_streams=open_streams,
    )
