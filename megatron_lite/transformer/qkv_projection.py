"""The fused query-key-value projection, split over tensor parallel ranks by whole query groups, or by heads."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite.process_groups import group_rank, group_size
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear
from megatron_lite.tensor_parallel.linear import linear_with_grad_accumulation_and_async_allreduce
from megatron_lite.tensor_parallel.parameters import create_parameter
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.transformer_config import TransformerConfig


def build_qkv_projection(config: TransformerConfig, group: ProcessGroup | None) -> nn.Module:
    """linear_qkv: [s, b, h] (sequence parallel [s/tp, b, h]) -> this rank's [s, b, groups x (queries, key, value) x d].

    The logical weight is [g (n/g + 2) d, h], the rows of each query group together: its queries, its key, its value.
    With at least as many groups as ranks, each rank holds whole groups. With fewer, several ranks share a group.
    """
    assert config.num_query_groups is not None, "TransformerConfig derives num_query_groups"
    if config.num_query_groups % group_size(group):
        return SharedGroupProjection(config, group)
    head = config.kv_channels or 0
    return ColumnParallelLinear(
        config.hidden_size,
        (config.num_attention_heads + 2 * config.num_query_groups) * head,
        config=config,
        init_method=config.init_method,
        bias=config.add_bias_linear or config.add_qkv_bias,
        gather_output=False,
        tp_group=group,
    )


class SharedGroupProjection(MegatronModule):
    """linear_qkv where tp is a multiple of the number of query groups g: each rank has n/tp queries of one group.

    The key and value of that group are computed by all tp/g ranks that share it. So that checkpoints and initial
    weights are those of every other layout, each rank stores the whole weight and multiplies with its own rows;
    a rank's gradient is a partial sum over the group (rows of others are zero), declared as such.
    """

    config: TransformerConfig
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, config: TransformerConfig, group: ProcessGroup | None) -> None:
        super().__init__(config)
        assert config.num_query_groups is not None, "TransformerConfig derives num_query_groups"
        assert config.init_method is not None, "TransformerConfig derives init_method"
        self.tp_group, ranks = group, group_size(group)
        heads, groups, head = config.num_attention_heads, config.num_query_groups, config.kv_channels or 0
        ranks_per_group = ranks // groups
        which_group, place = divmod(group_rank(group), ranks_per_group)
        first_row = which_group * (heads // groups + 2) * head
        queries = heads // ranks * head
        self.query_rows = slice(first_row + place * queries, first_row + (place + 1) * queries)
        key_row = first_row + heads // groups * head
        self.key_value_rows = slice(key_row, key_row + 2 * head)

        rows = (heads + 2 * groups) * head
        self._create("weight", (rows, config.hidden_size), config.init_method)
        if config.add_bias_linear or config.add_qkv_bias:
            self._create("bias", (rows,), nn.init.zeros_)
        else:
            self.register_parameter("bias", None)

    def _create(self, name: str, shape: tuple[int, ...], init_method: object) -> None:
        create_parameter(
            self,
            name,
            shape,
            init_method=init_method,  # type: ignore[arg-type]
            dtype=self.config.main_params_dtype,
            partial_over_tp=True,
            perform_initialization=self.config.perform_initialization,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] (sequence parallel [s/tp, b, h]) -> [s, b, (n/tp + 2) d]; collectives of ColumnParallelLinear."""
        bias = None if self.bias is None else self._own_rows(self.bias, hidden_states.dtype)
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden_states,
            self._own_rows(self.weight, hidden_states.dtype),
            bias,
            sequence_parallel=self.config.sequence_parallel,
            tp_group=self.tp_group,
        )

    def _own_rows(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.cat((parameter[self.query_rows], parameter[self.key_value_rows])).to(dtype)
