"""Weights of other frameworks, to ours and back: what is common to Hugging Face's and Megatron-LM's."""
