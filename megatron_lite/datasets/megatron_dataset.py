"""The common part of datasets that turn stored documents into samples."""

import hashlib
import json
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lite.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron_lite.datasets.utils import Split

NO_TOKEN = -1
"""An id that no stored token has."""


def describe(identifiers: dict[str, Any]) -> tuple[str, str]:
    """The text that tells a dataset from all others, and its hash, which names the cache files as in Megatron."""
    text = json.dumps(identifiers, indent=4, default=lambda value: value.unique_identifiers)
    return text, hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


def pad_token_id(tokenizer: Any, allow_ambiguous: bool) -> int:
    """The id that means padding wherever it occurs, or NO_TOKEN.

    A pad id shared with the end-of-document or end-of-sequence token cannot be told from a real one in the data, so it
    is not used: what this package pads itself it masks by position.
    """
    pad = getattr(tokenizer, "pad", None)
    if pad is None:
        return NO_TOKEN
    others = [getattr(tokenizer, name, None) for name in ("eod", "eos")]
    if pad not in others or pad == NO_TOKEN:
        return pad
    warnings.warn(
        f"The tokenizer's pad id {pad} is also its end-of-document or end-of-sequence id. "
        + ("All its occurrences are masked, real ends too." if allow_ambiguous else "Only appended padding is masked."),
        stacklevel=2,
    )
    return pad if allow_ambiguous else NO_TOKEN


class MegatronDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A split of one low-level dataset, cut into samples.

    Args:
        dataset: where the tokens are.
        dataset_path: its path prefix, None for made-up data.
        indices: elements of the low-level dataset that belong to the split.
        num_samples: samples wanted, None for one epoch.
        index_split: which split.
        config: see BlendedMegatronDatasetConfig.
    """

    def __init__(
        self,
        dataset: Any,
        dataset_path: str | None,
        indices: NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        self.dataset = dataset
        self.dataset_path = dataset_path
        self.indices = indices
        self.num_samples = num_samples
        self.index_split = index_split
        self.config = config
        self.unique_identifiers = {
            "class": type(self).__name__,
            "dataset_path": dataset_path,
            "num_samples": num_samples,
            "index_split": index_split.name,
            **{name: getattr(config, name) for name in self._key_config_attributes()},
        }
        self.unique_description, self.unique_description_hash = describe(self.unique_identifiers)
        self._pad_token_id = pad_token_id(config.tokenizer, config.allow_ambiguous_pad_tokens)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """The settings that the order of the samples depends on."""
        return ["random_seed", "sequence_length", "split", "split_matrix", "tokenizer"]

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """How many elements of the low-level dataset there are to divide among the splits."""
        raise NotImplementedError

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: Any) -> Any:
        """Open the low-level dataset."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError
