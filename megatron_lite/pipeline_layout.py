"""Which layers each pipeline stage holds, and which rank holds each stage, in one explicit object."""

import re
from dataclasses import dataclass

from megatron_lite.errors import ConfigError

V_SHAPED = ("zbv", "dualpipev")
"""Schedules whose stages go down the ranks and up again, so that the first rank holds the first stage and the last."""


@dataclass(frozen=True)
class Stage:
    """One stretch of the model.

    Attributes:
        layers: global indices of its transformer layers, counted from 0.
        embedding: it begins with the embedding.
        loss: it ends with the final norm, the output layer and the loss.
        mtp_layers: layers of multi-token prediction before the loss.
    """

    layers: tuple[int, ...]
    embedding: bool = False
    loss: bool = False
    mtp_layers: int = 0

    def describe(self) -> str:
        """Its contents, with layers counted from 1 as Megatron does: "embedding, layers 1 to 4"."""
        parts = ["embedding"] * self.embedding
        if self.layers:
            first, last = self.layers[0] + 1, self.layers[-1] + 1
            parts.append(f"layer {first}" if first == last else f"layers {first} to {last}")
        parts += ["multi-token prediction"] * (self.mtp_layers > 0) + ["loss"] * self.loss
        return ", ".join(parts)


@dataclass(frozen=True)
class PipelineLayout:
    """All stages in the order in which a token passes them, and where they are.

    Attributes:
        stages: each layer is in exactly one of them.
        ranks: pipeline ranks; each holds len(stages) / ranks stages, its model chunks.
        v_shaped: stages go 0, 1, ..., ranks - 1, ranks - 1, ..., 1, 0 instead of round and round.

    Raises:
        ConfigError: the stages do not partition a model, or do not fit the ranks.
    """

    stages: tuple[Stage, ...]
    ranks: int = 1
    v_shaped: bool = False

    def __post_init__(self) -> None:
        held = [layer for stage in self.stages for layer in stage.layers]
        if held != list(range(len(held))):
            raise ConfigError(f"the pipeline stages hold the layers {held}, but each must be held once, in order.")
        ends = [(stage.embedding, stage.loss) for stage in self.stages]
        last = len(self.stages) - 1
        if ends != [(number == 0, number == last) for number in range(len(self.stages))]:
            raise ConfigError("the first pipeline stage, and no other, holds the embedding, and the last one the loss.")
        empty = [number for number, stage in enumerate(self.stages) if not stage.describe()]
        if empty:
            raise ConfigError(f"the pipeline stages {empty} hold nothing: give each a layer, or take fewer stages.")
        if len(self.stages) % self.ranks or (self.v_shaped and len(self.stages) != 2 * self.ranks):
            raise ConfigError(
                f"there are {len(self.stages)} pipeline stages for {self.ranks} ranks, but each rank must hold equally "
                f"many{', in a V-shaped schedule two' if self.v_shaped else ''}."
            )

    @property
    def num_layers(self) -> int:
        """Transformer layers of the whole model."""
        return sum(len(stage.layers) for stage in self.stages)

    @property
    def stages_per_rank(self) -> int:
        """Model chunks of a rank, Megatron's virtual pipeline size."""
        return len(self.stages) // self.ranks

    def stages_of(self, rank: int) -> list[int]:
        """The numbers of the stages that a pipeline rank holds, ascending."""
        if self.v_shaped:
            return [rank, 2 * self.ranks - 1 - rank]
        return list(range(rank, len(self.stages), self.ranks))

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        return next(rank for rank in range(self.ranks) if stage in self.stages_of(rank))

    def describe(self) -> list[str]:
        """A line for each rank: what its stages hold."""
        return [
            f"pipeline rank {rank}: "
            + "; ".join(f"stage {stage} ({self.stages[stage].describe()})" for stage in self.stages_of(rank))
            for rank in range(self.ranks)
        ]


def even_layout(
    num_layers: int,
    ranks: int,
    stages_per_rank: int = 1,
    *,
    v_shaped: bool = False,
    first: int | None = None,
    last: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    mtp_num_layers: int = 0,
) -> PipelineLayout:
    """As many layers in each stage, but for the ends.

    Args:
        num_layers: of the whole model.
        ranks: pipeline ranks.
        stages_per_rank: model chunks of each.
        v_shaped: see PipelineLayout.
        first, last: layers of the first and of the last rank, where these differ from the others'.
        account_for_embedding, account_for_loss: count the embedding, or the output layer and loss, as one more layer.
        mtp_num_layers: layers of multi-token prediction, which stand in the last stage and are not counted.

    Raises:
        ConfigError: with the numbers that do not divide.
    """
    if first is None and last is None:
        sizes = _even_sizes(num_layers, ranks * stages_per_rank, account_for_embedding, account_for_loss)
    elif account_for_embedding or account_for_loss:
        raise ConfigError(
            "the embedding or the loss is counted as a layer, but so is given how many layers the first or the last "
            "rank holds (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers): keep one of the two."
        )
    elif v_shaped:
        raise ConfigError(
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers are of the first and of the "
            "last rank, but in a V-shaped schedule the first rank holds both ends: write the stages as "
            "--pipeline-model-parallel-layout instead."
        )
    else:
        sizes = _uneven_sizes(num_layers, ranks, stages_per_rank, first, last) * stages_per_rank
    begins, last_stage = [sum(sizes[:stage]) for stage in range(len(sizes))], len(sizes) - 1
    stages = tuple(
        Stage(
            tuple(range(begin, begin + size)), stage == 0, stage == last_stage, mtp_num_layers * (stage == last_stage)
        )
        for stage, (begin, size) in enumerate(zip(begins, sizes, strict=True))
    )
    return PipelineLayout(stages, ranks, v_shaped)


