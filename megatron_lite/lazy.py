"""Modules and names that are imported when they are first used: --help reads all settings without waiting for torch."""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for a module until one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def names_from(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names (name -> module in the package) are imported on demand.

    A name must not be that of a module in the package, which would hide it once imported.
    """
    hidden = [name for name in homes if name in homes.values()]
    assert not hidden, f"{package}: {hidden} are names of modules too"

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return find
