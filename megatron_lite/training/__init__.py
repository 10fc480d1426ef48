"""The training loop and what hangs on it: start-up, steps, evaluation, metrics, logging, stopping."""
