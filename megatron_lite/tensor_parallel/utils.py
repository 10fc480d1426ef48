"""Splitting sizes and tensors over ranks."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import device_type_of, group_rank, group_size


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise ConfigError unless `denominator` divides `numerator`."""
    if numerator % denominator:
        below = numerator // denominator * denominator
        nearest = f"{below} and {below + denominator}" if below else f"{denominator}"
        raise ConfigError(f"{numerator} is not divisible by {denominator}; the nearest multiples are {nearest}.")


def divide(numerator: int, denominator: int) -> int:
    """Exact quotient, or ConfigError."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Split [..., n] into `num_partitions` tensors [..., n / num_partitions]: views, unless copies are asked for."""
    chunks = torch.split(tensor, divide(tensor.size(-1), num_partitions), dim=-1)
    return tuple(chunk.contiguous() for chunk in chunks) if contiguous_split_chunks else chunks


class VocabUtility:
    """Which part [first, last) of the vocabulary a rank holds."""

    @staticmethod
    def vocab_range_from_per_partition_vocab_size(
        per_partition_vocab_size: int, rank: int, world_size: int
    ) -> tuple[int, int]:
        """Range of `rank` when each of `world_size` ranks holds `per_partition_vocab_size` entries."""
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}, but must lie between 0 and {world_size - 1}.")
        first = rank * per_partition_vocab_size
        return first, first + per_partition_vocab_size

    @staticmethod
    def vocab_range_from_global_vocab_size(global_vocab_size: int, rank: int, world_size: int) -> tuple[int, int]:
        """Range of `rank` when `global_vocab_size` entries are split evenly."""
        per_partition = divide(global_vocab_size, world_size)
        return VocabUtility.vocab_range_from_per_partition_vocab_size(per_partition, rank, world_size)


def broadcast_data(
    keys: Sequence[str], data: Mapping[str, Tensor] | None, datatype: torch.dtype, tp_group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Give every tensor parallel rank the batch that the group's first rank has read.

    Args:
        keys: names of the tensors to send, the same on all ranks.
        data: the batch on the first rank; ignored elsewhere.
        datatype: dtype of all the tensors.
        tp_group: default the tensor parallel group.

    Raises:
        ConfigError: a tensor of the first rank has another dtype.
    """
    group = tp_group if tp_group is not None else parallel_state.get_tensor_model_parallel_group(False)
    tensors = {} if data is None or group_rank(group) else {key: data[key] for key in keys}
    for key, tensor in tensors.items():
        if tensor.dtype != datatype:
            raise ConfigError(f"{key} is {tensor.dtype}, but is sent as {datatype}; convert it first.")
    if group_size(group) == 1:
        return tensors
    on_gpu = device_type_of(group) == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    shapes: list[dict[str, torch.Size]] = [{key: tensor.shape for key, tensor in tensors.items()}]
    dist.broadcast_object_list(shapes, group=group, group_src=0)
    received = {}
    for key in keys:
        tensor = tensors[key].contiguous() if tensors else torch.empty(shapes[0][key], dtype=datatype)
        tensor = tensor.to(device)
        dist.broadcast(tensor, group=group, group_src=0)
        received[key] = tensor
    return received
