"""Floating point operations of a training step, by Megatron-LM's convention."""

from megatron_lite.transformer.transformer_config import TransformerConfig


def num_floating_point_operations(
    config: TransformerConfig, padded_vocab_size: int, batch_size: int, sequence_length: int
) -> float:
    """Operations of one forward and backward pass over `batch_size` sequences.

    Counted are the matrix products: 2 operations per multiply-add, backward twice the forward. Attention counts the
    causal half of the scores, the output layer the padded vocabulary, a layer of experts the topk that a token goes to
    and the shared ones. As in Megatron-LM, norms, embeddings, rotary positions, softmax, the router's product, the gate
    of shared experts and recomputation are not counted, and tokens that an expert's capacity drops are.

    Args:
        config: shape of the layers.
        padded_vocab_size: width of the output layer.
        batch_size: sequences (of the global batch, for the global step).
        sequence_length: tokens per sequence.
    """
    hidden, head = config.hidden_size, config.kv_channels or 0
    queries = config.num_attention_heads * head
    keys = (config.num_query_groups or config.num_attention_heads) * head
    projections = hidden * (queries + 2 * keys) + queries * hidden
    tokens = batch_size * sequence_length
    per_token = 6.0 * (config.num_layers * projections + mlp_weights(config) + hidden * padded_vocab_size)
    # 2 products (scores, and probabilities times values) x 2 operations x 3 passes, halved: half the scores are masked.
    attention_core = 6.0 * queries * sequence_length * config.num_layers
    return tokens * (per_token + attention_core)


def mlp_weights(config: TransformerConfig) -> int:
    """Elements of the matrices that one token meets in the MLPs of all layers: h x width, 2 or 3 times if gated."""
    matrices = 3 if config.gated_linear_unit else 2
    with_experts = config.num_moe_layers
    width = (config.num_layers - with_experts) * (config.ffn_hidden_size or 0)
    if with_experts:
        chosen = config.moe_router_topk * (config.moe_ffn_hidden_size or 0)
        width += with_experts * (chosen + (config.moe_shared_expert_intermediate_size or 0))
    return matrices * config.hidden_size * width
