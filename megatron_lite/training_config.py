"""The knobs of the training loop, evaluation, logging, random numbers, profiling and process group start-up."""

from dataclasses import dataclass

from megatron_lite.config_field import Validated, knob

EXIT_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


def _not_positive(config: object, *names: str) -> list[str]:
    """A sentence for each named field whose value is set and is not a positive number."""
    found = []
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            flag = "--" + name.replace("_", "-")
            found.append(f"{name} is {value}, but must be positive: write {flag} 1 or more, or leave it out.")
    return found


@dataclass
class TrainingConfig(Validated):
    """How much to train, in which batches, and when to stop."""

    micro_batch_size: int | None = knob(None, "Sequences per forward pass of one data parallel rank.")
    global_batch_size: int | None = knob(
        None, "Sequences per optimizer step over all ranks; the default is micro-batch size x data parallel size."
    )
    rampup_batch_size: list[int] | None = knob(
        None,
        "Grow the global batch: START INCREMENT SAMPLES, so many equal steps over SAMPLES up to --global-batch-size.",
        metavar="N",
    )
    step_batch_size_schedule: str | None = knob(
        None, 'Global batch size from given token counts on, for example "0:16 2.4B:320 4.8B:640".'
    )
    decrease_batch_size_if_needed: bool = knob(
        False, "Round a ramped global batch size down to what the data parallel size can divide."
    )
    train_iters: int | None = knob(None, "Optimizer steps to train; give this or --train-samples.")
    train_samples: int | None = knob(None, "Sequences to train on; give this or --train-iters.")
    exit_interval: int | None = knob(None, "Save and exit when the iteration is a multiple of this.")
    exit_duration_in_mins: int | None = knob(None, "Save and exit after this many minutes.")
    exit_signal_handler: bool = knob(False, "Save and exit when any rank receives --exit-signal.")
    exit_signal: list[str] = knob(
        ["SIGTERM", "SIGUSR1"],
        "The signals that --exit-signal-handler waits for.",
        choices=EXIT_SIGNALS,
        metavar="SIGNAL",
    )
    check_for_nan_in_loss_and_grad: bool = knob(True, "Stop when a loss or gradient norm is NaN or infinite.")
    on_nan: str = knob(
        "stop",
        "What to do then: stop, skip (go on; the update is left out where the gradient is bad), or rewind to the last "
        "checkpoint of --save and leave the data of that iteration out.",
        choices=("stop", "skip", "rewind"),
    )
    check_weight_hash_across_dp_replicas_interval: int | None = knob(
        None,
        "Iterations between comparisons of what several ranks hold a copy of; the run stops where copies differ. "
        "Without it they are compared at each save, which warns.",
    )
    check_for_spiky_loss: bool = knob(False, "Warn when the loss exceeds ten times the largest seen so far.")
    manual_gc: bool = knob(False, "Collect Python garbage on all ranks at the same steps instead of whenever.")
    manual_gc_interval: int = knob(0, "Iterations between collections under --manual-gc; 0 collects at eval only.")
    manual_gc_eval: bool = knob(True, "Collect garbage around evaluation under --manual-gc.")
    iterations_to_skip: list[int] = knob([], "Iterations whose data are read but not trained on.", metavar="N")
    rerun_iteration: int | None = knob(
        None,
        "For diagnosis: go from the last checkpoint of --load before this iteration up to it, compute it twice without "
        "its update, write down what each module saw, and end.",
        metavar="N",
    )
    compile: bool | None = knob(
        None, "Compile each transformer layer with torch.compile; default: on a GPU, where the other settings allow it."
    )
    empty_unused_memory_level: int = knob(
        0,
        "Give cached GPU memory back: 1 after each backward pass and evaluation step, 2 also after each update. The "
        "host waits for the GPU each time.",
        choices=(0, 1, 2),
    )

    def violations(self) -> list[str]:
        """Every broken rule of this group, one sentence each."""
        found = super().violations()
        found += _not_positive(
            self,
            "micro_batch_size",
            "global_batch_size",
            "train_iters",
            "train_samples",
            "exit_interval",
            "exit_duration_in_mins",
            "rerun_iteration",
            "check_weight_hash_across_dp_replicas_interval",
        )
        if min(self.iterations_to_skip, default=1) < 1:
            found.append(
                f"iterations_to_skip is {self.iterations_to_skip}, but iterations count from 1: write 1 or more."
            )
        if self.micro_batch_size is None:
            found.append("micro_batch_size is not given, but a step needs it: write --micro-batch-size N.")
        if self.train_iters is not None and self.train_samples is not None:
            found.append(
                f"train_iters is {self.train_iters} and train_samples is {self.train_samples}, but only one of them "
                "can say when to stop: leave out --train-iters or --train-samples."
            )
        if self.rampup_batch_size is not None and self.step_batch_size_schedule is not None:
            found.append(
                "rampup_batch_size and step_batch_size_schedule are both given, but one batch size schedule is "
                "enough: leave out --rampup-batch-size or --step-batch-size-schedule."
            )
        if self.rampup_batch_size is not None and len(self.rampup_batch_size) != 3:
            found.append(
                f"rampup_batch_size is {self.rampup_batch_size}, but must be three integers: "
                "--rampup-batch-size START INCREMENT SAMPLES."
            )
        if self.manual_gc_interval < 0:
            found.append(f"manual_gc_interval is {self.manual_gc_interval}, but must be 0 (never) or more.")
        return found


