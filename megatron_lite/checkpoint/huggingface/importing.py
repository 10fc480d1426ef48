"""A Hugging Face folder becomes a checkpoint of ours, one tensor at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture, Settings
from megatron_lite.checkpoint.conversion.importing import write_checkpoint
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.checkpoint.huggingface.folder import TensorFolder, require_safetensors
from megatron_lite.checkpoint.huggingface.loading import REMEDY
from megatron_lite.checkpoint.huggingface.settings import read_config, settings_of
from megatron_lite.checkpoint.huggingface.tying import refuse_own_head
from megatron_lite.errors import ConfigError

# In config.json -> our flag.
_PRECISIONS = {"float64": None, "float32": None, "bfloat16": "bf16", "float16": "fp16"}
_OF_16_BITS = {"BF16": "bf16", "F16": "fp16"}
# Kept in float32 whatever the model's precision is.
_ALWAYS_FLOAT32 = "e_score_correction_bias"


def settings_to_import(folder: str | Path) -> Settings:
    """Our settings of the model in a folder, with the precision and the depths that its tensors have.

    Raises:
        ConfigError: config.json cannot be read or expressed, or there are no safetensors.
        CheckpointError: the safetensors are damaged.
    """
    require_safetensors()
    _, config = read_config(folder)
    family, settings = settings_of(folder)
    theirs = TensorFolder(folder, family.prefix)
    transformer = settings["transformer"]
    layers, depths = transformer["num_layers"], 0
    while family.future and f"{family.prefix}layers.{layers + depths}.eh_proj.weight" in theirs.shapes:
        depths += 1
    if depths:
        transformer["mtp_num_layers"] = depths
    precision = _precision(config, theirs)
    transformer |= {name: name == precision for name in ("bf16", "fp16")}
    if transformer.get("num_moe_experts"):
        transformer["moe_grouped_gemm"] = True
    return settings


def _precision(config: ConfigJson, theirs: TensorFolder) -> str | None:
    """The 16 bits that a model computes with: as config.json says, else as all its tensors have; None for float32.

    Raises:
        ConfigError: config.json names another dtype.
    """
    named = config.get("dtype", config.get("torch_dtype"))
    if named is None:
        found = {dtype for name, dtype in theirs.dtypes.items() if not name.endswith(_ALWAYS_FLOAT32)}
        return _OF_16_BITS.get(found.pop()) if len(found) == 1 else None
    if named not in _PRECISIONS:
        key = "dtype" if config.get("dtype") is not None else "torch_dtype"
        raise ConfigError(f"{key} is {named!r} in {config.path}, but must be one of: {', '.join(_PRECISIONS)}.")
    return _PRECISIONS[named]


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
    if model.gpt.share_embeddings_and_output_weights:
        refuse_own_head(theirs, family)
    return write_checkpoint(root, theirs, family, model, config_dict, announce, REMEDY)
