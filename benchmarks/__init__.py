"""Measurements of speed against other training loops; tools/benchmark.py is the command, README.md the results."""