def _even_sizes(num_layers: int, stages: int, embedding: bool, loss: bool) -> list[int]:
    """Layers of each stage where all hold as much, embedding and loss counted in if asked for."""
    counted = num_layers + embedding + loss
    size, rest = divmod(counted, stages)
    if rest or size < 1:
        extra = " (with embedding and loss, as far as they are counted as layers)" if embedding or loss else ""
        near = ", ".join(str(n * stages - embedding - loss) for n in (size, size + 1) if n * stages > embedding + loss)
        raise ConfigError(
            f"num_layers is {num_layers}, but {counted}{extra} must be a multiple of the {stages} pipeline stages: "
            f"write --num-layers {near.replace(', ', ' or ')}, or give the ends other numbers of layers with "
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers, "
            "--account-for-embedding-in-pipeline-split, --account-for-loss-in-pipeline-split or "
            "--pipeline-model-parallel-layout."
        )
    sizes = [size] * stages
    sizes[0] -= embedding
    sizes[-1] -= loss
    return sizes


def _uneven_sizes(num_layers: int, ranks: int, chunks: int, first: int | None, last: int | None) -> list[int]:
    """Layers of each stage of one round over the ranks."""
    middle = ranks - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    each = left // middle if middle else 0
    if left < 0 or (left % middle if middle else left):
        raise ConfigError(
            f"num_layers is {num_layers}, of which the first pipeline rank holds "
            f"{'its share' if first is None else first} and the last {'its share' if last is None else last}, but the "
            f"{left} others must be shared alike by {middle} ranks: change --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers."
        )
    of_ranks = [each] * ranks
    if first is not None:
        of_ranks[0] = first
    if last is not None:
        of_ranks[-1] = last
    uneven = [size for size in of_ranks if size % chunks]
    if uneven:
        raise ConfigError(
            f"a pipeline rank holds {uneven[0]} layers, but they must be shared alike by its {chunks} model chunks: "
            "change --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers, or write the stages as "
            "--pipeline-model-parallel-layout."
        )
    return [size // chunks for size in of_ranks]


_LONGEST = 100_000


def parse_layout(
    text: str, num_layers: int, ranks: int, mtp_num_layers: int = 0, *, v_shaped: bool = False
) -> PipelineLayout:
    """Megatron's layout string, "E|(t|)*3t|tmL": E the embedding, t a layer, L the loss, | the end of a stage.

    m is a layer of multi-token prediction. These all stand before the loss, and the string may leave them out.
    `x*n` and `(...)*n` repeat; commas and spaces are for the eye. Stages go round and round over the ranks, or in a V.

    Raises:
        ConfigError: what of it is not understood, or does not fit the model or the ranks.
    """
    stages = _expand(text).split("|")
    for number, stage in enumerate(stages):
        if not re.fullmatch("E?t*(m*L)?", stage):
            rule = (
                "layers of multi-token prediction (m) stand before L in its stage"
                if "m" in stage
                else ("a stage holds E, then t's, then L")
            )
            raise ConfigError(
                f"pipeline_model_parallel_layout is {text!r}, whose stage {number} is {stage!r}, but {rule}: write for "
                f"example 'Et|(t|)*2t{'m' * ('m' in stage)}L'."
            )
    layers = sum(stage.count("t") for stage in stages)
    if layers != num_layers:
        raise ConfigError(
            f"pipeline_model_parallel_layout is {text!r}, which has {layers} layers (t), but num_layers is "
            f"{num_layers}: add or remove some."
        )
    depths = sum(stage.count("m") for stage in stages)
    if depths not in (0, mtp_num_layers):
        raise ConfigError(
            f"pipeline_model_parallel_layout is {text!r}, which has {depths} layers of multi-token prediction (m), but "
            f"mtp_num_layers is {mtp_num_layers or None}: add or remove some, or leave them out."
        )
    held = iter(range(layers))
    parsed = tuple(
        Stage(tuple(next(held) for _ in range(s.count("t"))), "E" in s, "L" in s, mtp_num_layers * ("L" in s))
        for s in stages
    )
    try:
        return PipelineLayout(parsed, ranks, v_shaped)
    except ConfigError as error:
        raise ConfigError(f"pipeline_model_parallel_layout is {text!r}: {error}") from error


def _expand(text: str) -> str:
    """The layout with its repetitions written out."""
    written = re.sub(r"[\s,]", "", text)
    repeated = re.compile(r"(?:\(([^()]*)\)|([^()|*]))\*(\d{1,6})")
    while (found := repeated.search(written)) is not None:
        what = found[1] if found[1] is not None else found[2]
        if len(what) * int(found[3]) + len(written) > _LONGEST:
            raise ConfigError(f"pipeline_model_parallel_layout is {text!r}, which is too long when written out.")
        written = written[: found.start()] + what * int(found[3]) + written[found.end() :]
    return written
