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
        self._without_documents: dict[Split, list[str]] = {}

    def build(self) -> list[TopLevelDataset | None]:
        """The datasets of train, valid and test; None for a split without data and on ranks that need none.

        A small corpus can leave no document for validation or test: then there is no such dataset, or it is missing in
        the blend, and one line says so.

        Collective over all ranks if torch.distributed is initialized.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        goes_first = not distributed or torch.distributed.get_rank() == 0
        datasets: list[TopLevelDataset | None] = [None] * len(Split)
        if goes_first and self.is_built_on_rank():
            datasets = self._build_splits()
            self._say_what_has_no_documents()
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
            return list(self._build_megatron_datasets(None, self._open(None), config.split_matrix, self.sizes))
        assert config.blend is not None
        prefixes, weights = config.blend
        if len(prefixes) == 1 and weights is None:
            opened = self._open(prefixes[0])
            return list(self._build_megatron_datasets(prefixes[0], opened, config.split_matrix, self.sizes))
        return self._build_blends(config.blend, config.split_matrix, self.sizes)

    def _open(self, prefix: str | None) -> Any:
        return self.cls.build_low_level_dataset(prefix, self.config)

    def _say_what_has_no_documents(self) -> None:
        names = {Split.valid: "validation", Split.test: "test"}
        for split, prefixes in self._without_documents.items():
            if self.sizes[split.value]:
                more = f" and {len(prefixes) - 3} more" if len(prefixes) > 3 else ""
                print(
                    f"note: no {names[split]} data from {', '.join(prefixes[:3])}{more}: too few documents for a share "
                    f"(--split {self.config.split!r})",
                    flush=True,
                )

    def _build_from_own_blend(self, split: Split, blend: Blend | None) -> TopLevelDataset | None:
        """The dataset of a split that has files of its own."""
        if blend is None:
            return None
        matrix: list[tuple[float, float] | None] = [None] * len(Split)
        matrix[split.value] = (0.0, 1.0)
        sizes: list[int | None] = [0] * len(Split)
        sizes[split.value] = self.sizes[split.value]
        if len(blend[0]) == 1:
            return self._build_megatron_datasets(blend[0][0], self._open(blend[0][0]), matrix, sizes)[split.value]
        return self._build_blends(blend, matrix, sizes)[split.value]

    def _build_blends(
        self, blend: Blend, matrix: list[tuple[float, float] | None], sizes: list[int | None]
    ) -> list[TopLevelDataset | None]:
        """One blend for each split that `matrix` gives a share."""
        prefixes, given_weights = blend
        wanted: list[list[int | None]] = [[None] * len(Split) for _ in prefixes]
        requested = wanted
        with ThreadPoolExecutor(max(1, self.config.num_dataset_builder_threads)) as pool:
            opened = list(pool.map(self._open, prefixes))
            if given_weights is not None:
                weights = [self._weights(given_weights, opened, split, matrix[split.value]) for split in Split]
                wanted = _samples_per_dataset(weights, sizes, 0.0)
                requested = _samples_per_dataset(weights, sizes, self.config.mid_level_dataset_surplus)
            build = self._build_megatron_datasets
            per_prefix = list(pool.map(build, prefixes, opened, itertools.repeat(matrix), requested))
        blends: list[TopLevelDataset | None] = [None] * len(Split)
        for split in Split:
            there = [position for position, row in enumerate(per_prefix) if row[split.value] is not None]
            datasets = [built for row in per_prefix if (built := row[split.value]) is not None]
            if not datasets:
                continue
            size = sizes[split.value]
            if given_weights is not None:
                if size is None:
                    raise ConfigError(
                        f"The {split.name} blend has weights but no number of samples; name one or drop the weights."
                    )
                total = sum(row[split.value] or 0 for row in wanted)
                shares = [weights[split.value][position] for position in there]
                blends[split.value] = BlendedDataset(datasets, shares, total, self.config)
            else:
                lengths = [len(dataset) for dataset in datasets]
                capped = None if size is None else min(size, sum(lengths))
                blends[split.value] = BlendedDataset(datasets, lengths, capped, self.config)
        return blends

    def _weights(
        self, given: Sequence[float], opened: Sequence[Any], split: Split, bounds: tuple[float, float] | None
    ) -> list[float]:
        """The weights of a split's blend: 0 where there is no document, what is left adds up to 1."""
        weights = list(given)
        if bounds is not None and split != Split.train:
            ranges = [self._range(low_level, bounds) for low_level in opened]
            weights = [weight if elements else 0.0 for weight, elements in zip(given, ranges, strict=True)]
        return normalize(weights if any(weights) else given)

    def _range(self, low_level: Any, bounds: tuple[float, float]) -> range:
        """The elements of a low-level dataset within bounds that are fractions of it."""
        num_elements = self.cls.numel_low_level_dataset(low_level)
        return range(*(round(bound * float(num_elements)) for bound in bounds))

    def _build_megatron_datasets(
        self,
        prefix: str | None,
        low_level: Any,
        matrix: list[tuple[float, float] | None],
        sizes: Sequence[int | None],
    ) -> list[MegatronDataset | None]:
        """The datasets of the splits of one low-level dataset, None where `matrix` gives no share or no document."""
        datasets: list[MegatronDataset | None] = []
        for split in Split:
            bounds = matrix[split.value]
            elements = range(0) if bounds is None else self._range(low_level, bounds)
            if bounds is None or (not elements and split != Split.train):
                datasets.append(None)
                if bounds is not None:
                    self._without_documents.setdefault(split, []).append(str(prefix))
                continue
            if not elements and sizes[split.value]:
                raise ConfigError(
                    f"The {split.name} split of {prefix} is empty: its {self.cls.numel_low_level_dataset(low_level)} "
                    f"documents times {bounds[0]:.4f} to {bounds[1]:.4f} rounds to none, but {sizes[split.value]} "
                    "samples are wanted. Give the split a larger share (--split)."
                )
            numbers = np.arange(elements.start, elements.stop, dtype=np.int32)
            datasets.append(self.cls(low_level, prefix, numbers, sizes[split.value], split, self.config))
        return datasets


def _samples_per_dataset(
    weights: Sequence[Sequence[float]], sizes: Sequence[int | None], surplus: float
) -> list[list[int | None]]:
    """Samples of each split to request from each dataset, [datasets][splits]; the weights are [splits][datasets]."""
    return [
        [
            None if size is None else math.ceil(math.ceil(size * weight) * (1 + surplus))
            for size, weight in zip(sizes, of_dataset, strict=True)
        ]
        for of_dataset in zip(*weights, strict=True)
    ]
