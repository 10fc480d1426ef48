"""A Hugging Face folder becomes a checkpoint of ours, one tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint import folders
from megatron_lite.checkpoint.checkpointing import _MODEL, _common, _complete
from megatron_lite.checkpoint.huggingface.config_json import Architecture
from megatron_lite.checkpoint.huggingface.folder import TensorFolder, require_safetensors
from megatron_lite.checkpoint.huggingface.loading import compare, fill_tensor, pieces_of_tensors
from megatron_lite.checkpoint.huggingface.settings import Settings, flags_of, read_config
from megatron_lite.checkpoint.model_state import model_tensors
from megatron_lite.checkpoint.tensor_files import write_tensors
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model

ITERATION = 0


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


@torch.no_grad()
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
    root, what = Path(root), f"Importing {folder}"
    family, _ = read_config(folder)
    theirs = TensorFolder(folder, family.prefix)
    empty = empty_model(model)
    own = model_tensors(empty)
    pieces = pieces_of_tensors(own, family, empty)
    wanted = {piece.name: piece for found in pieces.values() for piece in found if not piece.is_copy}
    compare(wanted, set(wanted), theirs, family, empty)

    def make(name: str) -> Tensor:
        name = name.removeprefix(_MODEL)
        announce(name)
        whole = torch.empty_like(own[name], device="cpu")
        fill_tensor(whole, [range(length) for length in whole.shape], pieces[name], theirs)
        return whole

    temporary = folders.open_temporary_folder(root, ITERATION)
    try:
        checksums = write_tensors(what, temporary, {_MODEL + name: one for name, one in own.items()}, make=make)
        return Path(_complete(root, ITERATION, _common(ITERATION, empty, {}, config_dict), checksums))
    except BaseException:
        folders.discard_temporary_folder(root, ITERATION)
        raise


def empty_model(model: Architecture, padded_vocab_size: int | None = None) -> GPTModel:
    """The model without storage, in one process."""
    assert model.vocab_size is not None, "the size of the vocabulary is known"
    gpt = model.gpt
    if padded_vocab_size is not None:
        gpt = replace(gpt, padded_vocab_size=padded_vocab_size, pad_vocab_size=True)
    with torch.device("meta"):
        return build_gpt_model(model.transformer, gpt, model.vocab_size, gpt.max_position_embeddings or 1)
