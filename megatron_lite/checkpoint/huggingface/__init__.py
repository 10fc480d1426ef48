"""Weights of the `transformers` package's models, to ours and back: one table for each family serves both ways."""

from megatron_lite.checkpoint.conversion.architecture import Architecture, architecture_of
from megatron_lite.checkpoint.huggingface.loading import load_huggingface
from megatron_lite.checkpoint.huggingface.settings import (
    config_of,
    departures,
    disagreements,
    flags_of,
    read_architecture,
    read_config,
    settings_of,
)

__all__ = [
    "Architecture",
    "architecture_of",
    "config_of",
    "departures",
    "disagreements",
    "flags_of",
    "load_huggingface",
    "read_architecture",
    "read_config",
    "settings_of",
]
