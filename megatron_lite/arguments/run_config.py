"""RunConfig: everything one run is told, one group for each room of the house."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.checkpoint.config import CheckpointConfig
from megatron_lite.config_field import Validated
from megatron_lite.data_parallel_config import DistributedDataParallelConfig
from megatron_lite.datasets.config import DataConfig
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.optimizer.config import OptimizerConfig, SchedulerConfig
from megatron_lite.tokenizers.config import TokenizerConfig
from megatron_lite.training_config import (
    DistributedInitConfig,
    LoggerConfig,
    ProfilingConfig,
    RNGConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_lite.transformer.transformer_config import TransformerConfig


@dataclass
class RunConfig(Validated):
    """The groups of settings of one pretraining run; read-only once `arguments.validate` has accepted it.

    Attributes:
        world_size: ranks of the run: torchrun's WORLD_SIZE, or what --world-size asks a dry run to imagine.
        dry_run: describe the run instead of training.
        notices: what start-up should say about accepted flags that change nothing here.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    gpt: GPTModelConfig = field(default_factory=GPTModelConfig)
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    distributed: DistributedInitConfig = field(default_factory=DistributedInitConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    world_size: int = 1
    dry_run: bool = False
    notices: tuple[str, ...] = ()

    def groups(self) -> Iterator[tuple[str, Validated]]:
        """(attribute name, group) for each group, in the order of the attributes."""
        for described in dataclasses.fields(self):
            value = getattr(self, described.name)
            if isinstance(value, Validated):
                yield described.name, value

    def violations(self) -> list[str]:
        """The rules broken inside each group; rules between groups are in `arguments.validation`."""
        return [sentence for _, group in self.groups() for sentence in group.violations()]

    def freeze(self) -> None:
        """Refuse every later assignment, in the groups too."""
        for _, group in self.groups():
            group.freeze()
        super().freeze()

    @property
    def data_parallel_size(self) -> int:
        """Ranks left for data parallelism after tensor, pipeline and context parallelism."""
        sizes = self.transformer
        return self.world_size // (
            sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
        )

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step; by default one micro-batch on each data parallel rank."""
        asked = self.training.global_batch_size
        return asked if asked is not None else (self.training.micro_batch_size or 1) * self.data_parallel_size

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample, which validation asks for."""
        assert self.data.seq_length is not None, "seq_length is not set; validate the configuration first"
        return self.data.seq_length

    @property
    def padding(self) -> int:
        """Tokens that context and sequence parallelism lack at the end of a sample to split it evenly."""
        from megatron_lite.context_parallel import get_padding

        sizes = self.transformer
        return get_padding(
            self.sequence_length,
            sizes.context_parallel_size,
            sizes.tensor_model_parallel_size,
            sizes.sequence_parallel,
        )

    @property
    def padded_sequence_length(self) -> int:
        """Tokens of a sample as the model sees it: with --pad-to-multiple padding included."""
        return self.sequence_length + (self.padding if self.data.pad_to_multiple else 0)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The groups as plain values (numbers, text, lists), for checkpoints and logs; functions are left out."""
        import torch

        plain: dict[str, dict[str, Any]] = {}
        for name, group in self.groups():
            values = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}  # type: ignore[arg-type]
            plain[name] = {
                key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
                for key, value in values.items()
                if not callable(value)
            }
        return plain


GROUPS = tuple(
    f.name for f in dataclasses.fields(RunConfig) if isinstance(f.type, type) and issubclass(f.type, Validated)
)
