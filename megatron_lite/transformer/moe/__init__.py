"""Mixture of experts: router, balance, dispatch, grouped experts."""
