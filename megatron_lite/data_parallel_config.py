"""The knobs of data parallelism."""

from dataclasses import dataclass

from megatron_lite.config_field import Validated, knob

SHARDING_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


@dataclass
class DistributedDataParallelConfig(Validated):
    """What data parallel ranks keep whole and what they split among themselves. Names are Megatron's.

    | strategy           | optimizer state | gradients | parameters | gradients are reduced      |
    |--------------------|-----------------|-----------|------------|----------------------------|
    | no_shard           | whole           | whole     | whole      | after the last micro-batch |
    | optim              | split           | whole     | whole      | after the last micro-batch |
    | optim_grads        | split           | split     | whole      | after each micro-batch     |
    | optim_grads_params | split           | split     | split      | after each micro-batch     |

    float32 master parameters live with the optimizer state; "parameters" are the copies that compute.
    """

    data_parallel_sharding_strategy: str | None = knob(
        None,
        "What data parallel ranks split: nothing, optimizer state, also gradients, also parameters; default no_shard.",
        choices=SHARDING_STRATEGIES,
    )
    use_distributed_optimizer: bool = knob(False, "Short for --data-parallel-sharding-strategy optim.")
    use_megatron_fsdp: bool = knob(False, "Short for --data-parallel-sharding-strategy optim_grads_params.")
    use_torch_fsdp2: bool = knob(False, "Short for --data-parallel-sharding-strategy optim_grads_params.")
    torch_fsdp2_reshard_after_forward: bool = knob(
        True, "Free gathered parameters after the forward.", flag="--torch-fsdp2-no-reshard-after-forward"
    )
    num_distributed_optimizer_instances: int = knob(
        1, "Replica groups: parameters are split within each group and repeated in every group (hybrid sharding)."
    )
    grad_reduce_in_bf16: bool = knob(False, "Accumulate and reduce gradients in bfloat16 instead of float32.")

    def __post_init__(self) -> None:
        if self.data_parallel_sharding_strategy is None:
            self.data_parallel_sharding_strategy = self._implied_strategy()

    def _implied_strategy(self) -> str:
        if self.use_torch_fsdp2 or self.use_megatron_fsdp:
            return "optim_grads_params" if self.torch_fsdp2_reshard_after_forward else "optim_grads"
        return "optim" if self.use_distributed_optimizer else "no_shard"

    def number_of_replicas(self, data_parallel_size: int) -> int:
        """How often each parameter's optimizer state exists among `data_parallel_size` (dp x cp) ranks."""
        if self.data_parallel_sharding_strategy == "no_shard":
            return data_parallel_size
        return self.num_distributed_optimizer_instances

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        found = super().violations()
        instances, strategy = self.num_distributed_optimizer_instances, self.data_parallel_sharding_strategy
        if instances < 1:
            found.append(f"num_distributed_optimizer_instances is {instances}, but it must be at least 1.")
        if instances > 1 and strategy == "no_shard":
            found.append(
                f"num_distributed_optimizer_instances is {instances}, but the strategy no_shard splits nothing among "
                "ranks, so each rank is a replica already; choose --use-distributed-optimizer, or leave it at 1."
            )
        if strategy == "no_shard" and self.use_distributed_optimizer:
            found.append(
                "use_distributed_optimizer splits the optimizer state, but data_parallel_sharding_strategy is "
                "no_shard; keep one of the two."
            )
        return found
