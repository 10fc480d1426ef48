"""The optimizer step on sharded parameters: scale, clip, skip and update without asking the device for an answer.

Each rank updates the shard it holds. Moments, step counters and loss scale are presented under names of the model
(`optimizer.state.<parameter>.exp_avg`), as DTensors laid out like their parameter, so that torch.distributed.checkpoint
restores them at another layout. Where the host keeps a moment, it is such a DTensor too, with its shard in the host's
memory, so that a checkpoint does not depend on it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.model_chunks import ModelChunks, as_chunks
from megatron_lite.optimizer.adam import fused_adamw
from megatron_lite.optimizer.clip_grads import counts_here, global_grad_statistics
from megatron_lite.optimizer.config import OptimizerConfig, moment_dtype
from megatron_lite.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron_lite.optimizer.host_moments import names_on_host, wait_for_moments
from megatron_lite.optimizer.muon import Matrix, muon
from megatron_lite.optimizer.param_groups import get_param_groups
from megatron_lite.optimizer.sgd import fused_sgd
from megatron_lite.optimizer.whole_matrices import matrix_splits
from megatron_lite.pinned_memory import host_tensors
from megatron_lite.tensor_parallel.parameters import ParameterSpec, local, named_parameter_specs


@dataclass(frozen=True)
class StepResult:
    """What a step did, still on the device: reading a number waits for it.

    Attributes:
        grad_norm: global norm of the unscaled gradients before clipping, float64 scalar.
        found_inf: 1 if the step was skipped because that norm is not finite, else 0, float32 scalar.
        num_zeros: zeros among the gradients, float64 scalar, or None if not asked for.
    """

    grad_norm: Tensor
    found_inf: Tensor
    num_zeros: Tensor | None


class MegatronOptimizer:
    """AdamW (Loshchilov and Hutter, 2019) or SGD with momentum over the local shards of a model's parameters.

    Or Muon over its matrices, each of them whole, and AdamW over the rest.

    Args:
        config: which optimizer and its constants.
        named_parameters: name in the model -> parameter, a DTensor (its local shard is updated) or a plain tensor.
        specs: declarations of these parameters; a name without one is an ordinary dense parameter.
        dense_mesh: mesh of all ranks as dense parameters see it, to count replicated gradients once.
        expert_mesh: the same as routed experts see it.

    Attributes:
        param_groups: dicts with `names`, `params`, `lr`, `weight_decay`, ...: the scheduler writes into them.
        state: name -> its tensors: `step`, `exp_avg`, `exp_avg_sq` (Adam), `momentum_buffer` (SGD, Muon), local shards.
        grad_scaler: the loss scale, or None.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        named_parameters: Mapping[str, nn.Parameter],
        specs: Mapping[str, ParameterSpec] | None = None,
        dense_mesh: DeviceMesh | None = None,
        expert_mesh: DeviceMesh | None = None,
    ) -> None:
        config.validate()
        specs = specs or {}
        self.config = config
        self.named_parameters = {name: p for name, p in named_parameters.items() if p.requires_grad}
        if not self.named_parameters:
            raise ConfigError("the model has no trainable parameter, so there is nothing to optimize.")
        self.param_groups = get_param_groups(self.named_parameters, specs, config)
        shards = {name: local(parameter.detach()) for name, parameter in self.named_parameters.items()}
        self.device = next(iter(shards.values())).device
        self._counted = {
            name
            for name, parameter in self.named_parameters.items()
            if counts_here(parameter, expert_mesh if name in specs and specs[name].is_expert else dense_mesh)
            and not (name in specs and specs[name].copy_of)
        }
        self._copies = {name: spec.copy_of for name, spec in specs.items() if spec.copy_of and name in shards}
        self.grad_scaler = _build_grad_scaler(config, self.device)
        self._matrices = {
            name: (matrix_splits(parameter), specs[name].row_blocks if name in specs else None)
            for group in self.param_groups
            if group["optimizer"] == "muon"
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        elements = {name: shard.numel() for name, shard in shards.items()}
        self._on_host = names_on_host(elements, config.host_fraction)
        moments = {
            name: self._moment_dtypes(group["optimizer"], parameter)
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        self._laid_out = self._initial_state(moments)
        self.state = {name: {key: local(one) for key, one in state.items()} for name, state in self._laid_out.items()}

    def _moment_dtypes(self, optimizer: str, parameter: Tensor) -> dict[str, torch.dtype]:
        config, main = self.config, parameter.dtype
        if not config.has_moments:
            return {}
        if optimizer in ("sgd", "muon"):
            return {"momentum_buffer": main}
        return {
            "exp_avg": moment_dtype(config.exp_avg_dtype, main),
            "exp_avg_sq": moment_dtype(config.exp_avg_sq_dtype, main),
        }

    def _initial_state(self, moments: Mapping[str, Mapping[str, torch.dtype]]) -> dict[str, dict[str, Tensor]]:
        """Laid out like the parameters. Zeros from the start, so that a fresh optimizer can be loaded into."""
        parameters = self.named_parameters
        on_host = host_tensors(
            {
                f"{name}.{key}": (parameters[name], dtype)
                for name, dtypes in moments.items()
                if name in self._on_host
                for key, dtype in dtypes.items()
            },
            pinned=self.device.type == "cuda",
        )
        state: dict[str, dict[str, Tensor]] = {}
        for name, dtypes in moments.items():
            state[name] = {}
            if "exp_avg" in dtypes:
                state[name]["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
            for key, dtype in dtypes.items():
                kept = on_host.get(f"{name}.{key}")
                state[name][key] = zeros_like_parameter(parameters[name], dtype) if kept is None else kept
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; `set_to_none=False` fills them with zeros."""
        for parameter in self.named_parameters.values():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                local(parameter.grad).zero_()

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, ready for backward."""
        return loss if self.grad_scaler is None else loss * self.grad_scaler.scale

    def get_loss_scale(self) -> Tensor:
        """The loss scale, a float32 scalar on the device (1 without a scaler)."""
        return torch.ones((), device=self.device) if self.grad_scaler is None else self.grad_scaler.scale

    @torch.no_grad()
    def step(self) -> StepResult:
        """Unscale, clip, and update all parameters that have a gradient, or none if the norm is not finite.

        Collectives: one all-reduce of the norm over the world; all ranks take the same decision. Muon's are those of
        `work_on_whole`, over the groups that split its matrices.
        """
        gradients = self._gradients()
        norm, num_zeros = self._grad_statistics(gradients)
        found_inf = torch.logical_not(torch.isfinite(norm)).float()
        norm = norm / self.get_loss_scale()
        divisor = self._gradient_divisor(norm)
        for group in self.param_groups:
            self._update_group(group, gradients, divisor, found_inf)
        if self.grad_scaler is not None:
            self.grad_scaler.update(found_inf)
        return StepResult(norm, found_inf, num_zeros)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Global L2 norm of the unscaled gradients, a float64 scalar on the device. Collective over the world."""
        return self._grad_statistics(self._gradients())[0] / self.get_loss_scale()

    def _gradients(self) -> dict[str, Tensor]:
        return {n: local(p.grad) for n, p in self.named_parameters.items() if p.grad is not None}

    def _grad_statistics(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(norm of the scaled gradients, number of zeros if asked for), over all ranks."""
        counted = [gradient for name, gradient in gradients.items() if name in self._counted]
        return global_grad_statistics(counted, self.device, self.config.log_num_zeros_in_grad)

    @torch.no_grad()
    def params_norm(self) -> Tensor:
        """Global L2 norm of all parameters, a float64 scalar on the device. Collective over the world."""
        counted = [local(parameter) for name, parameter in self.named_parameters.items() if name in self._counted]
        return global_grad_statistics(counted, self.device)[0]

    def _gradient_divisor(self, unscaled_norm: Tensor) -> Tensor | None:
        """What gradients are divided by (float64 scalar): loss scale, times norm / clip_grad where that is above 1."""
        if self.config.clip_grad == 0.0:
            return None if self.grad_scaler is None else self.grad_scaler.scale.double()
        # The 1e-6 is that of torch.nn.utils.clip_grad_norm_ and of Megatron.
        return ((unscaled_norm + 1e-6) / self.config.clip_grad).clamp(min=1.0) * self.get_loss_scale()

    def _update_group(
        self, group: dict[str, Any], gradients: Mapping[str, Tensor], divisor: Tensor | None, found_inf: Tensor
    ) -> None:
        """One fused update of a group's local shards, in which a `found_inf` of 1 changes nothing."""
        members = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if n in gradients]
        if not members:
            return
        if group["optimizer"] == "muon":
            matrices = {
                name: Matrix(
                    parameter,
                    gradients[name],
                    self.state[name]["momentum_buffer"],
                    *self._matrices[name],
                    on_host=name in self._on_host,
                )
                for name, parameter in members
            }
            how = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            muon(matrices, self.config, **how, divisor=divisor, found_inf=found_inf)
            return
        # Looked up at each step: FSDP moves shards to new storage when weights are assigned (load_state_dict).
        shards = [local(parameter) for _, parameter in members]
        grads = [gradients[name] for name, _ in members]
        grad_scale = None if divisor is None else divisor.float()
        if divisor is not None and shards[0].dtype == torch.float64:
            # The fused kernels read grad_scale as float32, which is not enough to compare layouts in float64.
            torch._foreach_div_(grads, divisor)
            grad_scale = None
        states = [self.state[name] for name, _ in members]
        on_host = [name in self._on_host for name, _ in members]
        config = self.config
        how = {
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        if group["optimizer"] == "sgd":
            momenta = [state["momentum_buffer"] for state in states if state]
            fused_sgd(shards, grads, momenta, on_host, momentum=config.sgd_momentum, **how)
            return
        constants = {"beta1": config.adam_beta1, "beta2": config.adam_beta2, "eps": config.adam_eps}
        fused_adamw(shards, grads, states, on_host, config.adam_impl, **constants, **how)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counters and loss scale by name: views of the living state, to save or to load into.

        The host waits here for the moments it keeps, so ask anew after each step. The state of a copy
        (ParameterSpec.copy_of) has the name of the original, once if this rank has both.
        """
        if self._on_host:
            wait_for_moments(self.device)
        state: dict[str, Tensor] = {}
        for name in self.named_parameters:
            original = self._copies.get(name, name)
            if original != name and original in self.named_parameters:
                continue
            state.update({f"optimizer.state.{original}.{key}": one for key, one in self._laid_out[name].items()})
        if self.grad_scaler is not None:
            state.update({f"optimizer.grad_scaler.{k}": v for k, v in self.grad_scaler.state_dict().items()})
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy values laid out like those of `state_dict()` into the living state (free of cost if loaded in place).

        Raises:
            ConfigError: the names are not those of this optimizer.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
            raise ConfigError(
                f"the optimizer state does not fit the model: {len(missing)} entries are missing (such as "
                f"{missing[:3]}) and {len(unknown)} are unknown (such as {unknown[:3]}); load it into the same model "
                "and optimizer, or start with fresh optimizer state (--no-load-optim)."
            )
        for key, living in own.items():
            target, source = local(living), local(state_dict[key])
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)
        for name, original in self._copies.items():
            for key, value in self.state.get(original, {}).items():
                self.state[name][key].copy_(value)


def zeros_like_parameter(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A DTensor with the mesh, placements and global shape of `parameter`, or a plain tensor like it."""
    return torch.zeros_like(parameter.detach(), dtype=dtype)


def _build_grad_scaler(config: OptimizerConfig, device: torch.device) -> ConstantGradScaler | None:
    if config.loss_scale is not None:
        return ConstantGradScaler(config.loss_scale, device)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_interval=int(config.loss_scale_window),
        hysteresis=config.hysteresis,
        device=device,
    )


def get_megatron_optimizer(
    config: OptimizerConfig,
    model_chunks: ModelChunks,
    *,
    dense_mesh: DeviceMesh | None = None,
    expert_mesh: DeviceMesh | None = None,
) -> MegatronOptimizer:
    """The optimizer of one rank's model chunks, after `wrap_data_parallel`.

    Args:
        config: which optimizer and its constants.
        model_chunks: a module, or one per virtual pipeline stage; their parameter names must differ. A chunk whose
            `config.fp16` is set has its loss scaled.
        dense_mesh: mesh of all ranks for dense parameters; default that of `parallel_state`, if it is initialized.
        expert_mesh: the same for routed experts.
    """
    chunks = as_chunks(model_chunks)
    if any(getattr(getattr(chunk, "config", None), "fp16", False) for chunk in chunks):
        config = dataclasses.replace(config, fp16=True)
    if parallel_state.model_parallel_is_initialized():
        dense_mesh = parallel_state.get_dense_mesh() if dense_mesh is None else dense_mesh
        expert_mesh = parallel_state.get_expert_mesh() if expert_mesh is None else expert_mesh
    parameters: dict[str, nn.Parameter] = {}
    specs: dict[str, ParameterSpec] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert name not in parameters, f"two model chunks hold a parameter named {name}"
            parameters[name] = parameter
        specs.update(named_parameter_specs(chunk))
    return MegatronOptimizer(config, parameters, specs, dense_mesh, expert_mesh)
