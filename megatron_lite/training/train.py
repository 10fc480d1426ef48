"""The training loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import BackgroundSaver, verify_all_replicas
from megatron_lite.num_microbatches_calculator import NumMicroBatchesCalculator
from megatron_lite.optimizer import MegatronOptimizer, OptimizerParamScheduler
from megatron_lite.pipeline_parallel import ForwardBackward
from megatron_lite.training.batches import MicroBatchStream
from megatron_lite.training.checkpointing import finish_save, save, settle
from megatron_lite.training.evaluate import evaluate
from megatron_lite.training.hooks import Hook
from megatron_lite.training.initialize import print_rank_last
from megatron_lite.training.metrics import IterationRecord, MetricsBuffer
from megatron_lite.training.non_finite import Rewind, act_on, rewind
from megatron_lite.training.progress import Progress
from megatron_lite.training.step import StepOutput, train_step
from megatron_lite.training.stopping import StopVote
from megatron_lite.training.throughput import Throughput
from megatron_lite.training.writers import Writers, console_line
from megatron_lite.transformer.moe.statistics import collect


@dataclass
class Run:
    """All parts of a run, built by `training.setup`, in the order they are used by the loop.

    The last ones are what a rewind needs: iterations whose data are left out since, and the data from another position.
    """

    config: RunConfig
    device: torch.device
    model_chunks: list[nn.Module]
    forward_backward_func: ForwardBackward
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler | None
    batch_calculator: NumMicroBatchesCalculator
    progress: Progress
    total_iterations: int
    train_stream: MicroBatchStream | None
    valid_stream: MicroBatchStream | None
    test_stream: MicroBatchStream | None
    throughput: Throughput
    writers: Writers
    metrics: MetricsBuffer
    background: BackgroundSaver | None = None
    hooks: list[Hook] = field(default_factory=list)
    unprinted: list[IterationRecord] = field(default_factory=list)
    largest_loss: float = 0.0
    left_out: set[int] = field(default_factory=set)
    open_streams: Callable[[Progress], list[MicroBatchStream | None]] = lambda progress: [None, None, None]


def train(run: Run) -> bool:
    """Train until the work is done or there is a reason to stop; evaluate, log and save on the way.

    Returns:
        Whether training stopped before its last iteration.
    """
    config, progress = run.config, run.progress
    if progress.iteration >= run.total_iterations:
        print_rank_last(f"all {run.total_iterations} iterations are done; raise --train-iters to train on")
    for chunk in run.model_chunks:
        chunk.train()
    run.metrics.restart_clock()
    saved_at = progress.iteration
    with StopVote(config.training) as vote:
        while progress.iteration < run.total_iterations:
            try:
                one_iteration(run)
                if every(config.training.check_weight_hash_across_dp_replicas_interval, progress.iteration):
                    verify_all_replicas(run.model_chunks)
                settle(run.background)
                if log_is_due(run):
                    log(run)
                if every(config.validation.eval_interval, progress.iteration) and evaluation_has_begun(run):
                    evaluate_and_log(run, f"iteration {progress.iteration}")
                reason = vote.reason(progress.iteration)
                if reason:
                    log(run)
                if config.checkpoint.save and (reason or every(config.checkpoint.save_interval, progress.iteration)):
                    save_now(run)
                    saved_at = progress.iteration
            except Rewind as found:
                saved_at = rewind(run, found)
                continue
            if reason:
                finish_save(run.background)
                print_rank_last(reason)
                return True
    if config.checkpoint.save and saved_at != progress.iteration:
        save_now(run)
    finish_save(run.background)
    return False


def one_iteration(run: Run) -> None:
    """Fetch a global batch, train on it, and keep its numbers for the next log line."""
    config, progress = run.config, run.progress
    assert run.train_stream is not None
    assert run.scheduler is not None
    for hook in run.hooks:
        hook.before_step(progress.iteration + 1)
    run.batch_calculator.update(progress.consumed_train_samples)
    global_batch_size = run.batch_calculator.current_running_global_batch_size
    batches = run.train_stream.next_global_batch(run.batch_calculator.get())
    learning_rate = run.scheduler.get_lr(progress.consumed_train_samples)
    progress.iteration += 1
    progress.consumed_train_samples += global_batch_size
    if progress.iteration not in config.training.iterations_to_skip and progress.iteration not in run.left_out:
        output = train_step(
            run.model_chunks,
            run.optimizer,
            batches,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            cp_group=parallel_state.get_context_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            forward_backward_func=run.forward_backward_func,
            per_token_loss=config.transformer.calculate_per_token_loss,
            mtp_loss_weights=config.transformer.mtp_loss_weights,
            empty_unused_memory_level=config.training.empty_unused_memory_level,
        )
        record = IterationRecord(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_train_samples,
            global_batch_size=global_batch_size,
            elapsed_ms=0.0,
            tokens=global_batch_size * run.throughput.tokens_per_sample,
            values={"learning_rate": learning_rate},
        )
        run.metrics.add(record, step_scalars(output, config, run.optimizer))
    run.scheduler.step(global_batch_size)
    for hook in run.hooks:
        hook.after_step(progress.iteration)


def step_scalars(output: StepOutput, config: RunConfig, optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """The device scalars of a step by their name in the metrics."""
    # With a dynamic loss scale an overflow is part of the method (skipped); otherwise it is an accident (nan).
    expected = config.transformer.fp16 and config.optimizer.loss_scale is None
    none = torch.zeros_like(output.found_inf)
    scalars = {
        "lm_loss": output.loss,
        "grad_norm": output.grad_norm,
        "loss_scale": output.loss_scale,
        "skipped": output.found_inf,
        "nan": none if expected else output.found_inf,
    }
    scalars |= {f"mtp_{depth}_loss": loss for depth, loss in enumerate(output.mtp_losses.unbind(), start=1)}
    if output.num_zeros is not None:
        scalars["num_zeros"] = output.num_zeros
    if config.logger.log_params_norm:
        scalars["params_norm"] = optimizer.params_norm()
    return scalars


def every(interval: int | None, iteration: int) -> bool:
    """Whether something that happens every `interval` iterations happens now."""
    return interval is not None and iteration % interval == 0


def log_is_due(run: Run) -> bool:
    """At each log interval and at the end; also after the first iteration, as a sign of life, and the second, the first
    whose time tells how long the rest will take.

    Before any evaluation or checkpoint: these read the metrics, and the statistics of an interval need a record to be
    written with.
    """
    config, iteration = run.config, run.progress.iteration
    at_end = iteration == run.total_iterations or every(config.training.exit_interval, iteration)
    return every(config.logger.log_interval, iteration) or iteration <= 2 or at_end


def read_metrics(run: Run, end_of_interval: bool = False) -> None:
    """Bring the numbers since the last reading to the host, check them, and write the files.

    At the end of a log interval the last record also gets the statistics of the experts over that interval.
    """
    records = run.metrics.flush()
    if not records:
        return
    if end_of_interval and run.config.transformer.num_moe_experts is not None:
        token_ranks = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        records[-1].experts = collect(run.model_chunks, token_ranks, parallel_state.get_pipeline_model_parallel_group())
    if run.device.type == "cuda" and run.config.logger.log_memory_to_tensorboard:
        records[-1].values["mem-allocated-bytes"] = torch.cuda.memory_allocated(run.device)
        records[-1].values["mem-reserved-bytes"] = torch.cuda.memory_reserved(run.device)
    for record in records:
        record.values["throughput"] = run.throughput.tflops(record.global_batch_size, record.elapsed_ms / 1000.0)
    run.writers.iterations(records, dist.get_world_size())
    run.unprinted += records
    check_losses(run, records)


def log(run: Run) -> None:
    """Print the log line of the interval that ends here."""
    read_metrics(run, end_of_interval=True)
    if run.unprinted:
        throughput = run.throughput if run.config.logger.log_throughput else None
        print_rank_last(console_line(run.unprinted, run.total_iterations, throughput))
        run.unprinted = []


def check_losses(run: Run, records: Sequence[IterationRecord]) -> None:
    """Act on a loss or gradient that is not a number as --on-nan says; warn of a spike, when asked to.

    Raises:
        FloatingPointError: the run stops; saying whether the update of that iteration was skipped, which a bad gradient
            norm causes.
        Rewind: the run goes back to its last checkpoint.
    """
    act_on(run, records)
    training = run.config.training
    for record in records:
        loss = record.values["lm_loss"]
        if training.check_for_spiky_loss and run.largest_loss and loss > 10 * run.largest_loss:
            print_rank_last(
                f"WARNING: iteration {record.iteration}: lm loss {loss:.6E} is more than ten times the largest "
                f"seen before ({run.largest_loss:.6E})"
            )
        if math.isfinite(loss):
            run.largest_loss = max(run.largest_loss, loss)


def evaluation_has_begun(run: Run) -> bool:
    """Whether --start-eval-at-iter has been reached."""
    start = run.config.validation.start_eval_at_iter
    return start is None or run.progress.iteration >= start


def evaluate_at_end(run: Run) -> None:
    """Evaluate on both held-out splits once training is complete."""
    evaluate_and_log(run, f"iteration {run.progress.iteration} on validation set", final=True)
    evaluate_and_log(run, f"iteration {run.progress.iteration} on test set", split="test", final=True)


def evaluate_and_log(run: Run, where: str, split: str = "validation", final: bool = False) -> None:
    """Evaluate on the validation or test split and report in Megatron's words; nothing happens without data."""
    stream = run.valid_stream if split == "validation" else run.test_stream
    iterations = run.config.validation.eval_iters
    if stream is None or iterations == 0:
        return
    read_metrics(run)
    for hook in run.hooks:
        hook.around_evaluation()
    samples_of_micro_batch = run.batch_calculator.micro_batch_size * run.config.data_parallel_size
    num_microbatches = run.config.global_batch_size // samples_of_micro_batch
    loss = evaluate(
        run.model_chunks,
        stream,
        iterations=iterations,
        num_microbatches=num_microbatches,
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        forward_backward_func=run.forward_backward_func,
        empty_unused_memory=run.config.training.empty_unused_memory_level >= 1,
    )
    if split == "validation":
        run.progress.consumed_valid_samples += iterations * num_microbatches * samples_of_micro_batch
    perplexity = math.exp(min(loss, 20.0))  # in this order NaN stays NaN
    line = f" validation loss at {where} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} | "
    print_rank_last(f"{'-' * len(line)}\n{line}\n{'-' * len(line)}")
    run.writers.validation(run.progress.iteration, run.progress.consumed_train_samples, loss, split, final)
    for hook in run.hooks:
        hook.around_evaluation()
    run.metrics.restart_clock()


def save_now(run: Run) -> None:
    """Check the numbers so far, then write a checkpoint, or with --async-save begin to."""
    assert run.scheduler is not None, "only a run that trains is saved"
    read_metrics(run)
    settle(run.background, wait=True)
    save(run.config, run.model_chunks, run.optimizer, run.scheduler, run.progress, run.background)
    run.metrics.restart_clock()


def finish(run: Run) -> None:
    """Close files, hooks and threads, after success and failure alike."""
    for hook in run.hooks:
        hook.close()
    run.writers.close()
    if run.background is not None:
        run.background.close()
