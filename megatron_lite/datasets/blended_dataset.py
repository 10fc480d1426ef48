"""Samples drawn from several datasets in fixed proportions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_lite.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron_lite.datasets.blending import build_blending_indices, build_exhaustive_blending_indices
from megatron_lite.datasets.index_cache import Arrays, load_or_build
from megatron_lite.datasets.megatron_dataset import MegatronDataset, describe
from megatron_lite.datasets.utils import normalize
from megatron_lite.errors import ConfigError

MOST_DATASETS = 32767


class BlendedDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A blend of datasets; an item is the item of the chosen dataset and its number, `dataset_id`.

    Args:
        datasets: what to blend.
        weights: shares, in any unit; the numbers of samples if `size` is None.
        size: samples to draw; None draws each dataset's number of samples.
        config: gives the cache folder.

    Raises:
        ConfigError: a weight is not positive, or a dataset has fewer samples than the blend asks of it.
    """

    def __init__(
        self,
        datasets: Sequence[MegatronDataset],
        weights: Sequence[float],
        size: int | None,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        if len(datasets) != len(weights) or not 0 < len(datasets) < MOST_DATASETS:
            raise ConfigError(
                f"A blend of {len(datasets)} datasets with {len(weights)} weights; "
                f"give 1 to {MOST_DATASETS - 1} datasets and each of them a weight."
            )
        for dataset, weight in zip(datasets, weights, strict=True):
            if weight <= 0:
                raise ConfigError(
                    f"{dataset.dataset_path} has weight {weight} in the {dataset.index_split.name} blend (without "
                    "--data-path weights that is its number of samples); weights must be positive, so leave it out."
                )
        self.datasets = list(datasets)
        self.split = self.datasets[0].index_split
        self.weights = normalize(weights) if size is not None else [int(weight) for weight in weights]
        self.size = size
        self.config = config
        self.unique_identifiers = {
            "class": type(self).__name__,
            "datasets": [dataset.unique_identifiers for dataset in self.datasets],
            "split": self.split.name,
            "weights": self.weights,
            "size": self.size,
        }
        self.unique_description, self.unique_description_hash = describe(self.unique_identifiers)
        self.dataset_index, self.dataset_sample_index = self._build_indices()

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        dataset_id = int(self.dataset_index[idx])
        return {"dataset_id": dataset_id, **self.datasets[dataset_id][int(self.dataset_sample_index[idx])]}

    def _build_indices(self) -> Arrays:
        """[size] int16, the dataset of each sample, and [size] int64, the sample of that dataset."""
        size = sum(self.weights) if self.size is None else self.size

        def build() -> Arrays:
            if self.size is None:
                indices = build_exhaustive_blending_indices([int(weight) for weight in self.weights])
            else:
                indices = build_blending_indices(self.weights, self.size)
            self._check_supply(indices[0])
            return indices

        def fits(arrays: Arrays) -> bool:
            return all(len(array) == size for array in arrays)

        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        names = ("dataset_index", "dataset_sample_index")
        return load_or_build(self.config.path_to_cache, base, names, self.unique_description, build, fits)

    def _check_supply(self, dataset_index: np.ndarray) -> None:
        wanted = np.bincount(dataset_index, minlength=len(self.datasets))
        for dataset, number in zip(self.datasets, wanted.tolist(), strict=True):
            if number > len(dataset):
                raise ConfigError(
                    f"The {self.split.name} blend asks for {number} samples of {dataset.dataset_path}, which was built "
                    f"with {len(dataset)}; raise --mid-level-dataset-surplus "
                    f"(now {self.config.mid_level_dataset_surplus}) tenfold."
                )
