"""From the data settings of a run to its three datasets."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_lite.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder, TopLevelDataset
from megatron_lite.datasets.config import DEFAULT_SPLIT, DataConfig
from megatron_lite.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron_lite.errors import ConfigError


def gpt_dataset_config(data: DataConfig, tokenizer: Any, seed: int) -> GPTDatasetConfig:
    """The dataset configuration that the flags of a run stand for."""
    if data.seq_length is None:
        raise ConfigError("The length of a sample is not known; give --seq-length.")
    blend, blend_per_split = data.blends()
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=data.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=(data.split or DEFAULT_SPLIT) if blend is not None else None,
        num_dataset_builder_threads=data.num_dataset_builder_threads,
        path_to_cache=data.data_cache_path,
        mmap_bin_files=data.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        inter_document_masking=data.dataloader_inter_document_masking,
        mid_level_dataset_surplus=data.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=data.allow_ambiguous_pad_tokens,
    )


def build_train_valid_test_datasets(
    data: DataConfig,
    tokenizer: Any,
    sizes: Sequence[int | None],
    seed: int,
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> tuple[TopLevelDataset | None, TopLevelDataset | None, TopLevelDataset | None]:
    """The train, valid and test datasets of a run, None for a split without data.

    Collective over all ranks if torch.distributed is initialized.

    Args:
        data: where the data comes from and how it is masked.
        tokenizer: the tokenizer the data was made with.
        sizes: samples wanted of train, valid and test; None for one epoch.
        seed: seed of the order of the samples.
        is_built_on_rank: whether this process needs the datasets.

    Raises:
        ConfigError: no data is named, a file is missing, or a split that is wanted is empty.
    """
    config = gpt_dataset_config(data, tokenizer, seed)
    dataset_class = MockGPTDataset if config.mock else GPTDataset
    train, valid, test = BlendedMegatronDatasetBuilder(dataset_class, sizes, is_built_on_rank, config).build()
    return train, valid, test
