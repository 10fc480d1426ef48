"""Weights of Megatron-LM's `torch_dist` checkpoints, to ours."""

from megatron_lite.checkpoint.megatron.folder import MegatronCheckpoint, find_megatron
from megatron_lite.checkpoint.megatron.importing import can_continue, import_megatron
from megatron_lite.checkpoint.megatron.settings import architecture_of_run, settings_of, tokenizer_of

__all__ = [
    "MegatronCheckpoint",
    "architecture_of_run",
    "can_continue",
    "find_megatron",
    "import_megatron",
    "settings_of",
    "tokenizer_of",
]
