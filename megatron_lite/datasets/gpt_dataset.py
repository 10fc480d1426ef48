"""GPT samples: tokens, labels, loss mask and positions cut from tokenized documents."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lite.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron_lite.datasets.gpt_indices import GPTIndices, build_gpt_indices, plan_samples
from megatron_lite.datasets.index_cache import Arrays, load_or_build
from megatron_lite.datasets.indexed_dataset import IndexedDataset
from megatron_lite.datasets.megatron_dataset import NO_TOKEN, MegatronDataset
from megatron_lite.datasets.utils import Split
from megatron_lite.errors import ConfigError


@dataclass
class GPTDatasetConfig(BlendedMegatronDatasetConfig):
    """BlendedMegatronDatasetConfig and how samples are masked.

    Attributes:
        reset_position_ids: positions start again at 0 after each end-of-document token.
        reset_attention_mask: tokens do not attend beyond the end-of-document token before them; samples carry
            `document_starts`.
        inter_document_masking: tokens attend to their own document only and count positions in it, where documents are
            those of the file and not what lies between end-of-document tokens; samples carry `document_starts`.
        eod_mask_loss: the prediction made from an end-of-document token, which is the first token of an unrelated
            document, does not count.
        create_attention_mask: samples carry a dense `attention_mask`, for models of other people; ours do not read it.
        drop_last_partial_validation_sequence: leave out the last validation sample if it would have to be padded.
        add_extra_token_to_sequence: read one token beyond each sample, so that its last token has a label.
    """

    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    inter_document_masking: bool = False
    create_attention_mask: bool = False
    drop_last_partial_validation_sequence: bool = True
    add_extra_token_to_sequence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None:
            raise ConfigError("A GPT dataset needs its tokenizer (for the end-of-document token); pass tokenizer=.")


class GPTDataset(MegatronDataset):
    """Samples of `sequence_length` tokens in the order of Megatron for the same files, seed and counts.

    An item is a dict of `tokens` [s] int64, `labels` [s] int64, `loss_mask` [s] float32, `position_ids` [s] int64 and,
    where the configuration asks for it, `document_starts` [s] int64, the index in the sample of the first token of each
    token's document, and `attention_mask` [1, s, s] bool, True where attention is forbidden.
    """

    config: GPTDatasetConfig

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        indices = self._build_document_sample_shuffle_indices()
        self.document_index, self.sample_index, self.shuffle_index = indices

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Splits divide the sequences, not the documents."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: GPTDatasetConfig) -> Any:
        """Open the .bin/.idx pair."""
        assert dataset_path is not None
        return IndexedDataset(dataset_path, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        return len(self.sample_index) - 1

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """The sample at a position of the run; None gives one whose loss is masked throughout, to fill a batch."""
        config = self.config
        numbers, document_starts = self._read_text(0 if idx is None else int(idx))
        text = torch.from_numpy(numbers)
        is_pad = (text == NO_TOKEN) | (text == self._pad_token_id)
        masks_and_positions = get_ltor_masks_and_position_ids(
            text[:-1],
            config.tokenizer.eod,
            config.reset_position_ids,
            config.reset_attention_mask,
            config.eod_mask_loss,
            config.create_attention_mask,
            torch.from_numpy(document_starts[:-1]) if config.inter_document_masking else None,
        )
        masks_and_positions["loss_mask"][is_pad[1:] if idx is not None else ...] = 0.0
        text = text.masked_fill(is_pad, 0)
        return {"tokens": text[:-1].clone(), "labels": text[1:].clone(), **masks_and_positions}

    def _read_text(self, idx: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens of the sample at position `idx` and the one after, filled up with NO_TOKEN, and where in the
        sample each token's document starts; both [s + 1] int64. What fills up belongs to the last document.
        """
        sample = int(self.shuffle_index[idx])
        first, first_offset = (int(value) for value in self.sample_index[sample])
        last, last_offset = (int(value) for value in self.sample_index[sample + 1])
        end = last_offset + int(self.config.add_extra_token_to_sequence)
        text = np.full(self.config.sequence_length + 1, NO_TOKEN, dtype=np.int64)
        starts = np.zeros_like(text)
        filled = 0
        for position in range(first, last + 1):
            offset = first_offset if position == first else 0
            length = end - offset if position == last else None
            part = self.dataset.get(int(self.document_index[position]), offset, length)
            text[filled : filled + len(part)] = part
            starts[filled:] = filled
            filled += len(part)
        largest, vocab_size = int(text.max()), self.config.tokenizer.vocab_size
        if largest >= vocab_size:
            raise ConfigError(
                f"{self.dataset_path} holds the token {largest}, but the vocabulary has {vocab_size} ids: name the "
                "tokenizer that made the data, or give its --vocab-size."
            )
        return text, starts

    def _build_document_sample_shuffle_indices(self) -> GPTIndices:
        """The indices of this split, from the cache if it has them."""
        config = self.config
        lengths = self.dataset.sequence_lengths
        tokens_per_epoch = int(np.sum(lengths[self.indices], dtype=np.int64))
        drop_last = self.index_split != Split.valid or config.drop_last_partial_validation_sequence
        extra = config.add_extra_token_to_sequence
        plan = plan_samples(tokens_per_epoch, self.num_samples, config.sequence_length, extra, drop_last)

        def build() -> Arrays:
            return build_gpt_indices(lengths, self.indices, plan, config.sequence_length, extra, config.random_seed)

        def fits(arrays: Arrays) -> bool:
            """Whether the stream of the cached indices has as many tokens and documents as the data at hand."""
            document_index, sample_index, shuffle_index = arrays
            if len(document_index) != plan.num_epochs * len(self.indices) or len(document_index) == 0:
                return len(document_index) == plan.num_samples == 0
            if len(sample_index) != plan.num_samples + 1 or len(shuffle_index) != plan.num_samples:
                return False
            document, offset = (int(value) for value in sample_index[-1])
            rest = document_index[document:]
            if not 0 <= document < len(document_index) or rest.min() < 0 or rest.max() >= len(lengths):
                return False
            used = plan.num_epochs * tokens_per_epoch - int(np.sum(lengths[rest], dtype=np.int64)) + offset
            stream_end = plan.num_epochs * tokens_per_epoch - int(extra)
            return used == min(plan.num_samples * config.sequence_length, stream_end) or plan.num_samples == 0

        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        names = ("document_index", "sample_index", "shuffle_index")
        return GPTIndices(*load_or_build(self._cache_folder(), base, names, self.unique_description, build, fits))

    def _cache_folder(self) -> str | None:
        if self.config.path_to_cache is not None or self.dataset_path is None:
            return self.config.path_to_cache
        return os.path.join(self.dataset_path, "cache", f"{type(self).__name__}_indices")


