"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest

from tests.parallel.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for multi-process tests, shared by the whole session."""
    workers = WorkerPool()
    yield workers
    workers.close()
