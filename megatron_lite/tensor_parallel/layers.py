"""Layers whose weights are split over the tensor parallel group.

A column layer splits the output features, a row layer the input features, so that the pair needs one reduction. Without
a process group each is the plain layer it is named after. Parameters are stored in `config.main_params_dtype`; a
linear layer computes in the dtype of its input.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.process_groups import group_rank, group_size
from megatron_lite.tensor_parallel.linear import (
    linear_with_grad_accumulation_and_async_allreduce,
    linear_with_reduce_scatter,
)
from megatron_lite.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron_lite.tensor_parallel.overlapped import Way, choose_way
from megatron_lite.tensor_parallel.parameters import create_parameter, local
from megatron_lite.tensor_parallel.utils import VocabUtility, divide

InitMethod = Callable[[Tensor], Any]
LinearOutput = Tensor | tuple[Tensor, Tensor | None]

DEFAULT_INIT_STD = 0.02


def default_init_method(tensor: Tensor) -> Tensor:
    """Normal with standard deviation 0.02, as GPT-2."""
    return nn.init.normal_(tensor, std=DEFAULT_INIT_STD)


def local_in_dtype(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """This rank's shard of a parameter, cast unless FSDP's mixed precision already has."""
    shard = local(parameter)
    return shard if shard.dtype == dtype else shard.to(dtype)


def look_up(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table, [...] x [n, h] -> [..., h], whose gradients are summed in at least float32.

    Off the GPU torch sums them in the dtype of the table, where half precision loses most of a frequent id: with data
    parallelism the table is a cast copy, so the result is float32 there; the sums are rounded once, at the end.
    """
    if torch.is_grad_enabled() and not table.is_cuda:
        table = table.to(torch.promote_types(table.dtype, torch.float32))
    return F.embedding(ids, table)


def way_of_overlap(config: ModelParallelConfig, group: ProcessGroup | None) -> Way | None:
    """How products of this group overlap with their communication; None where they do not, or there is none."""
    if group is None or group_size(group) == 1 or not (config.tp_comm_overlap and config.sequence_parallel):
        return None
    return choose_way(group)


