"""What attention each layer has, where layers may differ (window, context parallel communication), and its rules."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_lite.model_parallel_config import CP_COMM_TYPES, divisors

if TYPE_CHECKING:
    from megatron_lite.transformer.transformer_config import TransformerConfig


def cp_comm_type_of(config: "TransformerConfig", layer_number: int) -> str:
    """How the context parallel ranks communicate in layer `layer_number`, counted from 1."""
    types = config.cp_comm_type
    if types is None:
        return "p2p"
    return types if isinstance(types, str) else types[layer_number - 1]


def uses_window(config: "TransformerConfig", layer_number: int) -> bool:
    """Whether layer `layer_number` (counted from 1) sees a sliding window instead of the whole sequence.

    window_attn_skip_freq N leaves full attention to every N-th layer; a list holds 1 (window) or 0 (full) per layer.
    """
    if config.window_size is None:
        return False
    frequency = config.window_attn_skip_freq
    if frequency is None:
        return True
    if isinstance(frequency, int):
        return layer_number % frequency != 0
    return bool(frequency[layer_number - 1])


def describe_communication(config: "TransformerConfig") -> str:
    """The types of context parallel communication in a few words: "a2a in 16 layers, p2p in 16 layers"."""
    types = [cp_comm_type_of(config, number) for number in range(1, config.num_layers + 1)]
    names = {one: one for one in types}
    if "a2a+p2p" in names:
        names["a2a+p2p"] += " of " + " x ".join(map(str, config.hierarchical_context_parallel_sizes or []))
    if len(names) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{name} in {types.count(one)} layers" for one, name in names.items())


def context_parallel_violations(config: "TransformerConfig") -> Iterator[str]:
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
    yield from _block_violations(config)


def _hierarchy_violations(config: "TransformerConfig") -> Iterator[str]:
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


def _a2a_violations(config: "TransformerConfig", used: set[str]) -> Iterator[str]:
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


def _block_violations(config: "TransformerConfig") -> Iterator[str]:
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
    frequency = config.window_attn_skip_freq
    if isinstance(frequency, list) and len(frequency) != config.num_layers:
        return  # said already
    if isinstance(frequency, int) and frequency < 1:
        return
    windows = [n for n in numbers if uses_window(config, n)]
    if windows:
        yield (
            f"window_size is {config.window_size} in layer {windows[0]} with cp_comm_type "
            f"{cp_comm_type_of(config, windows[0])}, but only a2a can do sliding windows: write --cp-comm-type a2a "
            "for these layers, or leave the window out."
        )
