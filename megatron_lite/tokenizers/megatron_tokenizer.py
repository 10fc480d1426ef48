"""What the rest of the package knows of a tokenizer."""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from megatron_lite.errors import ConfigError


class MegatronTokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, special ones included, before any padding of the vocabulary.
        eod: id that ends a document.
        bos, eos, pad, unk: ids of other special tokens, None for those the tokenizer lacks.
    """

    vocab_size: int
    eod: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None

    def __init__(self, path: str | None, **settings: Any) -> None:
        self.path = path
        self._settings = settings

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of a text."""

    @abstractmethod
    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What tells this tokenizer from others, worded as Megatron words it: names of cached indices hang on it."""
        return {
            "class": "megatron.core.tokenizers.text.text_tokenizer.MegatronTokenizerText",
            "tokenizer_path": self.path,
            **{name: str(value) for name, value in self._settings.items()},
        }


def optional_id(token_id: int | None) -> int | None:
    """The id, or None for the negative number by which some libraries say that there is none."""
    return None if token_id is None or token_id < 0 else token_id


def require_file(path: str | None, flag: str, tokenizer_type: str) -> str:
    """The path, having checked that it is a file.

    Raises:
        ConfigError: it is not given or not there.
    """
    if path is None:
        raise ConfigError(f"{tokenizer_type} needs {flag} with the path of a file.")
    if not os.path.isfile(path):
        raise ConfigError(f"{flag} is {path!r}, which is not a file; write the path of an existing one.")
    return path


def require_package(name: str, needed_by: str, extra: str = "tokenizers") -> ModuleType:
    """Import an optional package, which this extra of the project brings along.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{needed_by} needs the Python package {name!r}, which cannot be imported ({error}); "
            f"install it with: pip install 'megatron_lite[{extra}]'"
        ) from error
