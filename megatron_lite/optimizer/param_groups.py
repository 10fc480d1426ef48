"""Which parameters share weight decay and learning rate: decided by name and global shape, never by the local shard."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from megatron_lite.optimizer.config import OptimizerConfig
from megatron_lite.tensor_parallel.parameters import ParameterSpec

# The input and output layers of a language model, which --decoupled-lr addresses.
_EMBEDDING_OR_OUTPUT = ("embedding.word_embeddings.weight", "output_layer.weight")


def has_weight_decay(name: str, parameter: Tensor, spec: ParameterSpec | None, config: OptimizerConfig) -> bool:
    """Whether weight decay applies to a parameter.

    Args:
        name: fully qualified name in the model.
        parameter: its global shape counts (a DTensor reports that; a shard keeps the number of dimensions).
        spec: the parameter's declaration, whose `apply_weight_decay` has the last word unless it is None.
        config: for `apply_wd_to_qk_layernorm`.
    """
    if spec is not None and spec.apply_weight_decay is not None:
        return spec.apply_weight_decay
    is_vector = parameter.ndim <= 1 or name.endswith(".bias") or name == "bias"
    is_qk_norm = any(part in ("q_layernorm", "k_layernorm") for part in name.split("."))
    return not is_vector or (config.apply_wd_to_qk_layernorm and is_qk_norm)


def is_embedding_or_output_parameter(name: str) -> bool:
    """Whether `--decoupled-lr` applies to the parameter of this name."""
    return name.endswith(_EMBEDDING_OR_OUTPUT)


def is_updated_by_muon(name: str, parameter: Tensor, spec: ParameterSpec | None) -> bool:
    """Whether Muon updates a parameter under `--optimizer muon`; the others are left to AdamW.

    As in Megatron-LM: every matrix except the word embeddings and the output layer, so routers and learned positions
    too. Of stacked experts each one's tensor counts.
    """
    stacked = spec is not None and spec.stacks_experts
    return parameter.ndim - stacked == 2 and not is_embedding_or_output_parameter(name)


def get_param_groups(
    named_parameters: Mapping[str, nn.Parameter],
    specs: Mapping[str, ParameterSpec],
    config: OptimizerConfig,
) -> list[dict[str, Any]]:
    """Parameter groups as the scheduler wants them.

    Returns:
        Dicts with `names`, `params`, `optimizer` (of this group: "adam", "sgd" or "muon"), `wd_mult` (1 or 0), `lr` and
        `weight_decay` (written by the scheduler), and `max_lr`/`min_lr` where a group has its own. `default_config`
        marks the groups that follow `--lr`.
    """
    groups: dict[tuple[bool, bool, str], dict[str, Any]] = {}
    for name, parameter in named_parameters.items():
        decays = has_weight_decay(name, parameter, specs.get(name), config)
        decoupled = config.decoupled_lr is not None and is_embedding_or_output_parameter(name)
        optimizer = config.optimizer
        if optimizer == "muon" and not is_updated_by_muon(name, parameter, specs.get(name)):
            optimizer = "adam"
        group = groups.setdefault((decays, decoupled, optimizer), _new_group(decays, decoupled, optimizer, config))
        group["names"].append(name)
        group["params"].append(parameter)
    return list(groups.values())


def _new_group(decays: bool, decoupled: bool, optimizer: str, config: OptimizerConfig) -> dict[str, Any]:
    wd_mult = 1.0 if decays else 0.0
    group: dict[str, Any] = {
        "names": [],
        "params": [],
        "optimizer": optimizer,
        "wd_mult": wd_mult,
        "weight_decay": config.weight_decay * wd_mult,
        "default_config": not decoupled,
    }
    if decoupled:
        group["max_lr"] = config.decoupled_lr
        if config.decoupled_min_lr is not None:
            group["min_lr"] = config.decoupled_min_lr
    group["lr"] = group.get("max_lr", config.lr or 0.0)
    return group
