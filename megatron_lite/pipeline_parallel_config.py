"""PipelineConfig: the knobs of pipeline parallelism. MoEConfig and TransformerConfig extend it."""

from dataclasses import dataclass

from megatron_lite.config_field import knob
from megatron_lite.errors import ConfigError
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.pipeline_layout import V_SHAPED, PipelineLayout, even_layout, parse_layout

SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved-zero-bubble", "zbv", "dualpipev")
SPLIT_BACKWARD = ("interleaved-zero-bubble", *V_SHAPED)
"""Schedules that compute the gradients of weights later than those of activations, where a rank would idle."""


@dataclass
class PipelineConfig(ModelParallelConfig):
    """How layers are split into stages, and in which order the stages work. Names and defaults are Megatron's."""

    num_layers: int = knob(0, "Number of transformer layers.")
    mtp_num_layers: int | None = knob(
        None, "Multi-token prediction: so many tokens more are predicted, each with a layer behind the last."
    )
    pipeline_schedule: str | None = knob(
        None,
        "In which order stages work on micro-batches; default 1f1b, or interleaved with several chunks a rank.",
        choices=SCHEDULES,
    )
    num_layers_per_virtual_pipeline_stage: int | None = knob(
        None, "Layers of each of the model chunks that a pipeline rank holds several of."
    )
    num_virtual_stages_per_pipeline_rank: int | None = knob(None, "Model chunks of a pipeline rank; see the above.")
    num_layers_in_first_pipeline_stage: int | None = knob(
        None,
        "Layers of the first pipeline rank, if not as the others.",
        flag="--decoder-first-pipeline-num-layers",
    )
    num_layers_in_last_pipeline_stage: int | None = knob(
        None,
        "Layers of the last pipeline rank, if not as the others.",
        flag="--decoder-last-pipeline-num-layers",
    )
    account_for_embedding_in_pipeline_split: bool = knob(False, "Count the embedding as a layer of the first stage.")
    account_for_loss_in_pipeline_split: bool = knob(False, "Count output layer and loss as a layer of the last stage.")
    pipeline_model_parallel_layout: str | None = knob(
        None,
        "All stages, as 'Et*3|(t|)*2tmL': E embedding, t layer, m layer of multi-token prediction, L loss, | ends a "
        "stage; x*n and (...)*n repeat.",
    )

    @property
    def chunks_per_rank(self) -> int:
        """Stages that each pipeline rank holds; 0 where the flags contradict each other."""
        given = [self._chunks_by_layers(), self.num_virtual_stages_per_pipeline_rank, self._chunks_by_layout()]
        if self.pipeline_schedule in V_SHAPED:
            given.append(2)
        sizes = {size for size in given if size is not None}
        if not sizes:
            return self.virtual_pipeline_model_parallel_size or 1
        return sizes.pop() if len(sizes) == 1 else 0

    def _chunks_by_layers(self) -> int | None:
        layers, pp = self.num_layers_per_virtual_pipeline_stage, self.pipeline_model_parallel_size
        if layers is None or layers < 1 or pp < 1:
            return None
        counted = self.num_layers + self.account_for_embedding_in_pipeline_split
        counted += self.account_for_loss_in_pipeline_split
        return counted // (layers * pp) if counted % (layers * pp) == 0 else 0

    def _chunks_by_layout(self) -> int | None:
        text, pp = self.pipeline_model_parallel_layout, self.pipeline_model_parallel_size
        if text is None or pp < 1:
            return None
        try:
            return len(parse_layout(text, self.num_layers, 1, self.mtp_num_layers or 0).stages) // pp or None
        except ConfigError:
            return None

    @property
    def schedule(self) -> str:
        """The schedule, or the default for the number of chunks."""
        if self.pipeline_schedule is not None:
            return self.pipeline_schedule
        return "interleaved" if self.chunks_per_rank > 1 else "1f1b"

    @property
    def pipeline_layout(self) -> PipelineLayout:
        """Which stage holds what, and where it is.

        Raises:
            ConfigError: the layers do not split so.
        """
        v_shaped, pp = self.schedule in V_SHAPED, self.pipeline_model_parallel_size
        if self.pipeline_model_parallel_layout is not None:
            text, depths = self.pipeline_model_parallel_layout, self.mtp_num_layers or 0
            return parse_layout(text, self.num_layers, pp, depths, v_shaped=v_shaped)
        return even_layout(
            self.num_layers,
            pp,
            max(self.chunks_per_rank, 1),
            v_shaped=v_shaped,
            first=self.num_layers_in_first_pipeline_stage,
            last=self.num_layers_in_last_pipeline_stage,
            account_for_embedding=self.account_for_embedding_in_pipeline_split,
            account_for_loss=self.account_for_loss_in_pipeline_split,
            mtp_num_layers=self.mtp_num_layers or 0,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pipeline_model_parallel_size > 1 and self.chunks_per_rank > 1:
            self.virtual_pipeline_model_parallel_size = self.chunks_per_rank

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        found = super().violations()
        pp = self.pipeline_model_parallel_size
        counts = {
            "--num-layers-per-virtual-pipeline-stage": self.num_layers_per_virtual_pipeline_stage,
            "--num-virtual-stages-per-pipeline-rank": self.num_virtual_stages_per_pipeline_rank,
            "--decoder-first-pipeline-num-layers": self.num_layers_in_first_pipeline_stage,
            "--decoder-last-pipeline-num-layers": self.num_layers_in_last_pipeline_stage,
        }
        found += [
            f"{flag} is {value}, but must be at least 1: leave it out for the default."
            for flag, value in counts.items()
            if value is not None and value < 1
        ]
        if self.mtp_num_layers is not None and self.mtp_num_layers < 1:
            found.append(f"mtp_num_layers is {self.mtp_num_layers}, but must be at least 1: leave it out for none.")
        if found or pp < 1:
            return found
        if pp == 1:
            return found + self._without_pipeline(counts)
        if self.num_layers < 1:
            return found  # reported as missing elsewhere
        ends = {
            "--account-for-embedding-in-pipeline-split": self.account_for_embedding_in_pipeline_split,
            "--account-for-loss-in-pipeline-split": self.account_for_loss_in_pipeline_split,
        }
        given = [flag for flag, value in {**counts, **ends}.items() if value]
        uneven = self.num_layers_in_first_pipeline_stage or self.num_layers_in_last_pipeline_stage
        if self.pipeline_model_parallel_layout is not None and given:
            found.append(
                f"--pipeline-model-parallel-layout describes all stages, so {', '.join(given)} must be left out."
            )
        elif self.num_layers_per_virtual_pipeline_stage is not None and uneven:
            found.append(
                "--num-layers-per-virtual-pipeline-stage says that all model chunks have "
                f"{self.num_layers_per_virtual_pipeline_stage} layers, but the first or the last pipeline rank holds "
                "another number: write --num-virtual-stages-per-pipeline-rank instead."
            )
        elif self.chunks_per_rank == 0:
            found.append(self._contradiction())
        elif self.schedule == "1f1b" and self.chunks_per_rank > 1:
            found.append(
                f"pipeline_schedule is 1f1b, but each rank has {self.chunks_per_rank} model chunks: write "
                "--pipeline-schedule interleaved, or leave out what asks for chunks."
            )
        elif self.schedule == "interleaved" and self.chunks_per_rank == 1:
            found.append(
                "pipeline_schedule is interleaved, but each rank has one model chunk: write "
                "--num-virtual-stages-per-pipeline-rank 2 or more, or --pipeline-schedule 1f1b."
            )
        else:
            try:
                layout = self.pipeline_layout
                assert layout.num_layers == self.num_layers, "the stages hold all layers"
            except ConfigError as error:
                found.append(str(error))
        return found

    def _without_pipeline(self, counts: dict[str, int | None]) -> list[str]:
        given = [flag for flag, value in counts.items() if value]
        if self.pipeline_schedule is not None:
            given.append("--pipeline-schedule")
        if self.pipeline_model_parallel_layout is not None:
            given.append("--pipeline-model-parallel-layout")
        if not given:
            return []
        return [
            f"{' and '.join(given)} split{'s' if len(given) == 1 else ''} layers into pipeline stages, but "
            "pipeline_model_parallel_size is 1: write --pipeline-model-parallel-size 2 or more, or leave it out."
        ]

    def _contradiction(self) -> str:
        layers, chunks = self.num_layers_per_virtual_pipeline_stage, self.num_virtual_stages_per_pipeline_rank
        pp = self.pipeline_model_parallel_size
        if layers is not None and self._chunks_by_layers() == 0:
            return (
                f"num_layers_per_virtual_pipeline_stage is {layers}, but {layers} x {pp} pipeline ranks must divide "
                f"num_layers ({self.num_layers}): write --num-virtual-stages-per-pipeline-rank N, or another number."
            )
        if self.schedule in V_SHAPED:
            return (
                f"pipeline_schedule is {self.schedule}, whose ranks hold 2 model chunks each, but other flags ask for "
                "another number: leave out --num-layers-per-virtual-pipeline-stage and "
                "--num-virtual-stages-per-pipeline-rank, or give the layout twice as many stages as ranks."
            )
        return (
            f"num_layers_per_virtual_pipeline_stage is {layers} and num_virtual_stages_per_pipeline_rank is {chunks}, "
            "which ask for different numbers of model chunks: keep one of the two."
        )
