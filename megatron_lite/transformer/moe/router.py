"""TopKRouter: which experts each token goes to, with what weights, and the losses that balance the experts' load.

Symbols: E experts, k = topk, t = tokens of this rank, T = tokens of the micro-batch over its tensor x context parallel
ranks.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.errors import ConfigError
from megatron_lite.ops.wide_linear import wide_linear
from megatron_lite.process_groups import ProcessGroupCollection, group_size
from megatron_lite.tensor_parallel.layers import local_in_dtype
from megatron_lite.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron_lite.tensor_parallel.parameters import create_parameter
from megatron_lite.tensor_parallel.random import get_cuda_rng_tracker
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.moe import auxiliary_losses, load_balancing, routing, statistics
from megatron_lite.transformer.transformer_config import TransformerConfig


class _Matrix(nn.Module):
    """A place for one weight, so that it is named `gate.weight`."""

    weight: nn.Parameter


class TopKRouter(MegatronModule):
    """hidden [..., h] -> weights [..., k] and expert indices [..., k], computed in float32 or float64 throughout.

    logits = x weight^T (+ bias), weight [E, h]; with moe_router_type gmlp
    logits = (silu(x gate^T) * (x up^T)) down^T (+ bias), gate and up [E, h], down [E, E]: as wide as the logits.

    In training the balance and z losses of this rank's tokens are attached to the weights (`auxiliary_losses`); they
    need no further care. Every tensor parallel rank is expected to route tokens of its own (MoELayer sees to it), so
    the parameters' gradients are partial over tensor parallel ranks.

    Args:
        config: all moe_router_* settings.
        pg_collection: uses tp, tp_cp and tp_dp_cp; default the global groups.
        layer_number: from 1, names this layer's statistics.

    Raises:
        ConfigError: no experts, more experts for a token than there are, or coefficients that do not match the types.
    """

    config: TransformerConfig
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    expert_bias: Tensor | None
    tokens_per_expert: Tensor
    step_tokens_per_expert: Tensor | None
    global_tokens_per_expert: Tensor | None
    global_micro_batches: Tensor | None
    global_step: Tensor | None
    sums: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        layer_number: int | None = None,
    ) -> None:
        super().__init__(config)
        experts, self.topk, self.layer_number = config.num_moe_experts, config.moe_router_topk, layer_number
        if experts is None or not 1 <= self.topk <= experts:
            raise ConfigError(
                f"moe_router_topk is {self.topk} and num_moe_experts is {experts}, but a router chooses 1 to "
                "num_moe_experts experts for each token; set both."
            )
        self.num_experts = experts
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(("tp", "tp_cp", "tp_dp_cp"))
        self.ranks_per_batch = group_size(self.groups.tp_cp)
        self.sinkhorn = "sinkhorn" in config.balance_types
        self.is_recomputed = config.recompute_granularity == "full" or "moe" in (config.recompute_modules or ())
        # Of every loss that is on, z_loss included.
        self.coefficients = config.balance_coefficients
        if config.moe_z_loss_coeff:
            self.coefficients["z_loss"] = config.moe_z_loss_coeff
        self._create_parameters()
        self._create_buffers()

    def _create_parameters(self) -> None:
        init, hidden = self.config.init_method, self.config.hidden_size
        assert init is not None
        if self.config.moe_router_type == "gmlp":
            self.register_parameter("weight", None)
            self.gate, self.up, self.down = _Matrix(), _Matrix(), _Matrix()
            for module, columns in ((self.gate, hidden), (self.up, hidden), (self.down, self.num_experts)):
                self._create(module, "weight", (self.num_experts, columns), init)
        else:
            self._create(self, "weight", (self.num_experts, hidden), init)
        self.register_parameter("bias", None)
        if self.config.add_bias_linear:
            self._create(self, "bias", (self.num_experts,), nn.init.zeros_)

    def _create(self, module: nn.Module, name: str, shape: tuple[int, ...], init: Callable[[Tensor], Any]) -> None:
        create_parameter(
            module,
            name,
            shape,
            init_method=init,
            dtype=self.config.main_params_dtype,
            device=torch.device("cpu") if self.config.use_cpu_initialization else None,
            partial_over_tp=group_size(self.groups.tp) > 1,
            perform_initialization=self.config.perform_initialization,
        )

    def _create_buffers(self) -> None:
        def counts(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        has_bias = self.config.moe_router_enable_expert_bias
        has_global = "global_aux_loss" in self.coefficients
        self.register_buffer("expert_bias", torch.zeros(self.num_experts) if has_bias else None)
        self.register_buffer("step_tokens_per_expert", counts(self.num_experts) if has_bias else None, persistent=False)
        of_experts = counts(self.num_experts) if has_global else None
        self.register_buffer("global_tokens_per_expert", of_experts, persistent=False)
        for name in ("global_micro_batches", "global_step"):
            self.register_buffer(name, counts() if has_global else None, persistent=False)
        self.register_buffer("tokens_per_expert", counts(self.num_experts), persistent=False)
        self.register_buffer("sums", torch.zeros(len(statistics.SUMS), dtype=torch.float64), persistent=False)
        # The averages that forwards of a step used, oldest first, for those that are computed again in backward.
        self._averages: deque[Tensor] = deque()
        self._step_of_averages = auxiliary_losses.current_step()

    def reset_buffers(self) -> None:
        """Zero all buffers, the expert bias too: for after to_empty(), which leaves them with any values."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        self._averages.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """Buffers move along with the module, but keep their dtype under .bfloat16() and .half()."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden: [..., h], this rank's own tokens. seq_aux_loss needs [s, b, h]: dim 1 tells the sequences apart.

        Returns:
            weights [..., k] in float32 or float64, with a gradient, and indices [..., k] int64.
        """
        logits = self._logits(hidden)
        weights, indices = self._choose(logits.reshape(-1, self.num_experts))
        shape = (*hidden.shape[:-1], self.topk)
        weights, indices = weights.view(shape), indices.view(shape)
        if self.training and torch.is_grad_enabled():
            weights = self._attach_losses(weights, indices, logits)
        weights.router_logits = logits  # type: ignore[attr-defined]  # for compute_aux_loss; lives as long as they do
        return weights, indices

    @property
    def is_traceable(self) -> bool:
        """Whether torch.compile can follow it.

        Not Sinkhorn's iteration, which ends when the data say so; noise from a stream of one tensor parallel rank; nor
        a forward that is computed again without counting, so differently.
        """
        noise = self.config.moe_input_jitter_eps is not None or self.config.moe_router_force_load_balancing
        return not (self.sinkhorn or noise or self.is_recomputed)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., E] in the router's dtype."""
        dtype = self._compute_dtype(hidden)
        x = hidden
        if self.config.moe_input_jitter_eps is not None and self.training:
            with _own_random_stream():
                noise = torch.rand_like(x, dtype=dtype)
            x = x * (1 + self.config.moe_input_jitter_eps * (2 * noise - 1))
        bias = None if self.bias is None else self._in(dtype, self.bias)
        with torch.autocast(x.device.type, enabled=False):
            if self.weight is not None:
                logits = wide_linear(x, self._in(dtype, self.weight))
            else:
                gate, up, down = (self._in(dtype, one.weight) for one in (self.gate, self.up, self.down))
                logits = F.linear(F.silu(wide_linear(x, gate)) * wide_linear(x, up), down)
            logits = logits if bias is None else logits + bias
        if self.config.moe_router_force_load_balancing and self.training:
            with _own_random_stream():
                logits = routing.random_logits(logits)
        return logits

    def _in(self, dtype: torch.dtype, parameter: Tensor) -> Tensor:
        """A parameter for the computation in `dtype`, first rounded to params_dtype, as FSDP's mixed precision does."""
        return local_in_dtype(parameter, self.config.params_dtype).to(dtype)

    def _compute_dtype(self, hidden: Tensor) -> torch.dtype:
        if self.config.moe_router_dtype is not None:
            return torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        return torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [t, E] -> weights and indices [t, k]."""
        if self.sinkhorn:
            return routing.route_by_sinkhorn(logits, self.topk, balance=self.training, group=self.groups.tp_cp)
        return routing.route(
            logits,
            self.topk,
            score_function=self.config.moe_router_score_function,
            pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            expert_bias=self.expert_bias,
        )

    def _attach_losses(self, weights: Tensor, indices: Tensor, logits: Tensor) -> Tensor:
        """The weights, with this rank's shares of all losses attached; what happened is recorded."""
        if "seq_aux_loss" in self.coefficients and logits.dim() != 3:
            raise ConfigError(
                f"seq_aux_loss was given hidden states with {logits.dim()} dimensions, but it must know which sequence "
                "each token is from; give [s, b, h], with s divisible by the tensor parallel size."
            )
        logits = logits if logits.dim() == 3 else logits.reshape(-1, 1, self.num_experts)
        scores = routing.scores_over_all_experts(logits, self.config.moe_router_score_function)
        counts = load_balancing.tokens_per_expert(indices.view(*logits.shape[:2], self.topk), self.num_experts)
        losses = self._losses(logits, scores, counts)
        if losses:
            total = sum(share * self.coefficients[name] for name, share in losses.items())
            assert isinstance(total, Tensor)
            weights = auxiliary_losses.attach(weights, total)
        if statistics.records(self):
            entropy = torch.special.entr(scores.detach()).sum()
            statistics.record(self, counts.sum(0), entropy, losses)
        return weights

    def _losses(self, logits: Tensor, scores: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """This rank's shares of the losses that are on, divided by their coefficients.

        A balance loss looks at plain choices, the k best scores, even where a bias or groups change the real ones.

        Args:
            logits: [s, b, E].
            scores: [s, b, E], normalized.
            counts: [b, E], how often each sequence's tokens really chose each expert.
        """
        shares, tokens = {}, logits.size(0) * logits.size(1) * self.ranks_per_batch
        if any(name in self.coefficients for name in load_balancing.BALANCE_LOSSES):
            if self.sinkhorn or self.expert_bias is not None or self.config.moe_router_group_topk:
                plain = routing.best_experts(scores, self.topk)
                counts = load_balancing.tokens_per_expert(plain, self.num_experts)
            shares = self._balance_shares(scores.sum(0), counts, tokens)
        if "z_loss" in self.coefficients:
            shares["z_loss"] = load_balancing.z_loss_share(logits, tokens)
        return shares

    def _balance_shares(self, score_sums: Tensor, own_counts: Tensor, tokens: int) -> dict[str, Tensor]:
        """Shares from scores and counts [b, E] of this rank's tokens; `tokens` are those of the micro-batch."""
        shares, sequences = {}, own_counts.size(0)
        if "aux_loss" in self.coefficients or "seq_aux_loss" in self.coefficients:
            counts = load_balancing.sum_over(own_counts, self.groups.tp_cp)
            if "aux_loss" in self.coefficients:
                shares["aux_loss"] = load_balancing.balance_share(
                    score_sums.sum(0), counts.sum(0), self.topk, tokens, tokens
                )
            if "seq_aux_loss" in self.coefficients:
                length = tokens // max(sequences, 1)
                of_all = load_balancing.balance_share(score_sums, counts, self.topk, length, length)
                shares["seq_aux_loss"] = of_all / max(sequences, 1)
        if "global_aux_loss" in self.coefficients:
            counted = tokens // self.ranks_per_batch * group_size(self.groups.tp_dp_cp)
            shares["global_aux_loss"] = load_balancing.balance_share(
                score_sums.sum(0), self._global_average(own_counts.sum(0)), self.topk, tokens, counted
            )
        return shares

    @torch.no_grad()
    def _global_average(self, own_counts: Tensor) -> Tensor:
        """Counts [E] of a micro-batch of all replicas, averaged over the micro-batches of the step so far.

        A forward that is computed again gets what the first one had.
        """
        counts, micro_batches, step = self.global_tokens_per_expert, self.global_micro_batches, self.global_step
        assert counts is not None
        assert micro_batches is not None
        assert step is not None
        if statistics.is_recomputation():
            return self._averages.popleft() if self._averages else counts / micro_batches.clamp(min=1)
        current = auxiliary_losses.current_step()
        goes_on = step == current
        counts.mul_(goes_on).add_(load_balancing.sum_over(own_counts, self.groups.tp_dp_cp))
        micro_batches.mul_(goes_on).add_(1)
        step.copy_(current)
        average = counts / micro_batches
        if self.is_recomputed:
            self._remember(average, current)
        return average

    def _remember(self, average: Tensor, step: Tensor) -> None:
        if step is not self._step_of_averages:
            self._averages.clear()
            self._step_of_averages = step
        self._averages.append(average)

    def record_dropped(self, pairs: Tensor) -> None:
        """Count token-expert pairs that were dropped for lack of capacity: 0-dim, those of this rank's tokens."""
        if statistics.records(self):
            self.sums[statistics.SUMS.index("dropped")] += pairs.detach()

    def compute_aux_loss(self, scores: Tensor, indices: Tensor) -> Tensor:
        """The balance loss of what `forward` returned, without a coefficient: 1 when experts are chosen alike.

        For those who use a router alone. A router with coefficients attaches its losses by itself; adding this one to
        the main loss as well would count it twice. The value is of the whole micro-batch over tensor x context parallel
        ranks, all of which must call; the gradient is that of this rank's own tokens.

        Args:
            scores: [..., k], the very tensor that `forward` returned: it remembers the scores of all E experts.
            indices: [..., k] as `forward` returned them.

        Returns:
            0-dim.

        Raises:
            ConfigError: other scores, a view or a copy.
        """
        logits = getattr(scores, "router_logits", None)
        if logits is None:
            raise ConfigError(
                "compute_aux_loss was given scores that are not this router's, or that were reshaped, cast or copied: "
                "those of the experts that were not chosen are unknown; call it with what forward returned."
            )
        full = routing.scores_over_all_experts(logits, self.config.moe_router_score_function)
        group, choices = self.groups.tp_cp, indices.reshape(-1, 1, self.topk)
        counts = load_balancing.tokens_per_expert(choices, self.num_experts)[0]
        tokens = choices.size(0) * self.ranks_per_batch
        share = load_balancing.balance_share(
            full.reshape(-1, self.num_experts).sum(0), load_balancing.sum_over(counts, group), self.topk, tokens, tokens
        )
        return share if group is None else reduce_from_tensor_model_parallel_region(share, group)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.config.hidden_size} -> {self.topk} of {self.num_experts} experts"


def _own_random_stream() -> AbstractContextManager[None]:
    """The stream that differs over tensor parallel ranks, which route different tokens; else the ambient one."""
    tracker = get_cuda_rng_tracker()
    return tracker.fork() if tracker.is_initialized() else nullcontext()


MoERouter = TopKRouter
