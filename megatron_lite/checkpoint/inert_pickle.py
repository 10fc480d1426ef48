"""Pickles read as a notation for data: no name is looked up, no code of theirs or of any module is run.

Objects become inert records that keep what the pickle gives them. Lists, dictionaries, tuples, texts and numbers are
themselves.
"""

import io
import pickle
import pickletools
from collections.abc import Collection
from typing import Any

import torch

from megatron_lite.checkpoint.errors import CheckpointError

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


class Record:
    """What any object of a pickle becomes: its arguments and its state, and no behaviour.

    Attributes:
        arguments: what its class was called with.
        state: what its `__setstate__` would get, or None.
    """

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of other kinds of dictionary are dropped."""

    def append(self, value: Any) -> None:
        """Entries of other kinds of list are dropped."""


class _DataUnpickler(pickle.Unpickler):
    """Knows torch's dtypes; of all other names, records."""

    def __init__(self, file: io.BytesIO, known: Collection[tuple[str, str]] | None) -> None:
        super().__init__(file)
        self.known = known
        self.records: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if self.known is not None and (module, name) not in self.known:
            raise CheckpointError(
                f"it names {module}.{name}, which no checkpoint of tensors needs. The file may be made to run code "
                "on the machine that opens it; nothing of it was run."
            )
        return self.records.setdefault(name, type(name, (Record,), {}))

    def persistent_load(self, pid: Any) -> Any:
        if self.known is not None:
            raise CheckpointError("it refers to an object outside the file")
        return Record(pid)


def read_inert(content: bytes, known: Collection[tuple[str, str]] | None = None) -> Any:
    """The data of a pickle.

    Args:
        content: the pickle.
        known: (module, name) of the classes that may appear; None allows any, as they are records anyway.

    Raises:
        CheckpointError: it names a class that is not known.
        Exception: of many kinds, for bytes that are no pickle.
    """
    _check_sizes(content)
    return _DataUnpickler(io.BytesIO(content), known).load()


def _check_sizes(content: bytes) -> None:
    """Refuse a pickle that would take much memory whatever its length, as one flipped bit can make it.

    Objects are numbered from 0 for later reference, and the unpickler makes room for as many as the largest number
    says. A byte array, of which neither DCP nor Megatron-LM writes any, gets its room before its bytes are there.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        out_of_bounds = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count
        if out_of_bounds or opcode.name == "BYTEARRAY8":
            raise pickle.UnpicklingError(f"{opcode.name} out of place")
