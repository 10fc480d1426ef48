"""From prefixes, weights and split shares to the train, valid and test datasets."""

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from megatron_lite.datasets.blended_dataset import BlendedDataset
from megatron_lite.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron_lite.datasets.megatron_dataset import MegatronDataset
from megatron_lite.datasets.utils import Blend, Split, normalize
from megatron_lite.errors import ConfigError

TopLevelDataset = BlendedDataset | MegatronDataset


class BlendedMegatronDatasetBuilder:
    """Builds the dataset of each split as Megatron does.

    Rank 0 goes first, then the others, which find its indices in the cache where they see the same folder and build
    their own where they do not. Without torch.distributed there is one process and no waiting.

    Args:
        cls: class of the datasets to blend, such as GPTDataset.
        sizes: samples wanted of train, valid and test; None for one epoch.
        is_built_on_rank: whether this process needs the datasets.
        config: see BlendedMegatronDatasetConfig.
    """

    def __init__(
        self,
        cls: type[MegatronDataset],
        sizes: Sequence[int | None],
        is_built_on_rank: Callable[[], bool],
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        if len(sizes) != len(Split):
            raise ConfigError(f"sizes has {len(sizes)} entries; it needs one for each of train, valid and test.")
        self.cls = cls
        self.sizes = list(sizes)
        self.is_built_on_rank = is_built_on_rank
        self.config = config

    def build(self) -> list[TopLevelDataset | None]:
        """The datasets of train, valid and test; None for a split without data and on ranks that need none.

        Collective over all ranks if torch.distributed is initialized.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        goes_first = not distributed or torch.distributed.get_rank() == 0
        datasets: list[TopLevelDataset | None] = [None] * len(Split)
        if goes_first and self.is_built_on_rank():
            datasets = self._build_splits()
        if distributed:
            # Under NCCL a barrier is on a GPU, which torch guesses by the rank where nobody names it.
            on_gpu = torch.distributed.get_backend() == "nccl"
            torch.distributed.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)
        if not goes_first and self.is_built_on_rank():
            datasets = self._build_splits()
        return datasets

    def _build_splits(self) -> list[TopLevelDataset | None]:
        config = self.config
        if config.blend_per_split is not None and any(config.blend_per_split):
            return [self._build_from_own_blend(split, config.blend_per_split[split.value]) for split in Split]
        assert config.split_matrix is not None
        if config.mock:
            return list(self._build_megatron_datasets(None, config.split_matrix, self.sizes))
        assert config.blend is not None
        prefixes, weights = config.blend
        if len(prefixes) == 1 and weights is None:
            return list(self._build_megatron_datasets(prefixes[0], config.split_matrix, self.sizes))
        return self._build_blends(config.blend, config.split_matrix, self.sizes)

    def _build_from_own_blend(self, split: Split, blend: Blend | None) -> TopLevelDataset | None:
        """The dataset of a split that has files of its own."""
        if blend is None:
            return None
        matrix: list[tuple[float, float] | None] = [None] * len(Split)
        matrix[split.value] = (0.0, 1.0)
        sizes: list[int | None] = [0] * len(Split)
        sizes[split.value] = self.sizes[split.value]
        if len(blend[0]) == 1:
            return self._build_megatron_datasets(blend[0][0], matrix, sizes)[split.value]
        return self._build_blends(blend, matrix, sizes)[split.value]

    def _build_blends(
        self, blend: Blend, matrix: list[tuple[float, float] | None], sizes: list[int | None]
    ) -> list[TopLevelDataset | None]:
        """One blend for each split that `matrix` gives a share."""
        prefixes, given_weights = blend
        weights = None if given_weights is None else normalize(given_weights)
        wanted: list[list[int | None]] = [[None] * len(Split) for _ in prefixes]
        requested = wanted
        if weights is not None:
            wanted = _samples_per_dataset(weights, sizes, 0.0)
            requested = _samples_per_dataset(weights, sizes, self.config.mid_level_dataset_surplus)
        with ThreadPoolExecutor(max(1, self.config.num_dataset_builder_threads)) as pool:
            per_prefix = list(pool.map(self._build_megatron_datasets, prefixes, itertools.repeat(matrix), requested))
        blends: list[TopLevelDataset | None] = [None] * len(Split)
        for split in Split:
            if matrix[split.value] is None:
                continue
            datasets = [built for row in per_prefix if (built := row[split.value]) is not None]
            size = sizes[split.value]
            if weights is not None:
                if size is None:
                    raise ConfigError(
                        f"The {split.name} blend has weights but no number of samples; name one or drop the weights."
                    )
                total = sum(row[split.value] or 0 for row in wanted)
                blends[split.value] = BlendedDataset(datasets, weights, total, self.config)
            else:
                lengths = [len(dataset) for dataset in datasets]
                capped = None if size is None else min(size, sum(lengths))
                blends[split.value] = BlendedDataset(datasets, lengths, capped, self.config)
        return blends

    def _build_megatron_datasets(
        self, prefix: str | None, matrix: list[tuple[float, float] | None], sizes: Sequence[int | None]
    ) -> list[MegatronDataset | None]:
        """The datasets of the splits of one low-level dataset, None where `matrix` gives no share."""
        low_level: Any = self.cls.build_low_level_dataset(prefix, self.config)
        num_elements = self.cls.numel_low_level_dataset(low_level)
        datasets: list[MegatronDataset | None] = []
        for split in Split:
            bounds = matrix[split.value]
            if bounds is None:
                datasets.append(None)
                continue
            begin, end = (round(bound * float(num_elements)) for bound in bounds)
            elements = np.arange(begin, end, dtype=np.int32)
            if len(elements) == 0 and sizes[split.value]:
                raise ConfigError(
                    f"The {split.name} split of {prefix} is empty: its {num_elements} documents times "
                    f"{bounds[0]:.4f} to {bounds[1]:.4f} rounds to none, but {sizes[split.value]} samples are wanted. "
                    "Give the split a larger share (--split) or do not ask for it (--eval-iters 0)."
                )
            dataset = self.cls(low_level, prefix, elements, sizes[split.value], split, self.config)
            datasets.append(dataset)
        return datasets


def _samples_per_dataset(
    weights: Sequence[float], sizes: Sequence[int | None], surplus: float
) -> list[list[int | None]]:
    """Samples of each split to request from each dataset, [datasets][splits]."""
    return [
        [None if size is None else math.ceil(math.ceil(size * weight) * (1 + surplus)) for size in sizes]
        for weight in weights
    ]
