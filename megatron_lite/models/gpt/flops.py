"""Floating point operations of a training step, by Megatron-LM's convention."""

from megatron_lite.transformer.transformer_config import TransformerConfig


def num_floating_point_operations(
    config: TransformerConfig, padded_vocab_size: int, batch_size: int, sequence_length: int
) -> float:
    """Operations of one forward and backward pass over `batch_size` sequences.

    Counted are the matrix products: 2 operations per multiply-add, backward twice the forward. Attention counts the
    causal half of the scores, the output layer the padded vocabulary. As in Megatron-LM, norms, embeddings, rotary
    positions, softmax and recomputation are not counted.

    Args:
        config: shape of the layers.
        padded_vocab_size: width of the output layer.
        batch_size: sequences (of the global batch, for the global step).
        sequence_length: tokens per sequence.
    """
    hidden, head = config.hidden_size, config.kv_channels or 0
    queries = config.num_attention_heads * head
    keys = (config.num_query_groups or config.num_attention_heads) * head
    matrices = 3 if config.gated_linear_unit else 2
    projections = hidden * (queries + 2 * keys) + queries * hidden
    mlp = matrices * hidden * (config.ffn_hidden_size or 0)
    tokens = batch_size * sequence_length
    per_token = 6.0 * (config.num_layers * (projections + mlp) + hidden * padded_vocab_size)
    # 2 products (scores, and probabilities times values) x 2 operations x 3 passes, halved: half the scores are masked.
    attention_core = 6.0 * queries * sequence_length * config.num_layers
    return tokens * (per_token + attention_core)
