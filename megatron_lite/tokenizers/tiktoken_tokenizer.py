"""Tokenizers in Megatron's JSON form of tiktoken vocabularies."""

import base64
import binascii
import json
import os
from collections.abc import Iterable, Sequence

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer, require_file, require_package

LARGEST_VOCABULARY = 2**17

PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
}
"""Ways to cut a text into words before merging bytes."""

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


class TikTokenizer(MegatronTokenizer):
    """A tiktoken vocabulary. The first ids are special tokens; `</s>` ends documents.

    Args:
        tokenizer_path: JSON list of {"rank", "token_bytes" (base64), "token_str"}, ranks counting from 0.
        special_tokens: names of the first special tokens, among them all of SPECIAL_TOKENS.
        num_special_tokens: ids set aside for special tokens; those without a name are `<SPECIAL_id>`.
        pattern: which of PATTERNS.
        vocab_size: number of ids; further tokens of the file are left out. By default all, at most 131,072.
    """

    def __init__(
        self,
        tokenizer_path: str | None,
        special_tokens: Sequence[str] | None = None,
        num_special_tokens: int = 1000,
        pattern: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        path = require_file(tokenizer_path, "--tokenizer-model", type(self).__name__)
        optional = {"pattern": pattern, "vocab_size": vocab_size}
        super().__init__(
            path,
            chat_template=None,
            **{name: value for name, value in optional.items() if value},
            num_special_tokens=num_special_tokens,
            special_tokens=special_tokens,
        )
        names = _special_names(special_tokens, num_special_tokens)
        ranks = _read_ranks(path)
        self.vocab_size = vocab_size or min(len(ranks) + num_special_tokens, LARGEST_VOCABULARY)
        num_ranks = self.vocab_size - num_special_tokens
        if not 0 < num_ranks <= len(ranks):
            raise ConfigError(
                f"--vocab-size {self.vocab_size} less {num_special_tokens} special tokens leaves {num_ranks}, but "
                f"{path!r} has {len(ranks)}; write at most {len(ranks) + num_special_tokens}."
            )
        tiktoken = require_package("tiktoken", type(self).__name__)
        self._encoding = tiktoken.Encoding(
            name=os.path.basename(os.path.dirname(path)),
            pat_str=PATTERNS[pattern or "v2"],
            mergeable_ranks={token: rank + num_special_tokens for rank, token in enumerate(ranks[:num_ranks])},
            special_tokens={name: position for position, name in enumerate(names)},
        )
        self.unk, self.bos, self.eos, self.pad = (names.index(name) for name in ("<unk>", "<s>", "</s>", "<pad>"))
        self.eod = names.index("</s>")

    def tokenize(self, text: str) -> list[int]:
        """The ids of the text; names of special tokens in it become those tokens."""
        return self._encoding.encode(text, allowed_special="all")

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of the ids, names of special tokens included."""
        return self._encoding.decode([int(token) for token in ids])


def _special_names(given: Sequence[str] | None, number: int) -> list[str]:
    names = list(SPECIAL_TOKENS if given is None else given)
    if len(set(names)) != len(names) or not set(SPECIAL_TOKENS) <= set(names) or len(names) > number:
        raise ConfigError(
            f"The special tokens {names} must be different, at most --tiktoken-num-special-tokens {number}, and "
            f"include {', '.join(SPECIAL_TOKENS)}."
        )
    return names + [f"<SPECIAL_{position}>" for position in range(len(names), number)]


def _read_ranks(path: str) -> list[bytes]:
    """The tokens of the file in the order of their ranks."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
        ranks = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        in_order = [entry["rank"] for entry in entries] == list(range(len(entries)))
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise ConfigError(
            f"{path!r} is not a list of {{rank, token_bytes, token_str}} in JSON: {type(error).__name__}: {error}"
        ) from error
    if not in_order or ranks[:256] != [bytes([value]) for value in range(256)] or len(set(ranks)) != len(ranks):
        raise ConfigError(f"{path!r}: ranks must count from 0, begin with the 256 bytes, and have no token twice.")
    return ranks
