"""Tokenizers in Hugging Face's formats: `tokenizer.json`, GPT-2's two files, or what transformers can load."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer, require_file, require_package

GPT2_EOD = "<|endoftext|>"
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")
"""End-of-sequence tokens looked for, in this order, beside a `tokenizer.json` that no settings name one for."""


class HuggingFaceTokenizer(MegatronTokenizer):
    """A `tokenizer.json`, read by the package `tokenizers`, or else a name or folder for transformers to load.

    Args:
        tokenizer_path: a `tokenizer.json`, a folder that holds one, or a name transformers knows; only such a name may
            make transformers download something.
        special_tokens: tokens to add.
        include_special_tokens: put around each text what the tokenizer puts around a text by itself, such as its
            begin-of-sequence token.
        use_fast: False asks transformers for its slow implementation.
        trust_remote_code: let transformers run code that comes with the tokenizer.
    """

    def __init__(
        self,
        tokenizer_path: str | None,
        special_tokens: Sequence[str] | None = None,
        include_special_tokens: bool = True,
        use_fast: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        if tokenizer_path is None:
            raise ConfigError("HuggingFaceTokenizer needs --tokenizer-model: a tokenizer.json, its folder, or a name.")
        super().__init__(
            tokenizer_path,
            chat_template=None,
            vocab_file=None,
            merges_file=None,
            additional_special_tokens=list(special_tokens or []),
            use_fast=use_fast,
            trust_remote_code=trust_remote_code,
            include_special_tokens=include_special_tokens,
            use_gigatoken=False,
        )
        self._include_special_tokens = include_special_tokens
        json_path = tokenizer_path
        if os.path.isdir(tokenizer_path):
            json_path = os.path.join(tokenizer_path, "tokenizer.json")
        if os.path.isfile(json_path) and use_fast:
            self._tokenizer, names = _load_json(json_path)
        else:
            self._tokenizer, names = _load_with_transformers(tokenizer_path, use_fast, trust_remote_code)
        if special_tokens:
            self._tokenizer.add_special_tokens(list(special_tokens))
        self.vocab_size = self._tokenizer.get_vocab_size()
        ids = {role: self._tokenizer.token_to_id(name) for role, name in names.items()}
        self.bos, self.eos, self.pad, self.unk = (ids.get(role) for role in ("bos", "eos", "pad", "unk"))
        if self.eos is None:
            raise ConfigError(
                f"No end-of-sequence token is known for {tokenizer_path!r}, which is needed to end documents; put "
                '"eos_token" into a tokenizer_config.json beside it.'
            )
        self.eod = self.eos

    def tokenize(self, text: str) -> list[int]:
        """The ids of the text."""
        return list(self._tokenizer.encode(text, add_special_tokens=self._include_special_tokens).ids)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included if the tokenizer was to include them."""
        skip = not self._include_special_tokens
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip)


class GPT2BPETokenizer(MegatronTokenizer):
    """GPT-2's byte pair encoding from `vocab.json` and `merges.txt`; `<|endoftext|>` ends documents.

    Args:
        vocab_file: token -> id.
        merge_file: the merges, best first.
        special_tokens: tokens to add.
    """

    def __init__(
        self, vocab_file: str | None, merge_file: str | None, special_tokens: Sequence[str] | None = None
    ) -> None:
        vocab_path = require_file(vocab_file, "--vocab-file", type(self).__name__)
        merge_path = require_file(merge_file, "--merge-file", type(self).__name__)
        super().__init__(
            type(self).__name__,
            additional_special_tokens=list(special_tokens or []),
            vocab_file=vocab_path,
            merges_file=merge_path,
            use_fast=True,
            trust_remote_code=False,
            include_special_tokens=True,
            use_gigatoken=False,
        )
        tokenizers = require_package("tokenizers", type(self).__name__)
        try:
            self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab_path, merge_path))
        except Exception as error:  # the package raises bare Exceptions
            raise ConfigError(
                f"{vocab_path!r} and {merge_path!r} are not a vocabulary and its merges: {error}"
            ) from error
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
        if self._tokenizer.token_to_id(GPT2_EOD) is None:
            raise ConfigError(f"--vocab-file {vocab_path!r} has no {GPT2_EOD}, which is needed to end documents.")
        self._tokenizer.add_special_tokens([GPT2_EOD, *(special_tokens or [])])
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.eod = self.eos = self.bos = self.unk = self._tokenizer.token_to_id(GPT2_EOD)

    def tokenize(self, text: str) -> list[int]:
        """The ids of the text."""
        return list(self._tokenizer.encode(text).ids)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of the ids, ends of documents included."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


def _load_json(path: str) -> tuple[Any, dict[str, str]]:
    """A tokenizer.json, and the names of its special tokens by role."""
    tokenizers = require_package("tokenizers", "HuggingFaceTokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(f"{path!r} is not a tokenizer.json: {error}") from error
    names: dict[str, str] = {}
    for settings_name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings_path = os.path.join(os.path.dirname(path), settings_name)
        if not os.path.isfile(settings_path):
            continue
        try:
            with open(settings_path, encoding="utf-8") as file:
                settings = json.load(file)
            given = {
                role: settings[f"{role}_token"] for role in ("bos", "eos", "pad", "unk") if f"{role}_token" in settings
            }
            given = {role: value["content"] if isinstance(value, dict) else value for role, value in given.items()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{settings_path!r} is no JSON mapping of settings: {type(error).__name__}: {error}"
            ) from error
        strange = [f"{role}_token" for role, value in given.items() if not isinstance(value, str | None)]
        if strange:
            raise ConfigError(f"{settings_path!r}: {strange[0]} is not the text of a token.")
        names.update({role: value for role, value in given.items() if value is not None})
    if "eos" not in names:
        known = [end for end in USUAL_ENDS if tokenizer.token_to_id(end) is not None]
        if known:
            names["eos"] = known[0]
    return tokenizer, names


def _load_with_transformers(name: str, use_fast: bool, trust_remote_code: bool) -> tuple[Any, dict[str, str]]:
    transformers = require_package("transformers", f"HuggingFaceTokenizer without a tokenizer.json at {name!r}")
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            name, use_fast=use_fast, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load the tokenizer {name!r}: {error}") from error
    names = {role: getattr(loaded, f"{role}_token", None) for role in ("bos", "eos", "pad", "unk")}
    return _TransformersTokenizer(loaded), {role: token for role, token in names.items() if token is not None}


class _Encoding:
    """Ids, under the name that the package `tokenizers` gives them."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids


class _TransformersTokenizer:
    """A tokenizer of transformers with the few methods of `tokenizers.Tokenizer` used here."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def add_special_tokens(self, tokens: list[str]) -> None:
        self._loaded.add_special_tokens({"additional_special_tokens": tokens})

    def get_vocab_size(self) -> int:
        return len(self._loaded)

    def token_to_id(self, token: str) -> int | None:
        return self._loaded.convert_tokens_to_ids(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:
        return _Encoding(self._loaded.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._loaded.decode(ids, skip_special_tokens=skip_special_tokens)
