"""What a checkpoint that cannot be saved or loaded raises."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded: says which one, what was expected, and what to do."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, cut short or changed: an earlier checkpoint may be whole."""
