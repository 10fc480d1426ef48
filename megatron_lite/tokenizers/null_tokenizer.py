"""A tokenizer for data that already consists of ids."""

from collections.abc import Iterable

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer, optional_id


class NullTokenizer(MegatronTokenizer):
    """Reads and writes ids as decimal numbers between spaces.

    Args:
        vocab_size: number of ids.
        eod_id: id that ends a document, the last one by default.
        pad_id: padding id, negative for none.
    """

    def __init__(self, vocab_size: int, eod_id: int | None = None, pad_id: int = -1) -> None:
        settings = {"vocab_size": vocab_size, "eod_id": eod_id, "pad_id": pad_id}
        super().__init__(None, **{name: value for name, value in settings.items() if value is not None})
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1 if eod_id is None else eod_id
        self.pad = optional_id(pad_id)
        for name, token_id in (("eod", self.eod), ("pad", self.pad)):
            if token_id is not None and not 0 <= token_id < vocab_size:
                raise ConfigError(f"The {name} id {token_id} is not below the vocabulary size {vocab_size}.")

    def tokenize(self, text: str) -> list[int]:
        """`"3 1 4"` gives `[3, 1, 4]`."""
        try:
            return [int(number) for number in text.split()]
        except ValueError as error:
            raise ConfigError(f"NullTokenizer reads numbers between spaces, not {text[:40]!r}.") from error

    def detokenize(self, ids: Iterable[int]) -> str:
        """`[3, 1, 4]` gives `"3 1 4"`."""
        return " ".join(str(int(token)) for token in ids)
