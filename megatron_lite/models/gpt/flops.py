"""Floating point operations of a training step, by Megatron-LM's convention."""

from megatron_lite.transformer.transformer_config import TransformerConfig


def num_floating_point_operations(
    config: TransformerConfig, padded_vocab_size: int, batch_size: int, sequence_length: int
) -> float:
    """Operations of one forward and backward pass over `batch_size` sequences.

    Counted are the matrix products: 2 operations per multiply-add, backward twice the forward. Attention counts the
    causal half of the scores, in windows too, and of latent attention the widths that queries and values really have,
    though its kernel fills the narrower of them up. The output layer counts the padded vocabulary, a layer of experts
    the topk that a token goes to and the shared ones. Multi-token prediction counts all its depths, each with a layer
    like the decoder's last, its projection and the output layer once more.

    As in Megatron-LM, embeddings, rotary positions, softmax and sinks, the router's product, the gate of shared experts
    and recomputation are not counted, and tokens that an expert's capacity drops are. Megatron's closed form also has
    1 weight for each channel of a normalized latent and 3 h for the norms of each depth: these are no products, and
    are left out. They are 3 millionths of DeepSeek-V3's step.

    Args:
        config: shape of the layers.
        padded_vocab_size: width of the output layer.
        batch_size: sequences (of the global batch, for the global step).
        sequence_length: tokens per sequence.
    """
    depths = config.mtp_num_layers or 0
    layers = config.num_layers + depths
    weights = layers * attention_weights(config) + mlp_weights(config)
    weights += depths * 2 * config.hidden_size**2 + (1 + depths) * config.hidden_size * padded_vocab_size
    # Scores are a product as wide as queries, the mean of values is one as wide as values: x 2 operations x 3 passes,
    # halved because half the scores are masked.
    core = 3.0 * config.num_attention_heads * (config.query_channels + config.value_channels) * sequence_length
    return batch_size * sequence_length * (6.0 * weights + layers * core)


def attention_weights(config: TransformerConfig) -> int:
    """Elements of the projections of one layer's attention."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    output = heads * config.value_channels * hidden
    if not config.multi_latent_attention:
        head = config.kv_channels or 0
        queries_and_gates = (2 if config.attention_output_gate else 1) * heads * head
        return hidden * (queries_and_gates + 2 * (config.num_query_groups or heads) * head) + output
    queries = heads * config.query_channels
    of_queries = hidden * queries if config.q_lora_rank is None else config.q_lora_rank * (hidden + queries)
    down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_head_dim + config.v_head_dim)
    return of_queries + down + up + output


def mlp_weights(config: TransformerConfig) -> int:
    """Elements of the matrices that one token meets in the MLPs of all layers, those of multi-token prediction
    included: h x width, 2 or 3 times if gated.
    """
    matrices = 3 if config.gated_linear_unit else 2
    with_experts = config.num_moe_layers
    width = (config.num_layers + (config.mtp_num_layers or 0) - with_experts) * (config.ffn_hidden_size or 0)
    if with_experts:
        chosen = config.moe_router_topk * (config.moe_ffn_hidden_size or 0)
        width += with_experts * (chosen + (config.moe_shared_expert_intermediate_size or 0))
    return matrices * config.hidden_size * width
