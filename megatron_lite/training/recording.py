"""What a run computes in its first steps, recorded independently of its layout, for comparison.py."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import CheckpointError, verify_all_replicas
from megatron_lite.checkpoint.model_state import copies_of
from megatron_lite.checkpoint.replicas import fingerprint
from megatron_lite.datasets.samplers import MegatronPretrainingSampler
from megatron_lite.distributed import finalize_model_grads
from megatron_lite.models.gpt.gpt_model import WORD_EMBEDDINGS
from megatron_lite.optimizer import get_megatron_optimizer
from megatron_lite.pipeline_parallel import get_forward_backward_func
from megatron_lite.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron_lite.tokenizers import build_tokenizer
from megatron_lite.training import setup
from megatron_lite.training.batches import MicroBatch, prepare
from megatron_lite.training.checkpointing import load
from megatron_lite.training.comparison import LABELS, LOSSES, TOKENS, LayoutRecord, order_of_computation
from megatron_lite.training.initialize import print_rank_0
from megatron_lite.training.step import forward_backward, train_step
from megatron_lite.transformer.moe.statistics import is_recomputation

_RECORDED = re.compile(
    r"embedding|decoder\.layers\.\d+(\.self_attention|\.mlp)?|decoder\.final_layernorm|mtp\.layers\.\d+"
)
_PADDED = (WORD_EMBEDDINGS, "output_layer.weight", "mtp_embedding.word_embeddings.weight")


def record_run(config: RunConfig, device: torch.device, steps: int, bound: float) -> LayoutRecord | None:
    """Train `steps` steps as pretrain_gpt.py does and record them; collective, rank 0 returns the record.

    The first step is computed twice: for its gradients, and as a step.

    Args:
        config: of this layout; process groups are up.
        device: of this rank.
        steps: optimizer steps.
        bound: relative deviation between copies on several ranks from which on it is reported.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    chunks = setup.model_of(config, tokenizer, device)
    optimizer = get_megatron_optimizer(config.optimizer, chunks)
    scheduler = setup.scheduler_of(config, optimizer)
    assert scheduler is not None, "the run trains"
    progress = load(config, chunks, optimizer, scheduler)
    calculator = setup.batch_calculator_of(config)
    iterations = setup.total_iterations(config, calculator)
    stream, valid, _ = setup.data_streams(config, tokenizer, chunks, progress, iterations, device)
    setup.check_splits(config, stream, valid)
    assert stream is not None, "check_splits has said so"

    groups: dict[str, Any] = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "pp_group": parallel_state.get_pipeline_model_parallel_group(),
    }
    how: dict[str, Any] = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "cp_group": parallel_state.get_context_parallel_group(),
        "forward_backward_func": get_forward_backward_func(config.transformer),
        "per_token_loss": config.transformer.calculate_per_token_loss,
        "mtp_loss_weights": config.transformer.mtp_loss_weights,
    }
    record = LayoutRecord()
    record.initial = {
        name: int(fingerprint(tensor)) for name, tensor in _parameters(chunks, record, lambda p: p).items()
    }
    for step in range(steps):
        calculator.update(progress.consumed_train_samples)
        samples = calculator.current_running_global_batch_size
        batches = stream.next_global_batch(calculator.get())
        if step == 0:
            recorder = OutputRecorder(chunks, config, batches, _token_numbers(config, samples, len(batches), device))
            forward_backward(chunks, optimizer, batches, **how)
            finalize_model_grads(chunks, groups["tp_group"])
            recorder.remove()
            record.outputs = _gathered_outputs(recorder.parts, samples, config.sequence_length, bound, record)
            record.gradients = _parameters(chunks, record, lambda p: p.grad)
        output = train_step(chunks, optimizer, batches, **groups, **how)
        scheduler.step(samples)
        progress.consumed_train_samples += samples
        record.losses.append(output.loss.item())
        record.grad_norms.append(output.grad_norm.item())
        print_rank_0(f"step {step + 1} of {steps}: loss {record.losses[-1]:.6f}, {samples} samples")
    record.weights = _parameters(chunks, record, lambda p: p)
    _verify_replicas(chunks, record)
    return record if dist.get_rank() == 0 else None


