"""The common part of the command lines that use a trained model: which model, and on which ranks it is loaded."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_lite import parallel_state
from megatron_lite.inference.load_model import LoadedModel, load_huggingface_model, load_model


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--load or --load-hf, and what belongs to them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--load", metavar="FOLDER", help="Folder of checkpoints.")
    source.add_argument("--load-hf", metavar="FOLDER", help="Folder of a Hugging Face model.")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="Iteration to load instead of the latest one.")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="Where the tokenizer is now, if it has moved.")


def is_first_rank() -> bool:
    """Return True in the process that writes."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def loaded_model(arguments: argparse.Namespace) -> Iterator[tuple[LoadedModel, torch.device]]:
    """The model of `add_model_flags` and its device; under torchrun it is split over all ranks.

    Raises:
        ConfigError, CheckpointError: it cannot be loaded.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = parallel_state.local_cuda_device()
        torch.cuda.set_device(device)
    where = {"tensor_model_parallel_size": ranks, "device": device, "tokenizer_model": arguments.tokenizer_model}
    try:
        if ranks > 1:
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        if arguments.load_hf is not None:
            yield load_huggingface_model(arguments.load_hf, **where), device
        else:
            yield load_model(arguments.load, arguments.ckpt_step, **where), device
    finally:
        if ranks > 1:
            parallel_state.shutdown()
