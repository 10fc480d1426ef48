"""Repeating one iteration of a run to see what happened in it: --rerun-iteration.

The run goes from its last checkpoint before that iteration, without saving or logging to files, up to the step itself.
That step is computed twice, without its update, from the same weights, data and random numbers. Bits that differ point
at the machine; values that are not finite are followed to the module where they first appear.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint.agreement import from_rank_zero, gathered
from megatron_lite.checkpoint.folders import complete_iterations
from megatron_lite.checkpoint.rng import get_rng_state, set_rng_state
from megatron_lite.distributed import finalize_model_grads
from megatron_lite.pipeline_parallel.schedules import ForwardStep, LossFunc, MicroBatch
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.training.initialize import print_rank_last
from megatron_lite.training.step import forward_backward, losses_of_all, sum_over
from megatron_lite.training.train import Run, log, one_iteration

PASSES = 2


def config_to_rerun(config: RunConfig) -> RunConfig:
    """The run up to the iteration before `rerun_iteration`: from the checkpoint to load, and with nothing written."""
    wanted, root = config.training.rerun_iteration, config.checkpoint.load
    assert wanted is not None
    there = [] if root is None else from_rank_zero("Looking for a checkpoint", lambda: complete_iterations(root))
    start = max((iteration for iteration in there if iteration < wanted), default=None)
    return dataclasses.replace(
        config,
        checkpoint=dataclasses.replace(
            config.checkpoint, load=None if start is None else root, ckpt_step=start, save=None, async_save=False
        ),
        # A compiled layer cannot be looked into.
        training=dataclasses.replace(config.training, compile=False, check_for_nan_in_loss_and_grad=False),
        validation=dataclasses.replace(config.validation, eval_iters=0),
        logger=dataclasses.replace(
            config.logger, log_interval=1, tensorboard_dir=None, wandb_project=None, metrics_jsonl=None
        ),
    )


@dataclass
class Seen:
    """What one pass over the step gave on this rank.

    Attributes:
        loss: [1 + depths] float64, means over the valid tokens of the global batch, multi-token prediction's behind.
        grad_norm: global norm before clipping, float64.
        gradients: [parameters] float64, the norm of what this rank stores of each gradient.
        samples: [micro-batches, b] mean loss of each sequence, where the model ends; else None.
    """

    loss: Tensor
    grad_norm: Tensor
    gradients: Tensor
    samples: Tensor | None

    def equals(self, other: "Seen") -> bool:
        """Bit for bit, numbers that are none included."""
        pairs = ((self.loss, other.loss), (self.grad_norm, other.grad_norm), (self.gradients, other.gradients))
        return all(torch.equal(one.view(torch.int64), two.view(torch.int64)) for one, two in pairs)


def rerun(run: Run, folder: str | Path) -> None:
    """Repeat iteration `rerun_iteration`; each rank writes what it saw to `folder`, and the last one prints a summary.

    Raises:
        FloatingPointError: the passes differ on a rank.
    """
    wanted = run.config.training.rerun_iteration
    assert wanted is not None
    assert run.train_stream is not None
    for chunk in run.model_chunks:
        chunk.train()
    while run.progress.iteration < wanted - 1:
        one_iteration(run)
        log(run)
    first_sample = run.progress.consumed_train_samples
    run.batch_calculator.update(first_sample)
    batches = run.train_stream.next_global_batch(run.batch_calculator.get())
    streams = get_rng_state()
    watch = ModuleWatch()
    passes = []
    for number in range(PASSES):
        set_rng_state(streams)
        with watch.over(run.model_chunks) if number == 0 else contextlib.nullcontext():
            passes.append(one_pass(run, batches))
    repeats = all(gathered(passes[0].equals(passes[1])))
    report = {
        "iteration": wanted,
        "rank": dist.get_rank(),
        "samples": [first_sample, first_sample + run.batch_calculator.current_running_global_batch_size - 1],
        "repeats": repeats,
        "passes": [{"loss": _plain(one.loss), "grad_norm": _plain(one.grad_norm)} for one in passes],
        "sequences": sequences(passes[0].samples, first_sample),
        "forward": watch.forward.rows(),
        "backward": watch.backward.rows(),
        "parameters": parameters(run, passes[0].gradients),
    }
    path = Path(folder) / f"rerun_{wanted:07d}_rank{dist.get_rank()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in summary(report, gathered(first_broken(report))):
        print_rank_last(line)
    print_rank_last(f" {path.parent}/rerun_{wanted:07d}_rank*.json say what each rank saw of each module")
    if not repeats:
        raise FloatingPointError(
            f"iteration {wanted} gives other numbers each time: the machine computes unreliably, or with kernels that "
            "add in another order each time, which --deterministic-mode rules out."
        )


def one_pass(run: Run, batches: Sequence[MicroBatch]) -> Seen:
    """Loss and gradients of a step, without its update."""
    cp_group = parallel_state.get_context_parallel_group()
    dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sums: list[Tensor] = []

    def recording(
        forward_step: ForwardStep,
        model_chunks: Sequence[nn.Module],
        micro_batches: Sequence[MicroBatch],
        loss_func: LossFunc,
        *,
        forward_only: bool = False,
    ) -> None:
        def record(number: int, losses: Tensor) -> Tensor:
            of_next_tokens = losses.detach().reshape(-1, *losses.shape[-2:])[0]
            tokens = micro_batches[number]["loss_mask"].sum(1)
            sums.append(torch.stack([of_next_tokens.sum(1).double(), tokens.double()]))
            return loss_func(number, losses)

        run.forward_backward_func(forward_step, model_chunks, micro_batches, record, forward_only=forward_only)

    losses, tokens = forward_backward(
        run.model_chunks,
        run.optimizer,
        list(batches),
        dp_cp_group=dp_cp_group,
        cp_group=cp_group,
        per_token_loss=run.config.transformer.calculate_per_token_loss,
        mtp_loss_weights=run.config.transformer.mtp_loss_weights,
        forward_backward_func=recording,
    )
    finalize_model_grads(run.model_chunks, parallel_state.get_tensor_model_parallel_group())
    losses, tokens = losses_of_all(losses, tokens, dp_cp_group, parallel_state.get_pipeline_model_parallel_group())
    samples = None
    if sums:
        both = torch.stack(sums, dim=1)
        sum_over(both, cp_group)
        samples = both[0] / both[1].clamp(min=1.0)
    scale = run.optimizer.get_loss_scale()
    gradients = [
        torch.zeros((), dtype=torch.float64, device=run.device)
        if parameter.grad is None
        else torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float64) / scale
        for parameter in run.optimizer.named_parameters.values()
    ]
    return Seen(losses / tokens, run.optimizer.grad_norm(), torch.stack(gradients), samples)


@dataclass
class Extremes:
    """For each module the largest magnitude among its values; in the order in which modules first had any."""

    largest: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """See a tensor; a value that is not a number is the largest of all."""
        if values.is_floating_point() and values.numel():
            found = values.detach().abs().amax().double()
            self.largest[name] = torch.maximum(self.largest[name], found) if name in self.largest else found

    def rows(self) -> list[dict[str, Any]]:
        """As JSON."""
        return [{"module": name, "largest": _plain(value)} for name, value in self.largest.items()]


class ModuleWatch:
    """Looks at what modules compute, and at the gradients of that, without waiting for the device."""

    def __init__(self) -> None:
        self.forward, self.backward = Extremes(), Extremes()

    @contextlib.contextmanager
    def over(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """Look as long as the context lasts."""
        handles = [
            module.register_forward_hook(self._hook_of(name or "model"))
            for chunk in chunks
            for name, module in chunk.named_modules()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_of(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor):
                    self.forward.add(name, tensor)
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: self.backward.add(name, gradient))

        return look


def sequences(samples: Tensor | None, first_sample: int) -> list[dict[str, Any]]:
    """Of each sequence of this rank its number in the run, counted from 0, and its mean loss."""
    if samples is None:
        return []
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    micro_batch = samples.size(1)
    return [
        {"sample": first_sample + (number * ranks + rank) * micro_batch + place, "loss": _number(loss)}
        for number, losses in enumerate(samples.tolist())
        for place, loss in enumerate(losses)
    ]


def parameters(run: Run, gradients: Tensor) -> list[dict[str, Any]]:
    """Of each parameter what this rank stores: its largest magnitude and the norm of its gradient."""
    rows = []
    for (name, parameter), norm in zip(run.optimizer.named_parameters.items(), gradients.tolist(), strict=True):
        shard = local(parameter.detach())
        largest = float(shard.abs().amax()) if shard.numel() else 0.0
        rows.append({"parameter": name, "largest": _number(largest), "gradient_norm": _number(norm)})
    return rows


# Where to look for values that are not finite, the earliest first: (list of the report, its value, in words).
_SUSPECTS = (
    ("parameters", "largest", "the parameter {parameter} holds {largest}"),
    ("forward", "largest", "the output of {module} holds {largest}, and that of no module before it"),
    ("sequences", "loss", "the loss of sample {sample} is {loss}"),
    ("backward", "largest", "the gradient of the output of {module} holds {largest}, and no gradient before it"),
    ("parameters", "gradient_norm", "the gradient of {parameter} holds {gradient_norm}"),
)


def first_broken(report: dict[str, Any]) -> str | None:
    """Where on this rank something is not finite, the earliest first; None if all is well."""
    for rows, value, words in _SUSPECTS:
        for row in report[rows]:
            if isinstance(row[value], str):
                return words.format(**row)
    return None


def summary(report: dict[str, Any], broken: Sequence[str | None]) -> Iterator[str]:
    """What a person wants to know first."""
    (first, last), seen = report["samples"], report["passes"]
    yield f" rerun of iteration {report['iteration']}, samples {first} to {last}"
    for number, one in enumerate(seen, start=1):
        yield f" pass {number}: lm loss {one['loss'][0]}, grad norm {one['grad_norm']}"
    if report["repeats"]:
        yield " the passes agree bit for bit on all ranks: this is no fault of the machine that comes and goes"
    for rank, sentence in enumerate(broken):
        if sentence is not None:
            yield f" rank {rank}: {sentence}"
    if not any(broken):
        yield " everything is finite on all ranks"


def _plain(values: Tensor) -> Any:
    numbers = values.tolist()
    return [_number(one) for one in numbers] if isinstance(numbers, list) else _number(numbers)


def _number(value: float) -> float | str:
    """JSON knows no nan and inf."""
    return value if math.isfinite(value) else str(value)
