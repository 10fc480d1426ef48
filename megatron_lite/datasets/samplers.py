"""Which samples each data parallel rank reads, as a function of the samples consumed so far.

Micro-step k of a run takes the next `micro_batch_size * data_parallel_size` samples in order, and rank r the r-th
contiguous part of them. So the ranks' parts, put together in order, are the same for every layout and micro-batch size,
and a run can go on in another layout, or with another global batch size, from its number of consumed samples.
"""

from collections.abc import Iterator

import torch

from megatron_lite.errors import ConfigError


class MegatronPretrainingSampler:
    """Samples `consumed_samples`, `consumed_samples` + 1, ... in order; the datasets are shuffled already.

    Args:
        total_samples: samples in the dataset.
        consumed_samples: samples that were read before, by all ranks together.
        micro_batch_size: samples of a batch of one rank.
        data_parallel_rank: this rank.
        data_parallel_size: number of ranks.
        drop_last: leave out a last micro-step that cannot be filled; otherwise some ranks get fewer samples, or none.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool = True,
    ) -> None:
        _check(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        if consumed_samples >= total_samples:
            raise ConfigError(
                f"All {total_samples} samples of the dataset are consumed (consumed_samples is {consumed_samples}); "
                "raise --train-iters or --train-samples, from which the dataset's length follows."
            )
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        for begin in range(self.consumed_samples, self.total_samples, self.micro_batch_times_data_parallel_size):
            end = min(begin + self.micro_batch_times_data_parallel_size, self.total_samples)
            if self.drop_last and end - begin < self.micro_batch_times_data_parallel_size:
                return
            own = begin + self.data_parallel_rank * self.micro_batch_size
            batch = list(range(own, min(own + self.micro_batch_size, end)))
            if batch:
                yield batch


class MegatronPretrainingRandomSampler:
    """All samples in a random order, epoch after epoch without end.

    Epoch e is the permutation that torch draws from seed e. Unlike Megatron's, whose epochs depend on the number of
    ranks and on the micro-batch size, it is the same in every layout.

    Args:
        dataset: what is sampled; unused.
        total_samples: samples in the dataset.
        consumed_samples: samples that were read before, by all ranks together.
        micro_batch_size: samples of a batch of one rank.
        data_parallel_rank: this rank.
        data_parallel_size: number of ranks.
        data_sharding: must be False: a part of the data for each rank would tie the order to the layout.
    """

    def __init__(
        self,
        dataset: object,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_sharding: bool = False,
    ) -> None:
        _check(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        if data_sharding:
            raise ConfigError("data_sharding ties the order of samples to the layout and is not offered; pass False.")
        self.dataset = dataset
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.consumed_samples + self.data_parallel_rank * self.micro_batch_size
        epoch, order = -1, torch.empty(0)
        while True:
            batch = []
            for position in range(begin, begin + self.micro_batch_size):
                if position // self.total_samples != epoch:
                    epoch = position // self.total_samples
                    generator = torch.Generator().manual_seed(epoch)
                    order = torch.randperm(self.total_samples, generator=generator)
                batch.append(int(order[position % self.total_samples]))
            yield batch
            begin += self.micro_batch_times_data_parallel_size


def _check(total_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int) -> None:
    if total_samples <= 0:
        raise ConfigError(f"The dataset has {total_samples} samples; it needs at least one.")
    if micro_batch_size <= 0:
        raise ConfigError(f"micro_batch_size is {micro_batch_size}; it must be at least 1.")
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ConfigError(f"data_parallel_rank {data_parallel_rank} does not exist among {data_parallel_size} ranks.")
