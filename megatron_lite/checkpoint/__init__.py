"""Checkpoints on torch.distributed.checkpoint: durable, readable at any layout, and safe to open."""

from typing import TYPE_CHECKING

from megatron_lite.lazy import names_from

if TYPE_CHECKING:
    from megatron_lite.checkpoint.background import BackgroundSaver
    from megatron_lite.checkpoint.checkpointing import (
        CheckpointState,
        load_checkpoint,
        load_weights,
        save_checkpoint,
    )
    from megatron_lite.checkpoint.common import read_common
    from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpointError
    from megatron_lite.checkpoint.folders import find_checkpoint, read_tracker
    from megatron_lite.checkpoint.replicas import verify_all_replicas, verify_replicas

__all__ = [
    "BackgroundSaver",
    "CheckpointError",
    "CheckpointState",
    "DamagedCheckpointError",
    "find_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_common",
    "read_tracker",
    "save_checkpoint",
    "verify_all_replicas",
    "verify_replicas",
]

_HOMES = {
    "BackgroundSaver": "background",
    "CheckpointError": "errors",
    "CheckpointState": "checkpointing",
    "DamagedCheckpointError": "errors",
    "find_checkpoint": "folders",
    "load_checkpoint": "checkpointing",
    "load_weights": "checkpointing",
    "read_common": "common",
    "read_tracker": "folders",
    "save_checkpoint": "checkpointing",
    "verify_all_replicas": "replicas",
    "verify_replicas": "replicas",
}
__getattr__ = names_from(__name__, _HOMES)
