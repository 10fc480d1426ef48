"""Which strategy the flags mean, and which combinations are refused."""

import pytest

from megatron_lite.distributed import DistributedDataParallelConfig


@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        ({}, "no_shard"),
        ({"use_distributed_optimizer": True}, "optim"),
        ({"use_torch_fsdp2": True}, "optim_grads_params"),
        ({"use_torch_fsdp2": True, "torch_fsdp2_reshard_after_forward": False}, "optim_grads"),
        ({"use_megatron_fsdp": True}, "optim_grads_params"),
        ({"use_distributed_optimizer": True, "data_parallel_sharding_strategy": "optim_grads"}, "optim_grads"),
    ],
)
def test_strategy_follows_the_flags(flags, strategy):
    config = DistributedDataParallelConfig(**flags)
    assert config.data_parallel_sharding_strategy == strategy
    assert config.violations() == []


def test_replicas():
    assert DistributedDataParallelConfig().number_of_replicas(8) == 8
    sharded = DistributedDataParallelConfig(use_distributed_optimizer=True, num_distributed_optimizer_instances=2)
    assert sharded.number_of_replicas(8) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"data_parallel_sharding_strategy": "zero"}, "must be one of"),
        ({"num_distributed_optimizer_instances": 0}, "at least 1"),
        ({"num_distributed_optimizer_instances": 2}, "no_shard"),
        ({"data_parallel_sharding_strategy": "no_shard", "use_distributed_optimizer": True}, "keep one"),
    ],
)
def test_contradictions_are_named(flags, words):
    (violation,) = DistributedDataParallelConfig(**flags).violations()
    assert words in violation
