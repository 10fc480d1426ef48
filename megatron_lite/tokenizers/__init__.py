"""Tokenizers of several libraries behind one small interface."""

from megatron_lite.tokenizers.build_tokenizer import build_tokenizer
from megatron_lite.tokenizers.config import TokenizerConfig
from megatron_lite.tokenizers.megatron_tokenizer import MegatronTokenizer

__all__ = ["MegatronTokenizer", "TokenizerConfig", "build_tokenizer"]
