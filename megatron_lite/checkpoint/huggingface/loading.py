"""Filling a model of ours, at any layout, with the weights of a Hugging Face folder."""

from pathlib import Path

import torch

from megatron_lite.checkpoint.agreement import agreed, union_of_names, world
from megatron_lite.checkpoint.conversion.filling import compare, fill_tensor, pieces_of_tensors, pieces_to_read
from megatron_lite.checkpoint.huggingface.folder import TensorFolder, find_safetensors, require_safetensors
from megatron_lite.checkpoint.huggingface.settings import read_config
from megatron_lite.checkpoint.huggingface.tying import refuse_own_head
from megatron_lite.checkpoint.model_state import fill_copies, local_tensor, model_tensors
from megatron_lite.model_chunks import ModelChunks, as_chunks
from megatron_lite.tensor_parallel.parameters import stored_indices

REMEDY = "Give the flags that its config.json asks for, or another folder."


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
    wanted = pieces_to_read(pieces)
    wanted_anywhere = union_of_names(wanted)
    agreed(what, lambda: compare(wanted, wanted_anywhere, theirs, family, chunks[0], REMEDY))
    if chunks[0].share_embeddings_and_output_weights:
        # One rank reads all of both.
        agreed(what, lambda: refuse_own_head(theirs, family) if world()[0] == 0 else None)

    def fill() -> None:
        for name, tensor in own.items():
            fill_tensor(local_tensor(tensor), stored_indices(tensor), pieces[name], theirs)

    agreed(what, fill)
    fill_copies(chunks)
