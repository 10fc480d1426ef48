"""GroupedMLP: the feed-forward blocks of this rank's experts, computed together in grouped products."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.errors import ConfigError
from megatron_lite.ops.fp8_grouped_linear import Fp8GroupedLinear
from megatron_lite.ops.grouped_bias import add_grouped_bias
from megatron_lite.ops.grouped_linear import Before, grouped_linear
from megatron_lite.ops.swiglu import gates_then_ups
from megatron_lite.pipeline_parallel_config import SPLIT_BACKWARD
from megatron_lite.process_groups import ProcessGroupCollection, group_rank, group_size
from megatron_lite.tensor_parallel.layers import local_in_dtype
from megatron_lite.tensor_parallel.parameters import create_expert_parameter
from megatron_lite.transformer.mlp import (
    activation_function,
    gated_activation,
    reorders_weight,
)
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.transformer_config import TransformerConfig


def weighs_output(config: TransformerConfig) -> bool:
    """Whether a row is multiplied with its probability behind its expert's second product, and not before it.

    The result is the same; it is done where rows are narrower, but before where the activation is recomputed with it.
    """
    recomputed = (config.recompute_modules or ()) if config.recompute_granularity == "selective" else ()
    width = config.moe_ffn_hidden_size or config.ffn_hidden_size or 0
    return width > config.hidden_size and "moe_act" not in recomputed


def grouped_backend(config: TransformerConfig) -> str:
    """The backend that grouped_linear is asked for.

    Torch's own if no package is wanted, and where gradients are computed in two passes, which a package's module may
    not survive.
    """
    if not config.moe_grouped_gemm:
        return "loop"
    return "torch" if config.transformer_impl == "local" or config.schedule in SPLIT_BACKWARD else "auto"


class GroupedMLP(MegatronModule):
    """E experts, each p * fc2(activation(fc1(x))) with p the router's probability of the row.

    So the sum over a token's experts needs no other weight. What p is multiplied with, the input or the output of fc2,
    is the narrower of the two, as this costs less. The rows of a gated
    fc1 are interleaved (gate 0, up 0, gate 1, up 1, ...) as in MLP. Expert e lives on expert parallel rank
    e // (E / ep); under expert tensor parallelism a rank holds f/etp of the width of each of its experts.

    Parameters: weight1 [E, f (gated: 2f), h], weight2 [E, h, f]; with add_bias_linear bias1 [E, f (2f)], bias2 [E, h].

    Args:
        num_local_experts: experts of this rank; E is that times the expert parallel size.
        config: widths (moe_ffn_hidden_size, default ffn_hidden_size), activation, biases, init methods,
            moe_grouped_gemm (off: expert by expert), "moe_act" in recompute_modules.
        pg_collection: process groups (ep, expt_tp, tp_ep), default the global ones.

    Raises:
        ConfigError: a number of experts that does not fit config.num_moe_experts, or a width that does not divide.
    """

    config: TransformerConfig
    weight1: nn.Parameter
    weight2: nn.Parameter
    bias1: nn.Parameter | None
    bias2: nn.Parameter | None
    fp8_fc1: Fp8GroupedLinear | None = None
    """Makes the products of fc1 those in fp8, where a model is trained so."""
    fp8_fc2: Fp8GroupedLinear | None = None
    """The same of fc2."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config)
        groups = ProcessGroupCollection.use_mpu_process_groups() if pg_collection is None else pg_collection
        self.pg_collection = groups
        self.num_local_experts = num_local_experts
        self.num_experts = num_local_experts * group_size(groups.ep)
        if config.num_moe_experts not in (None, self.num_experts):
            raise ConfigError(
                f"num_local_experts is {num_local_experts} on each of {group_size(groups.ep)} expert parallel ranks, "
                f"but num_moe_experts is {config.num_moe_experts}; their product must equal that."
            )
        self.gated = config.gated_linear_unit
        self.activation, self.gated_activation = activation_function(config), gated_activation(config)
        self.backend = grouped_backend(config)
        self.recompute_activation = "moe_act" in (config.recompute_modules or ()) and (
            config.recompute_granularity == "selective"
        )
        self.weighs_output = weighs_output(config)
        self.activate = self._activate
        self.adds_bias2 = group_rank(groups.expt_tp) == 0
        self._dispatcher: Any = None
        self._create_parameters()

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Outputs and inputs of fc1 and of fc2, of all expert tensor parallel ranks together."""
        width, hidden = self.config.moe_ffn_hidden_size or self.config.ffn_hidden_size, self.config.hidden_size
        assert width is not None, "TransformerConfig derives ffn_hidden_size"
        return (2 * width if self.gated else width, hidden), (hidden, width)

    def _create_parameters(self) -> None:
        config, experts, groups = self.config, self.num_experts, self.pg_collection
        (fc1_rows, hidden), (_, width) = self.shapes

        def create(name: str, shape: tuple[int, ...], init_method: Any, **options: Any) -> None:
            create_expert_parameter(
                self,
                name,
                shape,
                init_method=init_method,
                dtype=config.main_params_dtype,
                device=torch.device("cpu") if config.use_cpu_initialization else None,
                ep_group=groups.ep,
                etp_group=groups.expt_tp,
                tp_ep_group=groups.tp_ep,
                perform_initialization=config.perform_initialization,
                **options,
            )

        create("weight1", (experts, fc1_rows, hidden), config.init_method, shard_dim=1)
        create("weight2", (experts, hidden, width), config.output_layer_init_method, shard_dim=2)
        if not config.add_bias_linear:
            self.register_parameter("bias1", None)
            self.register_parameter("bias2", None)
            return
        zeros = nn.init.zeros_
        create("bias1", (experts, fc1_rows), zeros, shard_dim=1, apply_weight_decay=False)
        # Only the first expert tensor parallel rank adds it, and the dispatcher sums what the ranks computed.
        partial = group_size(groups.expt_tp) > 1
        create("bias2", (experts, hidden), zeros, partial_over_tp=partial, apply_weight_decay=False)

    def forward(self, hidden_states: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        """Dispatch, compute and combine: [..., h] -> [..., h].

        Args:
            hidden_states: [..., h], this rank's own tokens.
            scores: [..., k] probabilities of the chosen experts.
            indices: [..., k] int64 global indices of them.

        Collectives: those of the dispatcher of `config.moe_token_dispatcher_type`.
        """
        if self._dispatcher is None:
            from megatron_lite.transformer.moe.token_dispatcher import build_token_dispatcher

            self._dispatcher = build_token_dispatcher(self.config, self.num_local_experts, self.pg_collection)
        tokens, topk = hidden_states.reshape(-1, hidden_states.size(-1)), indices.size(-1)
        rows, row_probs, tokens_per_expert, state = self._dispatcher.dispatch(
            tokens, scores.reshape(-1, topk), indices.reshape(-1, topk)
        )
        output: Tensor = self._dispatcher.combine(self._compute(rows, row_probs, tokens_per_expert), state)
        return output.view_as(hidden_states)

    def forward_dispatched(self, rows: Tensor, row_probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """The experts' outputs for rows that are here already: [m, h] -> [m, h].

        Under expert tensor parallelism the result is this rank's share of a sum over `pg_collection.expt_tp`. Data
        parallelism hooks into this method as into forward.

        Args:
            rows: [m, h] sorted by local expert.
            row_probs: [m] probabilities.
            tokens_per_expert: [E_local] int64 numbers of rows, on the device of rows.
        """
        return self._compute(rows, row_probs, tokens_per_expert)

    def compile_rows(self, backend: str = "inductor") -> None:
        """Make one kernel of activation and weighting, forward and backward, for any number of rows, and of each cast
        to fp8.

        Where activations are computed again in backward they are left as they are.
        """
        if not self.recompute_activation:
            # It falls back by itself where it would have to be compiled too often.
            self.activate = torch.compile(self._activate, dynamic=True, backend=backend)
        self.fp8_fc1, self.fp8_fc2 = (one and one.compiled(backend) for one in (self.fp8_fc1, self.fp8_fc2))

    def _compute(self, rows: Tensor, row_probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        weight1, weight2 = local_in_dtype(self.weight1, rows.dtype), local_in_dtype(self.weight2, rows.dtype)
        gates_first = self.gated and reorders_weight(rows, weight1)
        hidden = grouped_linear(
            rows, weight1, tokens_per_expert, self.backend, gates_first=gates_first, fp8=self.fp8_fc1
        )
        if self.bias1 is not None:
            bias = local_in_dtype(self.bias1, rows.dtype)
            hidden = add_grouped_bias(hidden, gates_then_ups(bias, 1) if gates_first else bias, tokens_per_expert)
        activate = functools.partial(self.activate, interleaved=not gates_first)
        if self.recompute_activation:
            before = Before(activate, row_probs)
            output = grouped_linear(hidden, weight2, tokens_per_expert, self.backend, before=before, fp8=self.fp8_fc2)
        else:
            activated = activate(hidden, None if self.weighs_output else row_probs)
            output = grouped_linear(activated, weight2, tokens_per_expert, self.backend, fp8=self.fp8_fc2)
            output = _weighted(output, row_probs) if self.weighs_output else output
        if self.bias2 is None:
            return output
        # Where another rank adds it, its gradient is zero, and not None: it takes part in the sum over the ranks.
        factor = row_probs if self.adds_bias2 else torch.zeros_like(row_probs)
        return add_grouped_bias(output, local_in_dtype(self.bias2, rows.dtype), tokens_per_expert, factor)

    def _activate(self, hidden: Tensor, row_probs: Tensor | None, interleaved: bool) -> Tensor:
        """activation(hidden), or activation(gate) * up, times p if given: [m, f/etp] in the dtype of hidden."""
        activated = self.gated_activation(hidden, interleaved) if self.gated else self.activation(hidden)
        return activated if row_probs is None else _weighted(activated, row_probs)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        width = self.config.moe_ffn_hidden_size or self.config.ffn_hidden_size
        return f"experts={self.num_experts}, local={self.num_local_experts}, ffn_hidden_size={width}"


def _weighted(rows: Tensor, row_probs: Tensor) -> Tensor:
    """Each row [m, n] times its probability [m], in the dtype of the rows."""
    return (rows * row_probs.unsqueeze(-1)).to(rows.dtype)
