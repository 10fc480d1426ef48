"""From datasets to the micro-batches of a step, on the device."""

from collections.abc import Iterator
from typing import Any

import torch

from megatron_lite.errors import ConfigError

MicroBatch = dict[str, torch.Tensor]
"""tokens, labels, position_ids: int64 [b, s]; loss_mask: float [b, s]; optionally attention_mask: bool [b, 1, s, s]."""


class MicroBatchStream:
    """Hands out the micro-batches of one global batch at a time, already on their way to the device."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        """`loader` yields dictionaries of [b, s] tensors in the order of consumed samples."""
        self._iterator: Iterator[MicroBatch] = iter(loader)
        self._device = device

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
                    "The dataset ended before training did: it was built for fewer samples than the run consumes. "
                    "This happens when --train-iters or the batch size grew after the start; delete --data-cache-path "
                    "and start the run again with --load."
                ) from None
            except ConfigError as error:
                # A worker process wraps its message in its traceback.
                raise ConfigError(str(error).rpartition("ConfigError: ")[2].strip()) from error
            batches.append(
                {
                    name: tensor.to(self._device, non_blocking=True)
                    for name, tensor in batch.items()
                    if isinstance(tensor, torch.Tensor)
                }
            )
        return batches
