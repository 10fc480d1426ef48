"""Filling a model of ours, at any layout, with the weights of a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.agreement import agreed, union_of_names
from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.folder import TensorFolder, find_safetensors, require_safetensors
from megatron_lite.checkpoint.huggingface.pieces import Piece, put
from megatron_lite.checkpoint.huggingface.settings import read_config
from megatron_lite.checkpoint.huggingface.sources import Sizes
from megatron_lite.checkpoint.model_state import fill_copies, listed, local_tensor, model_tensors, with_closest
from megatron_lite.model_chunks import ModelChunks, as_chunks
from megatron_lite.tensor_parallel.parameters import stored_indices
from megatron_lite.transformer.transformer_config import TransformerConfig


@torch.no_grad()
def load_huggingface(folder: str | Path, model_chunks: ModelChunks) -> None:
    """Fill a model with the weights of a Hugging Face folder, each rank the slices it stores. Collective.

    The settings of the model are not compared with config.json (`disagreements`), names and shapes are. Rows of the
    vocabulary's padding become zero. Optimizers that update the parameters need nothing more: these are the masters.

    Args:
        folder: with config.json and safetensors, visible to every rank.
        model_chunks: of this rank, on their device, wrapped for data parallelism or not.

    Raises:
        ConfigError: the folder holds no model that can be read, or the package safetensors is missing.
        CheckpointError: the files are damaged, or the tensors are not those of this model.
    """
    require_safetensors()
    family, _ = read_config(folder)
    find_safetensors(folder)
    chunks = as_chunks(model_chunks)
    what = f"Reading {folder}"
    own = model_tensors(chunks)
    theirs = agreed(what, lambda: TensorFolder(folder, family.prefix))
    pieces = agreed(what, lambda: pieces_of_tensors(own, family, chunks[0]))
    wanted = {piece.name: piece for found in pieces.values() for piece in found if not piece.is_copy}
    wanted_anywhere = union_of_names(wanted)
    agreed(what, lambda: compare(wanted, wanted_anywhere, theirs, family, chunks[0]))

    def fill() -> None:
        for name, tensor in own.items():
            fill_tensor(local_tensor(tensor), stored_indices(tensor), pieces[name], theirs)

    agreed(what, fill)
    fill_copies(chunks)


def fill_tensor(target: Tensor, stored: list[range], pieces: list[Piece], theirs: TensorFolder) -> None:
    """Read one parameter of ours, or the part of it with these indices; what no piece has becomes zero."""
    rows = [len(one.places[0]) for one in pieces if not isinstance(one.places[0], int)]
    if stored and rows and stored[0].stop > max(rows):
        target.zero_()
    for piece in pieces:
        if not piece.is_copy:
            put(piece, target, stored, theirs.read)


def pieces_of_tensors(own: Mapping[str, Tensor], family: Family, model: Any) -> dict[str, list[Piece]]:
    """What each of these parameters is made of."""
    config: TransformerConfig = model.config
    sizes = sizes_of(config, model.vocab_size)
    depths = config.mtp_num_layers or 0
    return {name: family.pieces(name, one.shape, sizes, config.num_layers, depths) for name, one in own.items()}


def sizes_of(config: TransformerConfig, vocab_size: int) -> Sizes:
    """What the places of rows depend on."""
    return Sizes(config.num_attention_heads, config.num_query_groups or config.num_attention_heads, vocab_size)


def compare(
    wanted: Mapping[str, Piece], wanted_anywhere: set[str], theirs: TensorFolder, family: Family, model: Any
) -> None:
    """Check that the folder holds exactly the tensors that the model is made of, in their shapes.

    Raises:
        CheckpointError: lists what is missing, what nobody wants, and what has another shape.
    """
    config = model.config
    missing = sorted(set(wanted) - set(theirs.shapes))
    unwanted = [
        name
        for name in sorted(set(theirs.shapes) - wanted_anywhere)
        if not family.is_ignorable(
            name, config.num_layers, config.mtp_num_layers or 0, model.share_embeddings_and_output_weights
        )
    ]
    reshaped = [
        f"{name}: {list(theirs.shapes[name])} in the folder, {list(piece.shape)} in this model"
        for name, piece in sorted(wanted.items())
        if name in theirs.shapes and theirs.shapes[name] != piece.shape
    ]
    if not (missing or unwanted or reshaped):
        return
    lines = [f"{theirs.folder} does not fit this model of type {family.model_type}."]
    lines += listed("not in the folder", [with_closest(name, unwanted) for name in missing])
    lines += listed("in the folder, but of no use", [with_closest(name, missing) for name in unwanted])
    lines += listed("another shape", reshaped)
    lines.append("Give the flags that its config.json asks for, or another folder.")
    raise CheckpointError("\n".join(lines))
