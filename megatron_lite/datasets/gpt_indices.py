"""The order of GPT samples: pure functions from document lengths, seed, sequence length and sample count.

A run reads the documents of its split in a shuffled order, epoch after epoch, as one long stream of tokens, cuts the
stream into samples of `sequence_length` tokens (each reads one token further, for the labels), and shuffles the
samples. All three orders are Megatron's, draw for draw.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.errors import ConfigError

SEPARATE_FINAL_EPOCH_BELOW = 0.80
"""A last epoch that is used for less than this share is shuffled by itself, so that no document is favoured."""


class GPTIndices(NamedTuple):
    """The three indices of a GPT dataset.

    Attributes:
        document_index: [epochs * documents] int32, the documents in the order of the stream.
        sample_index: [samples + 1, 2], where each sample begins: position in `document_index`, token in that document.
        shuffle_index: [samples], the sample at each position of the run.
    """

    document_index: NDArray[np.integer]
    sample_index: NDArray[np.integer]
    shuffle_index: NDArray[np.integer]


class SamplePlan(NamedTuple):
    """The counts that follow from the lengths alone.

    Attributes:
        num_epochs: times the documents are read.
        num_samples: samples in the stream of all epochs.
        num_samples_sans_final_epoch: samples of the part that is shuffled first; `num_samples` if that is everything.
    """

    num_epochs: int
    num_samples: int
    num_samples_sans_final_epoch: int

    @property
    def separate_final_epoch(self) -> bool:
        """Whether the last epoch is shuffled by itself."""
        return self.num_samples_sans_final_epoch != self.num_samples


def plan_samples(
    tokens_per_epoch: int, num_samples: int | None, sequence_length: int, extra_token: bool, drop_last: bool
) -> SamplePlan:
    """How many epochs give `num_samples` samples (None: those of one epoch).

    Args:
        tokens_per_epoch: tokens in the split.
        num_samples: samples wanted.
        sequence_length: tokens a sample advances in the stream.
        extra_token: a sample reads one token more than it advances.
        drop_last: leave out a last sample that would have to be padded.

    Raises:
        ConfigError: samples are wanted from a split without tokens.
    """
    extra = int(extra_token)
    num_epochs = 1
    if num_samples:
        if tokens_per_epoch < 1:
            raise ConfigError(f"{num_samples} samples are wanted from a split that holds no tokens; give it a share.")
        num_epochs = _exact_ceil_div(num_samples * sequence_length + extra, tokens_per_epoch)

    def samples_in(epochs: int) -> int:
        return max(0, (epochs * tokens_per_epoch - extra) // sequence_length)

    stream = max(0, num_epochs * tokens_per_epoch - extra)
    total = stream // sequence_length if drop_last else _exact_ceil_div(stream, sequence_length)
    sans_final = samples_in(num_epochs - 1)
    if num_epochs > 1 and num_samples is not None:
        from_final = num_samples - sans_final
        if from_final < int(SEPARATE_FINAL_EPOCH_BELOW * samples_in(1)):
            return SamplePlan(num_epochs, total, sans_final)
    return SamplePlan(num_epochs, total, total)


def _exact_ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def build_document_index(
    documents: NDArray[np.int32], num_epochs: int, random_state: np.random.RandomState, separate_final_epoch: bool
) -> NDArray[np.int32]:
    """The documents of all epochs in shuffled order, [epochs * documents] int32."""
    if separate_final_epoch and num_epochs > 1:
        first = build_document_index(documents, num_epochs - 1, random_state, False)
        last = build_document_index(documents, 1, random_state, False)
        return np.concatenate((first, last))
    document_index = np.tile(documents.astype(np.int32, copy=False), num_epochs)
    random_state.shuffle(document_index)
    return document_index


def build_sample_index(
    sequence_lengths: NDArray[np.int32],
    document_index: NDArray[np.int32],
    sequence_length: int,
    num_samples: int,
    extra_token: bool,
) -> NDArray[np.integer]:
    """Where each sample begins in the stream of documents, [num_samples + 1, 2].

    Row i stands for token `i * sequence_length` of the stream: the document that holds it (with `extra_token`; without,
    the document that holds the token before it) and the token's place in that document. The last row is where the last
    sample ends. int32 unless a document or the number of documents is too large.
    """
    largest = max(len(document_index), int(sequence_lengths.max(initial=0)))
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    sample_index = np.zeros((num_samples + 1, 2), dtype)
    if num_samples == 0:
        return sample_index
    lengths = sequence_lengths[document_index]
    ends = np.cumsum(lengths, dtype=np.int64)
    begins_at = np.arange(1, num_samples + 1, dtype=np.int64) * sequence_length
    last_token = ends[-1] - int(extra_token)
    np.minimum(begins_at, last_token, out=begins_at)
    document = np.searchsorted(ends, begins_at - (0 if extra_token else 1), side="right")
    sample_index[1:, 0] = document
    sample_index[1:, 1] = begins_at - (ends[document] - lengths[document])
    return sample_index


def build_shuffle_index(num_first: int, total_size: int, random_state: np.random.RandomState) -> NDArray[np.integer]:
    """`range(total_size)`, its first `num_first` entries and the others shuffled apart, [total_size]."""
    dtype = np.uint32 if total_size < np.iinfo(np.uint32).max - 1 else np.int64
    shuffle_index: NDArray[np.integer] = np.arange(total_size, dtype=dtype)
    random_state.shuffle(shuffle_index[:num_first])
    if num_first != total_size:
        random_state.shuffle(shuffle_index[num_first:])
    return shuffle_index


def build_gpt_indices(
    sequence_lengths: NDArray[np.int32],
    documents: NDArray[np.int32],
    plan: SamplePlan,
    sequence_length: int,
    extra_token: bool,
    seed: int,
) -> GPTIndices:
    """The document, sample and shuffle indices of a split.

    Args:
        sequence_lengths: tokens of each document of the whole dataset.
        documents: the documents of the split.
        plan: counts from `plan_samples`.
        sequence_length: tokens a sample advances in the stream.
        extra_token: a sample reads one token more than it advances.
        seed: seed of the one generator that shuffles documents, then samples.
    """
    random_state = np.random.RandomState(seed)
    document_index = build_document_index(documents, plan.num_epochs, random_state, plan.separate_final_epoch)
    sample_index = build_sample_index(sequence_lengths, document_index, sequence_length, plan.num_samples, extra_token)
    shuffle_index = build_shuffle_index(plan.num_samples_sans_final_epoch, plan.num_samples, random_state)
    return GPTIndices(document_index, sample_index, shuffle_index)
