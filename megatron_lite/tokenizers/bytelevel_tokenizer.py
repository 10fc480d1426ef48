"""The tokenizer that needs no training: one token for each byte of UTF-8."""

from collections.abc import Iterable

from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer

NUM_BYTES = 256


class ByteLevelTokenizer(MegatronTokenizer):
    """Ids 0 to 255 are bytes, 256 ends a document."""

    def __init__(self) -> None:
        super().__init__(None, library="byte-level", eod_id=NUM_BYTES)
        self.vocab_size = NUM_BYTES + 1
        self.eod = self.eos = NUM_BYTES

    def tokenize(self, text: str) -> list[int]:
        """The bytes of the text in UTF-8."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of the bytes; ends of documents vanish."""
        return bytes(token for token in map(int, ids) if token < NUM_BYTES).decode("utf-8", errors="replace")
