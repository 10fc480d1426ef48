"""megatron_lite: GPT and Mixture-of-Experts pretraining in which the parallel layout never changes the mathematics."""

__version__ = "0.1.0"
