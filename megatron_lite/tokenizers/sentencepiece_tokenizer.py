"""Tokenizers in SentencePiece's model format."""

from collections.abc import Iterable, Sequence

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer, optional_id, require_file, require_package


class SentencePieceTokenizer(MegatronTokenizer):
    """A SentencePiece model. Its end-of-sequence symbol ends documents.

    Args:
        tokenizer_path: the `.model` file.
        special_tokens: must be empty: symbols are given to the model when it is trained.
    """

    def __init__(self, tokenizer_path: str | None, special_tokens: Sequence[str] | None = None) -> None:
        path = require_file(tokenizer_path, "--tokenizer-model", type(self).__name__)
        if special_tokens:
            raise ConfigError(
                f"A SentencePiece model has its symbols from training and cannot be given {list(special_tokens)}; "
                "drop --tokenizer-special-tokens or train with user_defined_symbols."
            )
        super().__init__(
            path, chat_template=None, ignore_extra_whitespaces=True, legacy=False, special_tokens=special_tokens
        )
        sentencepiece = require_package("sentencepiece", type(self).__name__)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"--tokenizer-model {path!r} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        self.bos = optional_id(self._processor.bos_id())
        self.eos = optional_id(self._processor.eos_id())
        self.pad = optional_id(self._processor.pad_id())
        self.unk = optional_id(self._processor.unk_id())
        if self.eos is None:
            raise ConfigError(
                f"The SentencePiece model {path!r} has no end-of-sequence symbol, which is needed to end documents; "
                "train it with an eos_id."
            )
        self.eod = self.eos

    def tokenize(self, text: str) -> list[int]:
        """The ids of the text, without symbols around it."""
        return self._processor.encode(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of the ids; control symbols vanish."""
        return self._processor.decode([int(token) for token in ids])


class GPTSentencePieceTokenizer(SentencePieceTokenizer):
    """Megatron's second name of SentencePieceTokenizer."""


class Llama2Tokenizer(SentencePieceTokenizer):
    """Megatron's name of SentencePieceTokenizer for Llama 2 models."""
