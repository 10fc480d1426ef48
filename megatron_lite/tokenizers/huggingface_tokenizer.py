"""Tokenizers in Hugging Face's formats: `tokenizer.json`, GPT-2's two files, or what transformers can load."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer, require_file, require_package

GPT2_EOD = "<|endoftext|>"
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")
"""End-of-sequence tokens looked for, in this order, in a tokenizer whose settings name none."""

ROLES = ("bos", "eos", "pad", "unk")

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
"""Files beside a `tokenizer.json` that change what transformers makes of it."""


class HuggingFaceTokenizer(MegatronTokenizer):
    """The tokenizer that transformers' AutoTokenizer makes of a folder or name, with the same ids.

    A `tokenizer.json` that stands alone has only one reading and is left to the package `tokenizers`. Which tokens the
    files beside it add, and around what texts, depends on the class they name and on the version of transformers, so
    nothing else reads them here.

    Args:
        tokenizer_path: a `tokenizer.json`, a folder that holds one or what else transformers can load, or a name
            transformers knows; only such a name may make transformers download something.
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
        json_path, folder = tokenizer_path, os.path.dirname(tokenizer_path)
        if os.path.isdir(tokenizer_path):
            json_path, folder = os.path.join(tokenizer_path, "tokenizer.json"), tokenizer_path
        settings = [name for name in SETTINGS if os.path.isfile(os.path.join(folder, name))]
        if use_fast and os.path.isfile(json_path) and not settings:
            self._tokenizer, names = _load_json(json_path)
        else:
            self._tokenizer, names = _load_with_transformers(tokenizer_path, settings, use_fast, trust_remote_code)
        if special_tokens:
            self._tokenizer.add_special_tokens(list(special_tokens))
        vocabulary = self._tokenizer.get_vocab()
        # Ids can have gaps, and a model needs a row for each up to the largest.
        self.vocab_size = max(self._tokenizer.get_vocab_size(), 1 + max(vocabulary.values(), default=-1))
        names.setdefault("eos", next((end for end in USUAL_ENDS if end in vocabulary), None))
        self.bos, self.eos, self.pad, self.unk = (vocabulary.get(names.get(role)) for role in ROLES)
        if self.eos is None:
            raise ConfigError(
                f"No end-of-sequence token is known for {tokenizer_path!r}, which is needed to end documents; put "
                '"eos_token" into a tokenizer_config.json beside it.'
            )
        self.eod = self.eos

    def tokenize(self, text: str) -> list[int]:
        """The ids of the text.

        Raises:
            ConfigError: the tokenizer has no token for a piece of it, not even one for unknown pieces.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=self._include_special_tokens).ids)
        except Exception as error:  # the package raises bare Exceptions
            raise ConfigError(f"The tokenizer {self.path!r} cannot take the text {text[:40]!r}: {error}") from error

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


def _load_json(path: str) -> tuple[Any, dict[str, str | None]]:
    """A tokenizer.json, and special tokens by role.

    A call before it was saved may have left truncation and padding in it, which transformers does not apply to texts
    either; but what was padded with becomes the padding token.
    """
    tokenizers = require_package("tokenizers", "HuggingFaceTokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(f"{path!r} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    if tokenizer.padding is None:
        return tokenizer, {}
    pad = tokenizer.padding["pad_token"]
    tokenizer.no_padding()
    if pad not in {token.content for token in tokenizer.get_added_tokens_decoder().values()}:
        tokenizer.add_special_tokens([pad])
    return tokenizer, {"pad": pad}


def _load_with_transformers(
    path: str, settings: Sequence[str], use_fast: bool, trust_remote_code: bool
) -> tuple[Any, dict[str, str | None]]:
    """Return transformers' tokenizer for a name, or a file or folder with these settings, and its special tokens."""
    what = f"the settings in {', '.join(settings)} at" if settings else "the name"
    transformers = require_package("transformers", f"HuggingFaceTokenizer, for {what} {path!r},")
    options: dict[str, Any] = {"use_fast": use_fast, "trust_remote_code": trust_remote_code}
    loader = transformers.AutoTokenizer
    try:
        if os.path.exists(path):
            folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
            config = _read_settings(os.path.join(folder, "tokenizer_config.json"))
            # Where no file names a class, AutoTokenizer takes this one, but in version 4 guesses by the folder's name.
            named = "config.json" in settings or config.get("tokenizer_class") or config.get("auto_map")
            if use_fast and not named:
                loader = transformers.PreTrainedTokenizerFast
            options |= {"local_files_only": True, **_unmarked_tokens(config, transformers.AddedToken)}
            if os.path.basename(path) != "tokenizer.json" and os.path.isfile(path):
                options["tokenizer_file"] = path
            path = folder
        loaded = loader.from_pretrained(path, **options)
    except Exception as error:  # it raises whatever a damaged file makes its classes raise
        raise ConfigError(
            f"transformers cannot load the tokenizer {path!r}: {type(error).__name__}: {error}"
        ) from error
    names = {role: loaded.special_tokens_map.get(f"{role}_token") for role in ROLES}
    return _TransformersTokenizer(loaded), {role: name for role, name in names.items() if name is not None}


def _read_settings(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def _unmarked_tokens(config: dict[str, Any], token_class: Any) -> dict[str, Any]:
    """Tokens that a tokenizer_config.json gives as objects without the mark by which transformers knows them."""
    return {
        key: token_class(**value)
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, dict) and "__type" not in value
    }


class _Encoding:
    """Ids, under the name that the package `tokenizers` gives them."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids


class _TransformersTokenizer:
    """A tokenizer of transformers with the few methods of `tokenizers.Tokenizer` used here."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def add_special_tokens(self, tokens: list[str]) -> None:
        self._loaded.add_tokens(tokens, special_tokens=True)

    def get_vocab_size(self) -> int:
        return len(self._loaded)

    def get_vocab(self) -> dict[str, int]:
        return self._loaded.get_vocab()

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:
        return _Encoding(self._loaded.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._loaded.decode(ids, skip_special_tokens=skip_special_tokens)
