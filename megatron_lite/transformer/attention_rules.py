"""The rules between the knobs of attention: one full sentence for each that is broken."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_lite.model_parallel_config import CP_COMM_TYPES, divisors, nearest_multiples
from megatron_lite.transformer.attention_choices import cp_comm_type_of, uses_window

if TYPE_CHECKING:
    from megatron_lite.transformer.attention_config import AttentionConfig


def attention_violations(config: "AttentionConfig") -> Iterator[str]:
    """Every rule that heads, windows, latent attention and context parallel communication break."""
    if config.num_attention_heads > 0:
        yield from _heads(config)
    if config.multi_latent_attention:
        yield from _latent_attention(config)
    if not 0.0 <= config.attention_dropout < 1.0:
        yield f"attention_dropout is {config.attention_dropout}, but it is a probability: 0 <= value < 1."
    if config.kv_channels is not None and config.kv_channels < 1 and config.hidden_size > 0:
        yield f"kv_channels is {config.kv_channels}, but it must be at least 1; leave it out for the default."
    if config.window_size is not None and min(config.window_size) < -1:
        yield f"window_size is {config.window_size}, but its parts count positions; -1 is unlimited."
    patterns = list(_patterns(config))
    yield from patterns
    yield from _context_parallelism(config, windows_are_known=not patterns)


def _heads(config: "AttentionConfig") -> Iterator[str]:
    heads, groups, tp = config.num_attention_heads, config.num_query_groups or 0, config.tensor_model_parallel_size
    if heads % max(tp, 1):
        yield (
            f"num_attention_heads is {heads}, but it must be a multiple of tensor_model_parallel_size ({tp}); "
            f"use {nearest_multiples(heads, tp)} heads, or a tensor parallel size that divides {heads}."
        )
    if groups < 1 or heads % groups:
        yield f"num_query_groups is {groups}, but it must divide num_attention_heads ({heads}); {divisors(heads)} do."
    elif groups % max(tp, 1) and tp % groups:
        yield (
            f"num_query_groups is {groups}, but it must be a multiple or a divisor of "
            f"tensor_model_parallel_size ({tp}), because each rank holds whole key/value heads; use a tensor "
            f"parallel size among {divisors(groups)}."
        )
    if config.multi_latent_attention:
        return
    if config.hidden_size % heads and config.kv_channels == config.hidden_size // heads:
        yield (
            f"hidden_size is {config.hidden_size}, but it must be a multiple of num_attention_heads ({heads}); "
            f"use {nearest_multiples(config.hidden_size, heads)}, or give --kv-channels."
        )


def _latent_attention(config: "AttentionConfig") -> Iterator[str]:
    for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
        size = getattr(config, name)
        if size is not None and size < 1:
            yield f"{name} is {size}, but a width must be at least 1: leave it out for the default."
    if config.num_query_groups != config.num_attention_heads:
        yield (
            f"num_query_groups is {config.num_query_groups} with multi_latent_attention, which makes keys and values "
            f"for each of the num_attention_heads ({config.num_attention_heads}): leave out --group-query-attention "
            "and --num-query-groups."
        )
    for name in ("attention_output_gate", "add_qkv_bias"):
        if getattr(config, name):
            yield (
                f"{name} is set with multi_latent_attention, which has no query-key-value projection that could hold "
                "it: leave out one of them."
            )


def _patterns(config: "AttentionConfig") -> Iterator[str]:
    """What per-layer patterns break."""
    layers = config.num_layers
    for name, meaning, of_one in (
        ("window_attn_skip_freq", "0 (full) or 1 (window)", "1 has no window layer"),
        ("no_rope_freq", "0 (rotary) or 1 (without positions)", "1 has no rotary layer"),
    ):
        frequency = getattr(config, name)
        if isinstance(frequency, int) and frequency < 1:
            yield f"{name} is {frequency}, but it must be at least 1: {of_one}."
        if isinstance(frequency, list) and layers and (len(frequency) != layers or not set(frequency) <= {0, 1}):
            yield (
                f"{name} is {frequency}, but it must have a {meaning} for each of the {layers} layers: write {layers} "
                "of them."
            )


def _context_parallelism(config: "AttentionConfig", windows_are_known: bool) -> Iterator[str]:
    """What cp_comm_type asks for and the other settings do not allow.

    With one context parallel rank nothing is communicated, so then only the value itself is judged.
    """
    types, layers, size = config.cp_comm_type, config.num_layers, config.context_parallel_size
    if isinstance(types, list) and layers and len(types) != layers:
        yield (
            f"cp_comm_type has {len(types)} values, but there must be one for all layers or one for each of the "
            f"{layers}: write {layers} of them, or one."
        )
        return
    used = {types} if isinstance(types, str) else set(types or ["p2p"])
    if size <= 1 or not used <= set(CP_COMM_TYPES):
        return
    if "a2a+p2p" in used:
        yield from _hierarchy_violations(config)
    yield from _a2a_violations(config, used)
    yield from _block_violations(config, windows_are_known)


def _hierarchy_violations(config: "AttentionConfig") -> Iterator[str]:
    sizes, total = config.hierarchical_context_parallel_sizes, config.context_parallel_size
    inner = next((factor for factor in range(2, total) if total % factor == 0), 1)
    remedy = f"write for example --hierarchical-context-parallel-sizes {inner} {total // inner}"
    if sizes is None:
        yield f"cp_comm_type is a2a+p2p, but its two groups have no hierarchical_context_parallel_sizes: {remedy}."
    elif len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != total:
        yield (
            f"hierarchical_context_parallel_sizes is {sizes}, but a2a+p2p needs two numbers, ranks of the all-to-all "
            f"and of the ring, whose product is context_parallel_size ({total}): {remedy}."
        )


def _a2a_violations(config: "AttentionConfig", used: set[str]) -> Iterator[str]:
    """All-to-all divides the heads of a tensor parallel rank over its ranks; too few key/value heads are repeated."""
    tp, groups = max(config.tensor_model_parallel_size, 1), config.num_query_groups or 0
    heads, kv_heads = config.num_attention_heads // tp, max(groups // tp, 1)
    hierarchy = config.hierarchical_context_parallel_sizes or [1]
    for name, size in (("a2a", config.context_parallel_size), ("a2a+p2p", hierarchy[0])):
        if name not in used or heads < 1 or size < 1:
            continue
        if heads % size:
            yield (
                f"cp_comm_type is {name} over {size} ranks, but num_attention_heads / tensor_model_parallel_size "
                f"({heads}) must be a multiple of that: use an all-to-all of {divisors(heads)} ranks, or p2p."
            )
        elif kv_heads % size and size % kv_heads:
            yield (
                f"cp_comm_type is {name} over {size} ranks, but num_query_groups / tensor_model_parallel_size "
                f"({kv_heads}) must be a multiple or a divisor of that: use p2p, or an all-to-all of "
                f"{divisors(kv_heads)} ranks."
            )


def _block_violations(config: "AttentionConfig", windows_are_known: bool) -> Iterator[str]:
    """All but a2a see a sequence in blocks, which know neither dropout nor windows."""
    numbers = [n for n in range(1, config.num_layers + 1) if cp_comm_type_of(config, n) != "a2a"]
    if not numbers:
        return
    name = cp_comm_type_of(config, numbers[0])
    if config.attention_dropout > 0.0:
        yield (
            f"attention_dropout is {config.attention_dropout} with cp_comm_type {name}, but only a2a can drop "
            "probabilities: write --cp-comm-type a2a, or --attention-dropout 0."
        )
    if not windows_are_known:
        return  # said already
    windows = [n for n in numbers if uses_window(config, n)]
    if windows:
        yield (
            f"window_size is {config.window_size} in layer {windows[0]} with cp_comm_type "
            f"{cp_comm_type_of(config, windows[0])}, but only a2a can do sliding windows: write --cp-comm-type a2a "
            "for these layers, or leave the window out."
        )