def get_ltor_masks_and_position_ids(
    tokens: torch.Tensor,
    eod_token: int,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    eod_mask_loss: bool,
    create_attention_mask: bool,
    document_starts: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Masks and positions of one sample read from left to right.

    Args:
        tokens: [s], the tokens the model reads.
        eod_token: id that ends a document.
        reset_position_ids: positions start again at 0 after each end.
        reset_attention_mask: no attention across an end.
        eod_mask_loss: the prediction made from an end does not count.
        create_attention_mask: make `attention_mask`.
        document_starts: [s] int64, index of the first token of each token's document. Where given, these documents are
            kept apart and counted from 0 instead of those that ends divide, whatever the two settings above say.

    Returns:
        loss_mask [s] float32, position_ids [s] int64, document_starts [s] int64 if documents are kept apart, and
        perhaps attention_mask [1, s, s] bool, True where forbidden.
    """
    length = tokens.numel()
    is_eod = tokens == eod_token
    loss_mask = torch.ones(length, dtype=torch.float32)
    if eod_mask_loss:
        loss_mask[is_eod] = 0.0
    positions = torch.arange(length, dtype=torch.int64)
    begins = document_starts
    if begins is None:
        begins = torch.zeros(length, dtype=torch.int64)
        begins[1:] = torch.where(is_eod, positions + 1, 0).cummax(0).values[:-1]
    else:
        reset_position_ids = reset_attention_mask = True
    result = {"loss_mask": loss_mask, "position_ids": positions - begins if reset_position_ids else positions}
    if reset_attention_mask:
        result["document_starts"] = begins
    if create_attention_mask:
        forbidden = positions[None, :] > positions[:, None]
        if reset_attention_mask:
            forbidden |= positions[None, :] < begins[:, None]
        result["attention_mask"] = forbidden[None]
    return result


class MockGPTLowLevelDataset:
    """Made-up documents: 100,000 of them, of 1 to 4,095 tokens that count 1, 2, 3 ... up to an end-of-document token.

    The same for everybody, and the same as Megatron's.
    """

    seed = 0
    size = 100_000
    max_sequence_length = 4096

    def __init__(self, tokenizer: Any) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod_token = tokenizer.eod
        generator = np.random.default_rng(self.seed)
        self.sequence_lengths = generator.integers(1, self.max_sequence_length, self.size, dtype=np.int32)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, idx: int) -> NDArray[np.int64]:
        tokens = np.arange(1, self.sequence_lengths[idx] + 1, dtype=np.int64) % self.vocab_size
        tokens[-1] = self.eod_token
        return tokens

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.int64]:
        """`length` tokens of document `idx` from `offset` on, [length] int64."""
        return self[idx][offset : None if length is None else offset + length]


class MockGPTDataset(GPTDataset):
    """GPT samples cut from MockGPTLowLevelDataset."""

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """All made-up documents."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: GPTDatasetConfig) -> Any:
        """Nothing to open."""
        return MockGPTLowLevelDataset(config.tokenizer)
