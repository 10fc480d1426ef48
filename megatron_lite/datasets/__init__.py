"""Tokenized data on disk, and the samples cut from it."""
