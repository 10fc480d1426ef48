"""A Megatron-LM checkpoint becomes one of ours, one tensor at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.conversion.importing import Further, write_checkpoint
from megatron_lite.checkpoint.megatron.folder import MegatronCheckpoint
from megatron_lite.checkpoint.megatron.naming import MegatronNaming

REMEDY = "Its arguments describe another model than its tensors: it cannot be imported."


def import_megatron(
    theirs: MegatronCheckpoint,
    root: str | Path,
    model: Architecture,
    config_dict: Mapping[str, Any],
    announce: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write a checkpoint of ours in one process: weights, and if they can be had moments and where the run stood.

    Args:
        theirs: the checkpoint.
        root: folder of checkpoints of ours.
        model: `settings_of` theirs as configurations.
        config_dict: what the checkpoint says of its settings.
        announce: called with the name of each tensor before it is read.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the files are damaged, or hold tensors that the model has not.
    """
    naming = MegatronNaming(gated=model.transformer.gated_linear_unit)
    further = run_of(theirs) if can_continue(theirs) else None
    return write_checkpoint(root, theirs.weights, naming, model, config_dict, announce, REMEDY, further)


def can_continue(theirs: MegatronCheckpoint) -> bool:
    """Whether the run can go on where it stopped: the optimizer's state is stored parameter by parameter."""
    return len(theirs.moments) == 2 and theirs.updates is not None and "num_steps" in theirs.schedule


def run_of(theirs: MegatronCheckpoint) -> Further:
    """Moments, schedule and position of a run."""
    assert theirs.updates is not None
    consumed = {name: theirs.arguments.get(name) or 0 for name in ("consumed_train_samples", "consumed_valid_samples")}
    progress = {"iteration": theirs.iteration, **consumed}
    extra = {"progress": progress, "scheduler": theirs.schedule}
    return Further(theirs.iteration, extra, theirs.moments, theirs.updates)