@dataclass
class ValidationConfig(Validated):
    """When and for how long to evaluate on held-out data."""

    eval_iters: int = knob(100, "Batches per evaluation; 0 turns evaluation off.")
    eval_interval: int | None = knob(None, "Iterations between evaluations; the default evaluates at the end only.")
    start_eval_at_iter: int | None = knob(None, "Skip evaluations before this iteration.")
    skip_train: bool = knob(False, "Load, evaluate and exit without training.")

    def violations(self) -> list[str]:
        """Every broken rule of this group, one sentence each."""
        found = super().violations() + _not_positive(self, "eval_interval")
        if self.eval_iters < 0:
            found.append(f"eval_iters is {self.eval_iters}, but must be 0 (no evaluation) or more.")
        return found


@dataclass
class LoggerConfig(Validated):
    """What is written where: the log line, TensorBoard, wandb, metrics files."""

    log_interval: int = knob(100, "Iterations between log lines.")
    log_throughput: bool = knob(False, "Add TFLOP/s per GPU, MFU and tokens/s to the log line.")
    log_params_norm: bool = knob(False, "Log the L2 norm of all parameters.")
    tensorboard_dir: str | None = knob(None, "Folder for TensorBoard event files; none are written without it.")
    tensorboard_log_interval: int = knob(1, "Iterations between TensorBoard points.")
    tensorboard_queue_size: int = knob(1000, "Events TensorBoard may hold before it writes them.")
    log_loss_scale_to_tensorboard: bool = knob(True, "Write the loss scale to TensorBoard.")
    log_validation_ppl_to_tensorboard: bool = knob(False, "Write validation perplexity to TensorBoard.")
    log_memory_to_tensorboard: bool = knob(False, "Write allocated and reserved memory to TensorBoard.")
    log_world_size_to_tensorboard: bool = knob(False, "Write the number of ranks to TensorBoard.")
    wandb_project: str | None = knob(None, "wandb project; nothing is sent to wandb without it.")
    wandb_exp_name: str | None = knob(None, "wandb name of this run.")
    wandb_entity: str | None = knob(None, "wandb user or team that owns the run.")
    wandb_save_dir: str | None = knob(None, "Folder for wandb's local files.")
    metrics_jsonl: str | None = knob(
        None, "File that receives one JSON object an iteration, at full precision (null: not finite).", metavar="FILE"
    )

    def violations(self) -> list[str]:
        """Every broken rule of this group, one sentence each."""
        found = super().violations()
        found += _not_positive(self, "log_interval", "tensorboard_log_interval", "tensorboard_queue_size")
        if self.wandb_project is not None and not self.wandb_exp_name:
            found.append("wandb_project is given without a name for the run: write --wandb-exp-name NAME.")
        return found


@dataclass
class RNGConfig(Validated):
    """Random numbers."""

    seed: int = knob(1234, "Seed of initial weights, data order and dropout.")

    def violations(self) -> list[str]:
        """Every broken rule of this group, one sentence each."""
        found = super().violations()
        if not 0 <= self.seed < 2**32:
            found.append(f"seed is {self.seed}, but must be 0 or more, and below 2^32 = {2**32}.")
        return found


@dataclass
class ProfilingConfig(Validated):
    """Profiling of a few iterations, and memory snapshots."""

    profile: bool = knob(False, "Profile iterations --profile-step-start to --profile-step-end.")
    profile_step_start: int = knob(10, "First profiled iteration.")
    profile_step_end: int = knob(12, "Iteration before which profiling stops.")
    profile_ranks: list[int] = knob([], "Ranks that are profiled; rank 0 if none is named.", metavar="RANK")
    use_pytorch_profiler: bool = knob(
        False, "Profile with torch.profiler instead of marking a range for nsys; always so without CUDA."
    )
    pytorch_profiler_collect_shapes: bool = knob(False, "Record tensor shapes in the torch.profiler trace.")
    pytorch_profiler_collect_callstack: bool = knob(False, "Record Python stacks in the torch.profiler trace.")
    record_memory_history: bool = knob(
        False, "Record CUDA allocations, the last 100,000 events, and write a snapshot when profiling ends."
    )
    memory_snapshot_path: str = knob("snapshot.pickle", "File of the memory snapshot.")

    def violations(self) -> list[str]:
        """Every broken rule of this group, one sentence each."""
        found = super().violations()
        if self.profile and not 0 <= self.profile_step_start < self.profile_step_end:
            found.append(
                f"profile_step_start is {self.profile_step_start} and profile_step_end is {self.profile_step_end}, "
                "but the start must be at least 0 and before the end: write, for example, "
                f"--profile-step-end {max(self.profile_step_start, 0) + 2}."
            )
        return found


@dataclass
class DistributedInitConfig(Validated):
    """How torch.distributed is started and ranks are ordered."""

    distributed_backend: str | None = knob(
        None,
        "Communication library: nccl for GPUs, gloo for the CPU; default: nccl with CUDA. cuda:gloo computes on GPUs "
        "and communicates by gloo, with several ranks on one GPU if need be, to try things out.",
        choices=("nccl", "gloo", "cuda:gloo"),
    )
    distributed_timeout_minutes: int = knob(10, "Minutes after which a collective that does not finish is an error.")
    use_tp_pp_dp_mapping: bool = knob(
        False, "Order ranks tp-cp-ep-pp-dp instead of tp-cp-ep-dp-pp, so that pipeline neighbours are close."
    )

    @property
    def order(self) -> str:
        """Order of the parallel dimensions over the ranks, the first varying fastest."""
        return "tp-cp-ep-pp-dp" if self.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"

    def violations(self) -> list[str]:
        """Every broken rule of this group, one sentence each."""
        return super().violations() + _not_positive(self, "distributed_timeout_minutes")
