"""What a model of ours computes, and the model without its storage."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.transformer.transformer_config import TransformerConfig

Settings = dict[str, dict[str, Any]]
"""Our settings of a model, in the groups "transformer" and "gpt"."""

OF_GPT = frozenset(one.name for one in dataclasses.fields(GPTModelConfig))


@dataclass(frozen=True)
class Architecture:
    """What a model of ours computes: its two configurations, and the tokens it knows (None: not known yet)."""

    transformer: TransformerConfig
    gpt: GPTModelConfig
    vocab_size: int | None


def grouped(flat: dict[str, Any]) -> Settings:
    """Settings by name in their groups; what is None has our default and is left out."""
    given = {name: value for name, value in flat.items() if value is not None}
    return {
        "transformer": {name: value for name, value in given.items() if name not in OF_GPT},
        "gpt": {name: value for name, value in given.items() if name in OF_GPT},
    }


def architecture_of(settings: Settings) -> Architecture:
    """The configurations that settings make.

    Raises:
        ConfigError: they break a rule of ours.
    """
    transformer = TransformerConfig(**settings["transformer"])
    gpt = GPTModelConfig(**settings["gpt"])
    problems = transformer.violations() + gpt.violations()
    if problems:
        raise ConfigError.from_violations(problems)
    return Architecture(transformer, gpt, gpt.vocab_size)


def empty_model(model: Architecture, padded_vocab_size: int | None = None) -> GPTModel:
    """The model without storage, in one process."""
    assert model.vocab_size is not None, "the size of the vocabulary is known"
    gpt = model.gpt
    if padded_vocab_size is not None:
        gpt = dataclasses.replace(gpt, padded_vocab_size=padded_vocab_size, pad_vocab_size=True)
    with torch.device("meta"):
        return build_gpt_model(model.transformer, gpt, model.vocab_size, gpt.max_position_embeddings or 1)
