"""From datasets to the micro-batches of a step: padded, split over context parallel ranks, on the device."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite.context_parallel import PackedSeqParams, get_batch_on_this_cp_rank
from megatron_lite.errors import ConfigError
from megatron_lite.host_copies import copy_to_device
from megatron_lite.models.gpt.future_tokens import future_tokens

MicroBatch = dict[str, Any]
"""What the model reads, by name. Tensors: tokens, labels, position_ids int64 [b, s / cp]; loss_mask float [b, s / cp].
Optionally packed_seq_params, a PackedSeqParams on the host, where documents are to be kept apart."""


TEXT = ("tokens", "labels", "loss_mask")
"""What of a sample only the ends of a pipeline read; the rest is read by every stage."""

FUTURE = ("future_tokens", "future_labels", "future_loss_mask")
"""The FutureTokens of a micro-batch, [b, s / cp, depths] each, where multi-token prediction reads them."""


def names_read(model_chunks: Sequence[nn.Module]) -> set[str]:
    """Which of TEXT the pipeline stages of this rank read."""
    names: set[str] = set()
    for chunk in model_chunks:
        names |= {"tokens"} if chunk.pre_process else set()
        names |= {"labels", "loss_mask"} if chunk.post_process else set()
    return names


class PositionsOnly(torch.utils.data.Dataset[dict[str, Tensor]]):
    """As many samples as a dataset has, of which nothing but the positions is known: what middle stages read."""

    def __init__(self, dataset: Any, sequence_length: int) -> None:
        self._length = len(dataset)
        self._positions = torch.arange(sequence_length, device="cpu")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"position_ids": self._positions}


class MicroBatchStream:
    """Hands out the micro-batches of one global batch at a time, already on their way to the device."""

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        cp_group: ProcessGroup | None = None,
        padding: int = 0,
        names: Collection[str] = TEXT,
        depths: int = 0,
    ) -> None:
        """Prepare to read.

        Args:
            loader: yields dictionaries of [b, s] tensors in the order of consumed samples, the same on all ranks of
                `cp_group`; of `document_starts` see GPTDataset.
            device: where the tensors go.
            cp_group: ranks over which each sequence is split; default the global context parallel group.
            padding: masked tokens to append to each sequence before the split.
            names: which of TEXT to hand out; the others are dropped (`names_read`).
            depths: of multi-token prediction, whose FUTURE is handed out with the labels, made of tokens too.
        """
        self._iterator: Iterator[Mapping[str, Any]] = iter(loader)
        self._device, self._cp_group, self._padding = device, cp_group, padding
        self._dropped = set(TEXT) - set(names)
        self._depths = depths if "labels" in names else 0

    def next_global_batch(self, num_microbatches: int) -> list[MicroBatch]:
        """The next `num_microbatches` micro-batches of this rank.

        Raises:
            ConfigError: the data do not fit the run.
            RuntimeError: the dataset has fewer samples than the run asked for.
        """
        batches = []
        for _ in range(num_microbatches):
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise RuntimeError(
                    "The dataset ended before training did, although it had enough samples at the start of the run; "
                    "resume with --load, or start again without --data-cache-path if that does not help."
                ) from None
            except ConfigError as error:
                # A worker process wraps its message in its traceback.
                raise ConfigError(str(error).rpartition("ConfigError: ")[2].strip()) from error
            read = self._dropped - {"tokens"} if self._depths else self._dropped
            needed = {name: value for name, value in batch.items() if name not in read}
            mine = prepare(needed, self._cp_group, self._padding, self._depths)
            sent = {name: value for name, value in mine.items() if name not in self._dropped}
            batches.append(
                {
                    name: copy_to_device(value, self._device) if isinstance(value, Tensor) else value
                    for name, value in sent.items()
                }
            )
        return batches


def prepare(
    batch: Mapping[str, Any], cp_group: ProcessGroup | None = None, padding: int = 0, depths: int = 0
) -> MicroBatch:
    """This rank's part of a collated batch of samples, still on the host. The batch itself is left as it is.

    Args:
        batch: tensors [b, s], document_starts among them where documents are kept apart; the rest is left out.
        cp_group: ranks over which each sequence is split; default the global context parallel group.
        padding: tokens to append to each sequence before the split. They count nothing in the loss, and no real token
            attends to them, because they come last and belong to no document.
        depths: of multi-token prediction: FUTURE is added, taken from the whole sequences.

    Raises:
        ConfigError: the length of the sequences, padding included, is not divisible by cp_size * 2.
    """
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 1}
    starts = tensors.pop("document_starts", None)
    if depths:
        future = future_tokens(tensors["tokens"], tensors["labels"], tensors["loss_mask"], depths, starts)
        tensors |= dict(zip(FUTURE, future, strict=True))
    if padding:
        tensors = {name: F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)) for name, x in tensors.items()}
    mine: MicroBatch = dict(get_batch_on_this_cp_rank(tensors, cp_group))
    if starts is not None:
        mine["packed_seq_params"] = packed_documents(starts, padding)
    return mine


def packed_documents(document_starts: Tensor, padding: int = 0) -> PackedSeqParams:
    """The documents of a batch whose b padded sequences are read as one row of b * (s + padding) tokens.

    Args:
        document_starts: int64 [b, s], index in its sequence of the first token of each token's document.
        padding: tokens behind each sequence, outside of its documents.

    Returns:
        PackedSeqParams on the host, in which the last document of each sequence has room for the padding, and the
        context parallel split goes by whole sequences.
    """
    batch, length = document_starts.shape
    padded = length + padding
    row, begin = (document_starts == torch.arange(length)).nonzero(as_tuple=True)
    real = torch.cat([row * length + begin, torch.tensor([batch * length])]).to(torch.int32)
    room = torch.cat([row * padded + begin, torch.tensor([batch * padded])]).to(torch.int32)
    longest = int(real.diff().max())
    return PackedSeqParams(
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=room,
        cu_seqlens_kv_padded=room,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cu_seqlens_split=torch.arange(batch + 1, dtype=torch.int32) * padded,
    )
