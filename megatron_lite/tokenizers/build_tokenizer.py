"""From the tokenizer settings of a run to its tokenizer."""

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers.bytelevel_tokenizer import ByteLevelTokenizer
from megatron_lite.tokenizers.config import TOKENIZER_TYPES, TokenizerConfig
from megatron_lite.tokenizers.huggingface_tokenizer import GPT2BPETokenizer, HuggingFaceTokenizer
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer
from megatron_lite.tokenizers.null_tokenizer import NullTokenizer
from megatron_lite.tokenizers.sentencepiece_tokenizer import (
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    SentencePieceTokenizer,
)
from megatron_lite.tokenizers.tiktoken_tokenizer import TikTokenizer


def build_tokenizer(config: TokenizerConfig) -> MegatronTokenizer:
    """The tokenizer that the flags of a run name.

    Raises:
        ConfigError: a file or package it needs is missing, or the settings do not fit together.
    """
    if config.lacks_model:
        raise ConfigError(f"tokenizer_type is {config.tokenizer_type}, which needs a tokenizer_model; name its file.")
    special_tokens = config.tokenizer_special_tokens
    match config.tokenizer_type or "GPT2BPETokenizer":
        case "GPT2BPETokenizer":
            return GPT2BPETokenizer(config.vocab_file, config.merge_file, special_tokens)
        case "SentencePieceTokenizer":
            return SentencePieceTokenizer(config.tokenizer_model, special_tokens)
        case "GPTSentencePieceTokenizer":
            return GPTSentencePieceTokenizer(config.tokenizer_model, special_tokens)
        case "Llama2Tokenizer":
            return Llama2Tokenizer(config.tokenizer_model, special_tokens)
        case "HuggingFaceTokenizer":
            return HuggingFaceTokenizer(
                config.tokenizer_model,
                special_tokens,
                include_special_tokens=not config.tokenizer_hf_no_include_special_tokens,
                use_fast=not config.tokenizer_hf_no_use_fast,
                trust_remote_code=config.trust_remote_code,
            )
        case "TikTokenizer":
            return TikTokenizer(
                config.tokenizer_model,
                special_tokens,
                config.tiktoken_num_special_tokens,
                config.tiktoken_pattern,
                config.vocab_size,
            )
        case "NullTokenizer":
            if config.vocab_size is None:
                raise ConfigError("NullTokenizer has no vocabulary of its own; give --vocab-size.")
            return NullTokenizer(config.vocab_size, config.null_tokenizer_eod_id, config.null_tokenizer_pad_id)
        case "ByteLevelTokenizer":
            return ByteLevelTokenizer()
        case other:
            raise ConfigError(f"tokenizer_type is {other!r}, but must be one of: {', '.join(TOKENIZER_TYPES)}.")
