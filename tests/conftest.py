"""Fixtures for all tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.parallel.pool import WorkerPool

# Deviations of the layouts that ran in this process, by layout.
MEASURED: pytest.StashKey[dict[Any, dict[str, float]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the layout matrix, and of the tests of kills and of damaged files."""
    parser.addoption("--full-matrix", action="store_true", help="run all layouts, and all tests marked full")
    parser.addoption("--kills", type=int, default=1, help="how often test_killed_runs_resume_bit_for_bit kills a run")
    parser.addoption("--inputs", type=int, default=200, help="damaged files of each kind in test_hostile_files.py")
    parser.addoption("--layout-table", metavar="FILE", help="write their deviations as a Markdown table")


def pytest_configure(config: pytest.Config) -> None:
    """A place for the deviations."""
    config.stash[MEASURED] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --full-matrix, tests marked full are left out."""
    if config.getoption("--full-matrix"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for multi-process tests, shared by the whole session."""
    workers = WorkerPool()
    yield workers
    workers.close()