class OutputRecorder:
    """Listens to the modules of this rank's chunks during one step.

    Attributes:
        parts: name -> (numbers of tokens int64 [t], float64 [t, k]) of each micro-batch.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], config: RunConfig, batches: Sequence[MicroBatch], numbers: Sequence[Tensor]
    ) -> None:
        """Begin to listen.

        Args:
            chunks: the model.
            config: of the run.
            batches: what the model reads next.
            numbers: of each micro-batch the numbers of its tokens, int64 [b, s / cp], -1 for padding.
        """
        self.parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._sequence_parallel = config.transformer.sequence_parallel
        # Each pipeline stage sees the micro-batches in order, but stages not at the same time.
        self._coming = {chunk: iter(numbers) for chunk in chunks}
        self._current = torch.empty(0, dtype=torch.int64)
        self._seen: set[str] = set()
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(config.transformer.hidden_size, dtype=torch.float64, generator=generator)
        self._direction = direction.to(numbers[0].device)
        for batch, own in zip(batches, numbers, strict=True):
            self._add_data(TOKENS, own, batch.get("tokens"), batch["position_ids"])
            self._add_data(LABELS, own, batch.get("labels"), batch.get("loss_mask"))
        self._hooks = [chunk.register_forward_pre_hook(self._next_micro_batch) for chunk in chunks]
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if _RECORDED.fullmatch(name):
                    self._hooks.append(module.register_forward_hook(self._hidden_states(name)))
            if chunk.post_process:
                self._hooks.append(chunk.register_forward_hook(self._losses))

    def remove(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def _next_micro_batch(self, chunk: nn.Module, inputs: Any) -> None:
        self._current = next(self._coming[chunk])
        self._seen = set()

    def _hidden_states(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """A hook for a module whose output is [s, b, h]."""

        @torch.no_grad()
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # Multi-token prediction embeds tokens again, which are in other places then.
            if is_recomputation() or name in self._seen:
                return
            self._seen.add(name)
            numbers = self._current.t()
            if self._sequence_parallel:
                numbers = scatter_to_sequence_parallel_region(numbers.contiguous())
            hidden = output.double()
            values = torch.stack([hidden.norm(dim=-1), hidden @ self._direction], dim=-1)
            self._add(name, numbers, values)

        return hook

    @torch.no_grad()
    def _losses(self, chunk: nn.Module, inputs: Any, output: Tensor) -> None:
        of_depths = output if output.dim() == 3 else output.unsqueeze(0)
        self._add(LOSSES, self._current, of_depths.double().movedim(0, -1))

    def _add_data(self, name: str, numbers: Tensor, *tensors: Tensor | None) -> None:
        read = [tensor.double() for tensor in tensors if tensor is not None]
        if len(read) == len(tensors):
            self._add(name, numbers, torch.stack(read, dim=-1))

    def _add(self, name: str, numbers: Tensor, values: Tensor) -> None:
        """`numbers` of any shape, `values` of one dimension more."""
        flat = numbers.flatten()
        real = flat >= 0
        self.parts.setdefault(name, []).append((flat[real].cpu(), values.flatten(0, -2)[real].cpu()))


def _token_numbers(config: RunConfig, samples: int, num_microbatches: int, device: torch.device) -> list[Tensor]:
    """Which tokens of the global batch each micro-batch of this rank holds.

    Returns:
        int64 [b, s / cp] for each: sample number * sequence length + position; -1 for padding. Split as the data are.
    """
    size, length = config.training.micro_batch_size or 1, config.sequence_length
    position = (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    padding = config.padded_sequence_length - length
    found = []
    for own in MegatronPretrainingSampler(samples, 0, size, *position):
        numbers = torch.tensor(own)[:, None] * length + torch.arange(length)
        # Padding is filled with zeros, so numbers count from 1 meanwhile.
        split = prepare({"numbers": numbers + 1}, parallel_state.get_context_parallel_group(), padding)
        found.append((split["numbers"] - 1).to(device))
    assert len(found) == num_microbatches, f"{len(found)} micro-batches are numbered, {num_microbatches} are read"
    return found


def _gathered(mine: Any) -> list[Any]:
    """What each rank has, on rank 0; elsewhere an empty list. Collective over the world."""
    ranks = dist.get_world_size()
    gathered: list[Any] | None = [None] * ranks if dist.get_rank() == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    return gathered or []


def _gathered_outputs(
    parts: Mapping[str, Any], samples: int, length: int, bound: float, record: LayoutRecord
) -> dict[str, Tensor]:
    """Collective; rank 0 returns the whole of each output, and notes in `record` which copies differ."""
    outputs = {}
    gathered = _gathered(parts)
    for name in sorted({name for of_rank in gathered for name in of_rank}, key=order_of_computation):
        pieces = [piece for of_rank in gathered for piece in of_rank.get(name, ())]
        outputs[name], apart = put_together(pieces, samples, length)
        if not apart <= bound:
            record.unequal.append(f"ranks that compute the same output of {name} differ by {apart:.1e}")
    return outputs


def put_together(pieces: Sequence[tuple[Tensor, Tensor]], samples: int, length: int) -> tuple[Tensor, float]:
    """The whole of an output from pieces, which may hold a token several times.

    Args:
        pieces: (numbers of tokens int64 [t], float64 [t, k]) each.
        samples, length: number of sequences, and tokens of each.

    Returns:
        float64 [samples, length, k], NaN where no piece has a token; and the largest difference between pieces that
        have the same token, relative to the largest value.
    """
    columns = pieces[0][1].size(-1)
    whole = torch.full((samples * length, columns), math.nan, dtype=torch.float64)
    apart, largest = 0.0, 0.0
    for numbers, values in pieces:
        there = whole[numbers]
        known = ~there.isnan().all(dim=-1)
        if known.any():
            difference = (there - values)[known].abs().max().item()
            apart = max(apart, math.inf if math.isnan(difference) else difference)
        if numbers.numel():
            largest = max(largest, values.abs().max().item())
        whole[numbers] = values
    return whole.view(samples, length, columns), apart / largest if apart else 0.0


def _parameters(
    chunks: Sequence[nn.Module], record: LayoutRecord, get: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, Tensor]:
    """A tensor of each parameter, whole, by name, on rank 0. Collective.

    Rows of the vocabulary's padding, whose number depends on the tensor parallel size, are left out.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    kept = pipeline is None or 0 in dist.get_process_group_ranks(pipeline)
    own: dict[str, Tensor] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            tensor = get(parameter)
            if tensor is None:
                continue
            whole = tensor.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if kept:
                own[name] = (whole[: chunk.vocab_size] if name in _PADDED else whole).cpu().clone()  # type: ignore[index]
    gathered = _gathered((own, copies_of(chunks) if kept else {}))
    found = {name: tensor for tensors, _ in gathered for name, tensor in tensors.items()}
    for name, original in {name: original for _, copies in gathered for name, original in copies.items()}.items():
        if not torch.equal(found.pop(name), found[original]):
            record.unequal.append(f"{name} is a copy of {original} in another pipeline stage, but they differ")
    return found


def _verify_replicas(chunks: list[nn.Module], record: LayoutRecord) -> None:
    """Note in `record` which parameters are not bit-equal on ranks that hold copies of them. Collective."""
    try:
        verify_all_replicas(chunks)
    except CheckpointError as error:
        record.unequal.append(str(error))
