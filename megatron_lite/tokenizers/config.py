"""Which tokenizer: the flags of Megatron's group "tokenizer"."""

from dataclasses import dataclass

from megatron_lite.config_field import Validated, knob

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "NullTokenizer",
    "ByteLevelTokenizer",
)


@dataclass
class TokenizerConfig(Validated):
    """The tokenizer of a run."""

    tokenizer_type: str | None = knob(
        None, "Kind of tokenizer, GPT2BPETokenizer if none is named.", choices=TOKENIZER_TYPES
    )
    tokenizer_model: str | None = knob(
        None, "SentencePiece .model, tokenizer.json or its folder, or tiktoken JSON.", metavar="FILE"
    )
    vocab_size: int | None = knob(
        None, "Vocabulary before padding; needed by NullTokenizer, otherwise the tokenizer's own."
    )
    vocab_file: str | None = knob(None, "vocab.json of GPT2BPETokenizer.", metavar="FILE")
    merge_file: str | None = knob(None, "merges.txt of GPT2BPETokenizer.", metavar="FILE")
    tokenizer_special_tokens: list[str] | None = knob(None, "Special tokens to add.", metavar="TOKEN")
    tiktoken_pattern: str | None = knob(None, "How TikTokenizer cuts words.", choices=("v1", "v2"))
    tiktoken_num_special_tokens: int = knob(1000, "Ids TikTokenizer sets aside for special tokens.")
    tokenizer_hf_no_use_fast: bool = knob(False, "Ask transformers for its slow implementation.")
    tokenizer_hf_no_include_special_tokens: bool = knob(
        False, "Do not let a Hugging Face tokenizer put special tokens around each text."
    )
    trust_remote_code: bool = knob(False, "Let transformers run code that comes with a tokenizer.")
    null_tokenizer_eod_id: int | None = knob(None, "End-of-document id of NullTokenizer, the last one by default.")
    null_tokenizer_pad_id: int = knob(-1, "Padding id of NullTokenizer, negative for none.")

    def violations(self) -> list[str]:
        """See Validated."""
        found = super().violations()
        if self.tokenizer_type == "NullTokenizer" and self.vocab_size is None:
            found.append("tokenizer_type is NullTokenizer, which has no vocabulary of its own; give --vocab-size.")
        return found

    @property
    def lacks_model(self) -> bool:
        """Whether the tokenizer is one that is read from a file or folder, and none is named."""
        return self.tokenizer_type in TOKENIZER_TYPES[1:6] and self.tokenizer_model is None
