"""MoELayer: the feed-forward block of a layer whose tokens choose among experts."""

from torch import Tensor

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection, group_size
from megatron_lite.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron_lite.tensor_parallel.utils import divide
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.moe.router import TopKRouter
from megatron_lite.transformer.moe.shared_experts import SharedExperts
from megatron_lite.transformer.moe.token_dispatcher import build_token_dispatcher
from megatron_lite.transformer.transformer_config import TransformerConfig


class MoELayer(MegatronModule):
    """Route, dispatch, compute, combine, and add the shared experts; [s, b, h] -> [s, b, h].

    Every rank routes and dispatches tokens of its own. Under sequence parallelism it has them; otherwise tensor
    parallel ranks hold the same tokens, and each takes its part of the sequence here and gets the others' results in
    the end. So no gradient upstream is counted twice, and that of the router is partial over the tensor parallel ranks.

    Collectives: the dispatcher's (see token_dispatcher), the shared experts' (those of MLP), and, with tensor but no
    sequence parallelism, an all-gather of the result in forward and of the input's gradient in backward.

    Args:
        config: the moe_* settings, and what router and experts take.
        layer_number: global number of the layer, from 1; names its statistics.
        pg_collection: process groups, default the global ones.

    Raises:
        ConfigError: no experts, or a number of them that the expert parallel size does not divide.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        groups = ProcessGroupCollection.use_mpu_process_groups() if pg_collection is None else pg_collection
        if config.num_moe_experts is None:
            raise ConfigError("num_moe_experts is None, but an MoELayer needs experts; set it, or build an MLP.")
        num_local_experts = divide(config.num_moe_experts, group_size(groups.ep))
        self.layer_number = layer_number
        self.tp_group, self.data_parallel_group = groups.tp, groups.expt_dp
        self.router = TopKRouter(config, groups, layer_number)
        self.experts = GroupedMLP(num_local_experts, config, groups)
        self.token_dispatcher = build_token_dispatcher(config, num_local_experts, groups)
        self.shared_experts = SharedExperts(config, groups) if config.moe_shared_expert_intermediate_size else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]; under sequence parallelism [s/tp, b, h] -> [s/tp, b, h].

        Raises:
            ConfigError: the tensor parallel size does not divide the sequence.
        """
        shared = None if self.shared_experts is None else self.shared_experts.start(hidden_states)
        own = self._own_tokens(hidden_states)
        probs, indices = self.router(own)
        rows, row_probs, tokens_per_expert, state = self.token_dispatcher.dispatch(
            own.flatten(0, 1), probs.flatten(0, 1), indices.flatten(0, 1)
        )
        if state.num_dropped is not None:
            self.router.record_dropped(state.num_dropped)
        rows = self.experts.forward_dispatched(rows, row_probs, tokens_per_expert)
        output = self.token_dispatcher.combine(rows, state).view_as(own)
        if self._splits_tokens:
            output = gather_from_sequence_parallel_region(output, False, self.tp_group)
        if self.shared_experts is None or shared is None:
            return output
        return output + self.shared_experts.wait(shared)

    @property
    def is_one_region(self) -> bool:
        """Whether torch.compile can follow all of it, products included.

        Not where tokens travel, as how many come is known only then; where experts have copies on other ranks, since
        FSDP gathers and reduces them inside the layer; nor where the host has a part in it.
        """
        travel = self.token_dispatcher.size > 1 or group_size(self.data_parallel_group) > 1
        beside = self.config.moe_shared_expert_overlap and self.shared_experts is not None
        return self.router.is_traceable and not (travel or beside or self.experts.recompute_activation)

    def compile_parts(self, backend: str = "inductor") -> None:
        """Where it is not one region: compile the router, unless the host has a part in it, and the activation."""
        if self.router.is_traceable:
            self.router.compile(fullgraph=True, backend=backend)
        self.experts.compile_rows(backend)

    @property
    def _splits_tokens(self) -> bool:
        return group_size(self.tp_group) > 1 and not self.config.sequence_parallel

    def _own_tokens(self, hidden_states: Tensor) -> Tensor:
        """This rank's own tokens, [s/tp, b, h]."""
        if not self._splits_tokens:
            return hidden_states
        length, ranks = hidden_states.size(0), group_size(self.tp_group)
        if length % ranks:
            raise ConfigError(
                f"The sequence length of this rank is {length}, but with experts it must be a multiple of the tensor "
                f"parallel size ({ranks}), as each rank dispatches its own part; use sequences of "
                f"{(length // ranks + 1) * ranks} tokens per context parallel rank."
            )
        return scatter_to_sequence_parallel_region(hidden_states, self.tp_group)
