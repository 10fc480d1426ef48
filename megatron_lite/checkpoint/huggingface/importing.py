"""A Hugging Face folder becomes a checkpoint of ours, one tensor at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture, Settings
from megatron_lite.checkpoint.conversion.importing import write_checkpoint
from megatron_lite.checkpoint.huggingface.folder import TensorFolder, require_safetensors
from megatron_lite.checkpoint.huggingface.loading import REMEDY
from megatron_lite.checkpoint.huggingface.settings import flags_of, read_config


def settings_to_import(folder: str | Path) -> Settings:
    """Our settings of the model in a folder, with the precision and the depths that its tensors have.

    Raises:
        ConfigError: config.json cannot be read or expressed, or there are no safetensors.
        CheckpointError: the safetensors are damaged.
    """
    require_safetensors()
    family, config = read_config(folder)
    settings = flags_of(family, config)
    theirs = TensorFolder(folder, family.prefix)
    transformer = settings["transformer"]
    layers, depths = transformer["num_layers"], 0
    while family.future and f"{family.prefix}layers.{layers + depths}.eh_proj.weight" in theirs.shapes:
        depths += 1
    if depths:
        transformer["mtp_num_layers"] = depths
    dtypes = set(theirs.dtypes.values())
    transformer |= {"bf16": "BF16" in dtypes, "fp16": "F16" in dtypes and "BF16" not in dtypes}
    if transformer.get("num_moe_experts"):
        transformer["moe_grouped_gemm"] = True
    return settings


def import_checkpoint(
    folder: str | Path,
    root: str | Path,
    model: Architecture,
    config_dict: Mapping[str, Any],
    announce: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write a checkpoint with the weights of a Hugging Face folder and these settings, in one process.

    Args:
        folder: with config.json and safetensors.
        root: folder of checkpoints; the new one is of iteration 0.
        model: `settings_to_import` of the folder as configurations.
        config_dict: what the checkpoint says of its settings.
        announce: called with the name of each parameter before it is read.

    Returns:
        The folder of the checkpoint.

    Raises:
        ConfigError, CheckpointError: see load_huggingface.
    """
    family, _ = read_config(folder)
    theirs = TensorFolder(folder, family.prefix)
    return write_checkpoint(root, theirs, family, model, config_dict, announce, REMEDY)
