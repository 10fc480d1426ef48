"""InferenceContext: the keys and values of the tokens already seen, so that generation computes each token once."""

import torch
from torch import Tensor

from megatron_lite.errors import ConfigError


class InferenceContext:
    """A static key/value cache shared by the layers of one model.

    Every layer appends to its own part at the common offset; `advance` moves the offset once a whole forward pass is
    done. The memory of a layer is allocated when the layer is first used, with its local number of groups.

    Args:
        max_batch_size: number of sequences b.
        max_sequence_length: prompt plus generated tokens.
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_sequence_length = max_sequence_length
        self.sequence_len_offset = 0
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value [s, b, g, d] behind the cached ones; return all of them, [offset + s, b, g, d] each.

        Raises:
            ConfigError: more sequences or tokens than the context was made for.
        """
        length, batch = key.shape[:2]
        end = self.sequence_len_offset + length
        if end > self.max_sequence_length or batch != self.max_batch_size:
            raise ConfigError(
                f"the cache holds {self.max_batch_size} sequences of {self.max_sequence_length} tokens, but "
                f"{batch} sequences of {end} tokens are needed; make a larger InferenceContext."
            )
        if layer_number not in self._memory:
            shape = (self.max_sequence_length, *key.shape[1:])
            self._memory[layer_number] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self._memory[layer_number]
        keys[self.sequence_len_offset : end] = key
        values[self.sequence_len_offset : end] = value
        return keys[:end], values[:end]

    def advance(self, length: int) -> None:
        """Count `length` tokens, which every layer has stored, as seen."""
        self.sequence_len_offset += length

    def reset(self) -> None:
        """Forget all tokens but keep the memory."""
        self.sequence_len_offset = 0

    def next_positions(self, length: int, device: torch.device) -> Tensor:
        """Positions of the next `length` tokens, [b, s] expanded over the batch."""
        start = self.sequence_len_offset
        return torch.arange(start, start + length, device=device).expand(self.max_batch_size, -1)