class _ParallelLinear(nn.Module):
    """What the column and the row layer share: the group, the checks and the form of the output."""

    bias: nn.Parameter | None
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    """Computes x weight^T + bias, in a column layer with its communication, where torch's product does not."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        config: ModelParallelConfig,
        skip_bias_add: bool,
        stride: int,
        is_expert: bool,
        tp_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        if stride != 1:
            raise ConfigError(
                f"stride is {stride}, but a shard here is one contiguous block of rows or columns; use stride=1 and "
                "interleave the parts of a fused matrix (gate, up, gate, up) so that any block is meaningful."
            )
        if tp_group is None:
            getter = (
                parallel_state.get_expert_tensor_parallel_group
                if is_expert
                else parallel_state.get_tensor_model_parallel_group
            )
            tp_group = getter(check_initialized=False)
        self.input_size, self.output_size = input_size, output_size
        self.config = config
        self.skip_bias_add = skip_bias_add
        self.is_expert = is_expert
        self.tp_group = tp_group
        self.tp_size = group_size(tp_group)
        self.sequence_parallel = config.sequence_parallel and self.tp_size > 1
        # The token dispatcher moves and sums the tokens of experts.
        self.communicates = self.tp_size > 1 and not is_expert
        self.overlap = way_of_overlap(config, tp_group) if self.communicates else None

    def _create(self, name: str, shape: tuple[int, ...], init_method: InitMethod, **split: Any) -> nn.Parameter:
        return create_parameter(
            self,
            name,
            shape,
            init_method=init_method,
            dtype=self.config.main_params_dtype,
            device=torch.device("cpu") if self.config.use_cpu_initialization else None,
            is_expert=self.is_expert,
            perform_initialization=self.config.perform_initialization,
            **split,
        )

    def _weight_init(self, init_method: InitMethod | None) -> InitMethod:
        return init_method or getattr(self.config, "init_method", None) or default_init_method

    def _bias_for(self, input_: Tensor) -> Tensor | None:
        return None if self.bias is None else local_in_dtype(self.bias, input_.dtype)

    def extra_repr(self) -> str:
        """Logical sizes and the number of shards, for print(model)."""
        bias = getattr(self, "bias", None) is not None
        return f"input_size={self.input_size}, output_size={self.output_size}, bias={bias}, tp={self.tp_size}"


class ColumnParallelLinear(_ParallelLinear):
    """Y = X A^T + b with the rows of A (output features) split: [..., k] -> [..., n/tp].

    Forward: under sequence parallelism all-gather [s/tp, b, k] -> [s, b, k] first; all-gather of the output features
    with `gather_output`. Backward: all-reduce of the input gradient (reduce-scatter under sequence parallelism) while
    the weight gradient is computed.

    Args:
        input_size: input features k.
        output_size: logical output features n; a multiple of the group's size.
        config: dtype, sequence parallelism and initialization.
        init_method: fills the full weight in place; default `config.init_method`, else normal with std 0.02.
        bias: add a bias (zero at first), split like the output.
        gather_output: return the full [..., n] on every rank.
        stride: must be 1.
        skip_bias_add: return (output, bias) and leave the addition to the caller.
        skip_weight_param_allocation: hold no weight; `forward` is given one (tied embeddings).
        is_expert: a routed expert's layer: split over the expert tensor parallel group, and no communication here.
        tp_group: default the (expert) tensor parallel group; none at all in a single process.

    Raises:
        ConfigError: sizes that do not divide.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: InitMethod | None = None,
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        is_expert: bool = False,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(input_size, output_size, config, skip_bias_add, stride, is_expert, tp_group)
        self.gather_output = gather_output
        self.output_size_per_partition = divide(output_size, self.tp_size)
        split = {"shard_dim": 0, "group": self.tp_group}
        if skip_weight_param_allocation:
            self.register_parameter("weight", None)
        else:
            self._create("weight", (output_size, input_size), self._weight_init(init_method), **split)
        if bias:
            self._create("bias", (output_size,), nn.init.zeros_, **split)
        else:
            self.register_parameter("bias", None)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> LinearOutput:
        """[..., k] (under sequence parallelism [s/tp, b, k]) -> [..., n/tp], or [..., n] gathered.

        Args:
            input_: the same on all ranks, or this rank's part of the sequence under sequence parallelism.
            weight: used instead of the layer's own, [n/tp, k].
            runtime_gather_output: overrides `gather_output` for this call.

        Raises:
            ConfigError: no weight, or one of the wrong shape.
        """
        weight = self.weight if weight is None else weight
        if weight is None:
            raise ConfigError(
                "This ColumnParallelLinear was built with skip_weight_param_allocation=True and holds no weight; "
                "pass forward(input_, weight=...)."
            )
        weight = local_in_dtype(weight, input_.dtype)
        expected = (self.output_size_per_partition, self.input_size)
        if tuple(weight.shape) != expected:
            raise ConfigError(f"The weight's shape is {tuple(weight.shape)}, but this rank's shard is {expected}.")
        bias = self._bias_for(input_)
        added_here = None if self.skip_bias_add else bias
        if self.product is None:
            output = linear_with_grad_accumulation_and_async_allreduce(
                input_,
                weight,
                added_here,
                sequence_parallel=self.sequence_parallel,
                tp_group=self.tp_group if self.communicates else None,
                overlap=self.overlap,
            )
        else:
            output = self.product(input_, weight, added_here)
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gather and self.tp_size > 1:
            output = gather_from_tensor_model_parallel_region(output, self.tp_group)
        return (output, bias) if self.skip_bias_add else output


