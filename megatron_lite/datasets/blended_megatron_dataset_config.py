"""What every dataset built by BlendedMegatronDatasetBuilder is told."""

from dataclasses import dataclass, field
from typing import Any

from megatron_lite.datasets.utils import (
    Blend,
    Split,
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron_lite.errors import ConfigError


@dataclass
class BlendedMegatronDatasetConfig:
    """Which files, which order and how long; the sample order is a function of these and of the files alone.

    Attributes:
        random_seed: seed of every shuffle.
        sequence_length: tokens a sample offers to the model.
        blend: prefixes and their weights; without weights, the datasets' own sizes decide.
        blend_per_split: one such pair (or None) for each of train, valid and test, instead of `blend` and `split`.
        split: shares of train, valid and test in the files of `blend`, such as "969,30,1".
        split_matrix: begin and end of each split as fractions, derived from `split`.
        num_dataset_builder_threads: datasets of a blend that are built at the same time.
        path_to_cache: folder of the cached indices; by default one beside the data.
        mmap_bin_files: map the .bin files into memory.
        mock: nothing to read was named, so samples are made up; derived.
        tokenizer: gives the special tokens, and a description that is part of the cache's name.
        mid_level_dataset_surplus: share of samples built beyond what each dataset of a weighted blend is asked for.
        allow_ambiguous_pad_tokens: believe a pad id that is also the id of another special token, so that each
            occurrence of that token is masked. Otherwise such a pad id is ignored.
    """

    random_seed: int
    sequence_length: int
    blend: Blend | None = None
    blend_per_split: list[Blend | None] | None = None
    split: str | None = None
    split_matrix: list[tuple[float, float] | None] | None = field(init=False, default=None)
    num_dataset_builder_threads: int = 1
    path_to_cache: str | None = None
    mmap_bin_files: bool = True
    mock: bool = field(init=False, default=False)
    tokenizer: Any = None
    mid_level_dataset_surplus: float = 0.005
    allow_ambiguous_pad_tokens: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ConfigError(f"sequence_length is {self.sequence_length}; it must be at least 1.")
        if self.blend_per_split is not None and any(self.blend_per_split):
            self._check_blend_per_split()
            return
        if self.blend is not None:
            if self.split is None:
                raise ConfigError("A blend needs a split; write for example split='969,30,1'.")
            _check_blend(self.blend)
        else:
            self.mock = True
            self.split = "1,1,1"
        assert self.split is not None
        self.split_matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(self.split))

    def _check_blend_per_split(self) -> None:
        assert self.blend_per_split is not None
        if self.blend is not None or self.split is not None:
            raise ConfigError(
                "blend_per_split names the files of each split, so blend and split must not be given too; drop either."
            )
        if len(self.blend_per_split) != len(Split):
            raise ConfigError(
                f"blend_per_split has {len(self.blend_per_split)} entries; it needs one for each of train, valid and "
                "test, None for a split without data."
            )
        for blend in self.blend_per_split:
            if blend is not None:
                _check_blend(blend)


def _check_blend(blend: Blend) -> None:
    prefixes, weights = blend
    if weights is None:
        return
    if len(weights) != len(prefixes):
        raise ConfigError(f"A blend of {len(prefixes)} datasets has {len(weights)} weights; give each dataset one.")
    if min(weights) <= 0.0:
        raise ConfigError(f"The weights of a blend must be positive, got {weights}; leave out datasets of weight 0.")
