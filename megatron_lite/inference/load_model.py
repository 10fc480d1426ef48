"""A model and its tokenizer from a checkpoint alone, or a Hugging Face folder: their settings are stored in it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from megatron_lite.checkpoint import CheckpointError, find_checkpoint, load_weights, read_common, read_tracker
from megatron_lite.checkpoint.conversion.architecture import architecture_of
from megatron_lite.checkpoint.huggingface import load_huggingface
from megatron_lite.checkpoint.huggingface.importing import settings_to_import
from megatron_lite.checkpoint.huggingface.tokenizer_files import tokenizer_in
from megatron_lite.checkpoint.safe_reader import read_metadata, tensor_shapes
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.tokenizers import build_tokenizer
from megatron_lite.tokenizers.config import TokenizerConfig
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.value_parsing import convert

C = TypeVar("C")
_EMBEDDING = "model.embedding.word_embeddings.weight"


@dataclass
class LoadedModel:
    """A model in evaluation mode with its tokenizer, and the iteration it was saved at."""

    model: GPTModel
    tokenizer: MegatronTokenizer
    iteration: int


def load_model(
    root: str | Path,
    ckpt_step: int | None = None,
    *,
    tensor_model_parallel_size: int = 1,
    device: torch.device | str = "cpu",
    tokenizer_model: str | None = None,
) -> LoadedModel:
    """Rebuild the model that a checkpoint holds, whatever layout it was saved at, and load its weights.

    Args:
        root: folder of checkpoints, with a tracker.
        ckpt_step: iteration to load; default the latest.
        tensor_model_parallel_size: that of the initialized groups; 1 needs no process group.
        device: where the model goes.
        tokenizer_model: path to use instead of the stored one, if the tokenizer has moved.

    Raises:
        CheckpointError: there is no checkpoint, or its settings cannot be read.
    """
    iteration = read_tracker(root) if ckpt_step is None else ckpt_step
    if iteration is None:
        raise CheckpointError(f"There is no checkpoint in {root}: give the folder that --save wrote to.")
    folder = find_checkpoint(root, iteration)
    settings = read_common(folder)["config"]
    one_process = {
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "cp_comm_type": None,
        "hierarchical_context_parallel_sizes": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "sequence_parallel": False,
        "tp_comm_overlap": False,
        "transformer_impl": "auto",
        "norm_impl": "torch",
        # Every package is not everywhere, and what one token gets must not depend on which others are there.
        "moe_token_dispatcher_type": "allgather",
        "moe_enable_deepep": False,
        "moe_expert_capacity_factor": None,
        "moe_pad_expert_input_to_capacity": False,
        "moe_shared_expert_overlap": False,
        "moe_layer_recompute": False,
        # Scales of a whole tensor would let one sequence depend on the others of its batch.
        "fp8": None,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    transformer = rebuild_config(TransformerConfig, settings, "transformer", folder, one_process | {
        "tensor_model_parallel_size": tensor_model_parallel_size,
    })  # fmt: skip
    # The stored tensor knows how far the vocabulary was padded, which may depend on the layout of the save.
    embedding = tensor_shapes(read_metadata(folder)).get(_EMBEDDING)
    padded = {} if embedding is None else {"padded_vocab_size": embedding[0], "pad_vocab_size": True}
    gpt = rebuild_config(GPTModelConfig, settings, "gpt", folder, padded)
    # A stranger's checkpoint must not decide that code which comes with a tokenizer is run here.
    own: dict[str, Any] = {"trust_remote_code": False}
    if tokenizer_model is not None:
        own["tokenizer_model"] = tokenizer_model
    tokenizer = build_tokenizer(rebuild_config(TokenizerConfig, settings, "tokenizer", folder, own))
    if gpt.max_position_embeddings is None:
        raise CheckpointError(f"{folder} does not say how long a sequence may be (gpt.max_position_embeddings).")
    model = _empty_model(transformer, gpt, tokenizer.vocab_size, device)
    load_weights(folder, model)
    # Training keeps master weights in float32 and casts them for each step; here they are cast once.
    return LoadedModel(model.to(transformer.params_dtype).eval(), tokenizer, iteration)


def load_huggingface_model(
    folder: str | Path,
    *,
    tensor_model_parallel_size: int = 1,
    device: torch.device | str = "cpu",
    tokenizer_model: str | None = None,
) -> LoadedModel:
    """The same from a Hugging Face folder, in the precision of its tensors.

    Raises:
        ConfigError: it holds no model or tokenizer that can be read.
        CheckpointError: its files are damaged.
    """
    settings = settings_to_import(folder)
    settings["transformer"] |= {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "mtp_num_layers": None,  # for training only
    }
    described = architecture_of(settings)
    found = tokenizer_in(tokenizer_model or folder)
    if found is None and tokenizer_model is not None:
        found = "HuggingFaceTokenizer", tokenizer_model
    if found is None:
        raise ConfigError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json): write "
            "--tokenizer-model with the folder of one."
        )
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type=found[0], tokenizer_model=found[1]))
    model = _empty_model(described.transformer, described.gpt, tokenizer.vocab_size, device)
    load_huggingface(folder, model)
    return LoadedModel(model.to(described.transformer.params_dtype).eval(), tokenizer, 0)


def _empty_model(
    transformer: TransformerConfig, gpt: GPTModelConfig, vocab_size: int, device: torch.device | str
) -> GPTModel:
    """The model to fill, whose logits are whole on every rank."""
    assert gpt.max_position_embeddings is not None, "the longest sequence is known"
    with torch.device("meta"):
        model = build_gpt_model(transformer, gpt, vocab_size, gpt.max_position_embeddings, parallel_output=False)
    return model.to_empty(device=device)


def rebuild_config(kind: type[C], settings: dict[str, Any], group: str, folder: Path, changes: dict[str, Any]) -> C:
    """A configuration from its stored values; fields this version does not know are left out."""
    stored = settings.get(group)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{folder} does not hold the settings of its {group}, from which to rebuild it.")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for described in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = described.name
        if not described.init or name not in stored or hints[name] is torch.dtype:
            continue
        try:
            values[name] = convert(stored[name], hints[name])
        except ValueError as error:
            raise CheckpointError(f"{folder}: {group}.{name} is {stored[name]!r}, but should be {error}.") from error
    return kind(**values | changes)
