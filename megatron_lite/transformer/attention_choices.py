"""What attention each layer has, where layers may differ: window, rotary positions, context parallel communication.

Layers are counted from 1. The layers of multi-token prediction, behind the last of the decoder, are as that one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lite.transformer.attention_config import AttentionConfig


def decoder_layer(config: "AttentionConfig", layer_number: int) -> int:
    """The layer of the decoder that layer `layer_number` is like: itself, or for those behind it the last."""
    return min(layer_number, config.num_layers) if config.num_layers > 0 else layer_number


def cp_comm_type_of(config: "AttentionConfig", layer_number: int) -> str:
    """How the context parallel ranks communicate in layer `layer_number`."""
    types = config.cp_comm_type
    if types is None:
        return "p2p"
    return types if isinstance(types, str) else types[decoder_layer(config, layer_number) - 1]


def uses_window(config: "AttentionConfig", layer_number: int) -> bool:
    """Whether layer `layer_number` sees a sliding window instead of the whole sequence.

    window_attn_skip_freq N leaves full attention to every N-th layer; a list holds 1 (window) or 0 (full) per layer.
    """
    if config.window_size is None:
        return False
    frequency, number = config.window_attn_skip_freq, decoder_layer(config, layer_number)
    if frequency is None:
        return True
    return number % frequency != 0 if isinstance(frequency, int) else bool(frequency[number - 1])


def uses_rope(config: "AttentionConfig", layer_number: int) -> bool:
    """Whether layer `layer_number` rotates queries and keys, in a model with rotary positions.

    no_rope_freq N leaves every N-th layer without positions; a list holds 1 (without) or 0 (with) per layer.
    """
    frequency, number = config.no_rope_freq, decoder_layer(config, layer_number)
    if frequency is None:
        return True
    return number % frequency != 0 if isinstance(frequency, int) else not frequency[number - 1]


def describe_communication(config: "AttentionConfig") -> str:
    """The types of context parallel communication in a few words: "a2a in 16 layers, p2p in 16 layers"."""
    types = [cp_comm_type_of(config, number) for number in range(1, config.num_layers + 1)]
    names = {one: one for one in types}
    if "a2a+p2p" in names:
        names["a2a+p2p"] += " of " + " x ".join(map(str, config.hierarchical_context_parallel_sizes or []))
    if len(names) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{name} in {types.count(one)} layers" for one, name in names.items())
