"""The kinds of attention mask, named as in Megatron."""

import enum


class AttnMaskType(enum.Enum):
    """Which positions a query may look at besides what an explicit mask says."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5

    @property
    def is_causal(self) -> bool:
        """True if no query may look at a later position, whatever explicit mask is given."""
        return self in (AttnMaskType.causal, AttnMaskType.padding_causal)
