"""Where a run stands."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Position of a run, saved in every checkpoint.

    Attributes:
        iteration: completed optimizer steps (skipped ones included).
        consumed_train_samples: sequences trained on; the position in the data and in every schedule.
        consumed_valid_samples: sequences evaluated on.
    """

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