class RowParallelLinear(_ParallelLinear):
    """Y = X A^T + b with the columns of A (input features) split: [..., k/tp] -> [..., n].

    Forward: all-reduce of the output, or reduce-scatter to [s/tp, b, n] under sequence parallelism; the bias, held
    whole by every rank, is added once afterwards. Backward: identity, or all-gather along the sequence.

    Args:
        input_size: logical input features k; a multiple of the group's size.
        output_size: output features n.
        config: dtype, sequence parallelism and initialization.
        init_method: fills the full weight in place; default `config.init_method`, else normal with std 0.02.
        bias: add a bias (zero at first).
        input_is_parallel: the input is [..., k/tp] (True) or the whole [..., k], split here (False); None tells from
            its last dimension.
        skip_bias_add: return (output, bias) and leave the addition to the caller.
        stride: must be 1.
        is_expert: a routed expert's layer: split over the expert tensor parallel group, and no communication here.
        tp_group: default the (expert) tensor parallel group; none at all in a single process.

    Raises:
        ConfigError: sizes that do not divide.
    """

    weight: nn.Parameter

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: InitMethod | None = None,
        bias: bool = True,
        input_is_parallel: bool | None = None,
        skip_bias_add: bool = False,
        stride: int = 1,
        is_expert: bool = False,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(input_size, output_size, config, skip_bias_add, stride, is_expert, tp_group)
        self.input_is_parallel = input_is_parallel
        self.input_size_per_partition = divide(input_size, self.tp_size)
        self._create(
            "weight", (output_size, input_size), self._weight_init(init_method), shard_dim=1, group=self.tp_group
        )
        if bias:
            partial = self.sequence_parallel and self.communicates
            self._create("bias", (output_size,), nn.init.zeros_, partial_over_tp=partial)
        else:
            self.register_parameter("bias", None)

    def forward(self, input_: Tensor) -> LinearOutput:
        """[..., k/tp] or [..., k] -> [..., n] (under sequence parallelism [s/tp, b, n]).

        Raises:
            ConfigError: the last dimension fits neither, or the sequence cannot be split.
        """
        if not self._is_parallel(input_):
            input_ = scatter_to_tensor_model_parallel_region(input_, self.tp_group)
        weight = local_in_dtype(self.weight, input_.dtype)
        bias = self._bias_for(input_)
        added_here = None if self.skip_bias_add else bias
        multiply = self.product or F.linear
        if not self.communicates:
            output = multiply(input_, weight, added_here)
        elif self.overlap is not None and self.product is None:
            assert self.tp_group is not None, "one rank has nothing to overlap with"
            output = linear_with_reduce_scatter(input_, weight, self.tp_group, self.overlap)
            output = output if added_here is None else output + added_here
        else:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            output = reduce(multiply(input_, weight, None), self.tp_group)
            output = output if added_here is None else output + added_here
        return (output, bias) if self.skip_bias_add else output

    def _is_parallel(self, input_: Tensor) -> bool:
        whole, part, given = self.input_size, self.input_size_per_partition, input_.size(-1)
        expected = {None: (part, whole), True: (part,), False: (whole,)}[self.input_is_parallel]
        if given not in expected:
            raise ConfigError(
                f"The input's last dimension is {given}, but this RowParallelLinear (input_is_parallel="
                f"{self.input_is_parallel}, tp={self.tp_size}) takes {' or '.join(str(size) for size in expected)}."
            )
        return given == part


class VocabParallelEmbedding(nn.Module):
    """Embedding table with its rows (the vocabulary) split: ids [b, s] -> [b, s, h].

    Forward: each rank looks up the ids it holds, zeros elsewhere, then all-reduce; with `reduce_scatter_embeddings`
    the result is transposed and reduce-scattered: [s/tp, b, h]. Backward: identity, or all-gather along the sequence.
    An id outside the table gives zeros where the table is split, an IndexError where it is not.

    Args:
        num_embeddings: rows of the whole table, the padded vocabulary; a multiple of the group's size.
        embedding_dim: features h.
        init_method: fills the full table in place; default `config.init_method`, else normal with std 0.02.
        reduce_scatter_embeddings: return [s/tp, b, h], ready for sequence parallel layers.
        config: dtype and initialization; the result has `config.params_dtype`.
        tp_group: default the tensor parallel group; none at all in a single process.

    Raises:
        ConfigError: sizes that do not divide.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init_method: InitMethod | None = None,
        reduce_scatter_embeddings: bool = False,
        config: ModelParallelConfig,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if tp_group is None:
            tp_group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.config = config
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        self.tp_group = tp_group
        self.tp_size = group_size(tp_group)
        self.vocab_start_index, self.vocab_end_index = VocabUtility.vocab_range_from_global_vocab_size(
            num_embeddings, group_rank(tp_group), self.tp_size
        )
        self.num_embeddings_per_partition = self.vocab_end_index - self.vocab_start_index
        create_parameter(
            self,
            "weight",
            (num_embeddings, embedding_dim),
            init_method=init_method or getattr(config, "init_method", None) or default_init_method,
            dtype=config.main_params_dtype,
            device=torch.device("cpu") if config.use_cpu_initialization else None,
            shard_dim=0,
            group=tp_group,
            perform_initialization=config.perform_initialization,
        )

    def forward(self, input_: Tensor) -> Tensor:
        """Ids [b, s] -> [b, s, h], or [s/tp, b, h] with `reduce_scatter_embeddings`.

        Raises:
            ConfigError: the sequence cannot be split.
        """
        weight = local(self.weight)
        if self.tp_size == 1:
            output = look_up(input_, weight)
        else:
            elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            rows = (input_ - self.vocab_start_index).masked_fill(elsewhere, 0)
            output = look_up(rows, weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        output = output.to(self.config.params_dtype)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(output.transpose(0, 1).contiguous(), self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, self.tp_group)

    def extra_repr(self) -> str:
        """Logical sizes and the number of shards, for print(model)."""
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, tp={self.tp_size}"
