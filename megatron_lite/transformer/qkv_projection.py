"""The fused query-key-value projection, split over tensor parallel ranks by whole query groups, or by heads."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite.process_groups import group_rank, group_size
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, way_of_overlap
from megatron_lite.tensor_parallel.linear import linear_with_grad_accumulation_and_async_allreduce
from megatron_lite.tensor_parallel.parameters import create_parameter, declare_parameter
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.transformer_config import TransformerConfig


def build_qkv_projection(config: TransformerConfig, group: ProcessGroup | None) -> nn.Module:
    """linear_qkv: [s, b, h] (sequence parallel [s/tp, b, h]) -> this rank's [s, b, groups x (queries, key, value) x d].

    The logical weight is [g (n/g + 2) d, h], the rows of each query group together: its queries, its key, its value.
    With attention_output_gate it is [g (2 n/g + 2) d, h], the gates of a group behind its queries. With at least as
    many groups as ranks, each rank holds whole groups. With fewer, several ranks share a group.
    """
    assert config.num_query_groups is not None, "TransformerConfig derives num_query_groups"
    projection: nn.Module
    if config.num_query_groups % group_size(group):
        projection = SharedGroupProjection(config, group)
    else:
        projection = ColumnParallelLinear(
            config.hidden_size,
            _rows(config),
            config=config,
            init_method=config.init_method,
            bias=config.add_bias_linear or config.add_qkv_bias,
            gather_output=False,
            tp_group=group,
        )
    declared = projection.__dict__["parameter_specs"]["weight"]
    declare_parameter(projection, "weight", replace(declared, row_blocks=_row_blocks(config)))
    return projection


def _row_blocks(config: TransformerConfig) -> tuple[int, ...]:
    """Rows of a query group: its queries, their gates if there are any, its key, its value."""
    head = config.kv_channels or 0
    queries = config.num_attention_heads // (config.num_query_groups or 1) * head
    return (*[queries] * (2 if config.attention_output_gate else 1), head, head)


def _rows(config: TransformerConfig) -> int:
    """Rows of the logical weight."""
    query_like = 2 if config.attention_output_gate else 1
    heads, groups = config.num_attention_heads, config.num_query_groups or 0
    return (query_like * heads + 2 * groups) * (config.kv_channels or 0)


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
        self.overlap = way_of_overlap(config, group)
        heads, groups, head = config.num_attention_heads, config.num_query_groups, config.kv_channels or 0
        ranks_per_group = ranks // groups
        which_group, place = divmod(group_rank(group), ranks_per_group)
        rows = _rows(config)
        first_row, queries, own = which_group * rows // groups, heads // groups * head, heads // ranks * head
        # Its part of the group's queries (and gates, as many rows), and the group's key and value.
        starts = range(first_row, first_row + (2 if config.attention_output_gate else 1) * queries, queries)
        self.query_rows = [slice(start + place * own, start + (place + 1) * own) for start in starts]
        end = first_row + rows // groups
        self.key_value_rows = slice(end - 2 * head, end)
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
        """[s, b, h] (sequence parallel [s/tp, b, h]) -> [s, b, (n/tp + 2) d], with gates [s, b, (2 n/tp + 2) d].

        Collectives: those of ColumnParallelLinear.
        """
        bias = None if self.bias is None else self._own_rows(self.bias, hidden_states.dtype)
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden_states,
            self._own_rows(self.weight, hidden_states.dtype),
            bias,
            sequence_parallel=self.config.sequence_parallel,
            tp_group=self.tp_group,
            overlap=self.overlap,
        )

    def _own_rows(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        rows = [parameter[one] for one in (*self.query_rows, self.key_value_rows)]
        return torch.cat(rows).to(dtype)
