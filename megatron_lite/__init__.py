"""megatron_lite: GPT and Mixture-of-Experts pretraining in which the parallel layout never changes the mathematics."""

from megatron_lite import launcher as launcher  # first of all, as it notes who started this process

__version__ = "0.1.0"
