"""Sliding windows: `sliding_window` and `layer_types` of a config.json, and our settings."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.transformer.attention_choices import uses_window

FULL, SLIDING = "full_attention", "sliding_attention"


def window_settings(config: ConfigJson, width: int | None, layer_types: list[str] | None) -> dict[str, Any]:
    """Our settings for windows of `width` tokens, the own one included; `layer_types` None: in all layers."""
    if layer_types is not None and (not isinstance(layer_types, list) or set(map(str, layer_types)) - {FULL, SLIDING}):
        config.refuse("layer_types", f"must name {FULL} and {SLIDING} only")
        return {}
    if layer_types is not None and len(layer_types) != config.integer("num_hidden_layers"):
        config.refuse("layer_types", "must name one type for each of num_hidden_layers", "add those that are missing")
    if width is None and layer_types is not None and SLIDING in layer_types:
        config.refuse("layer_types", "there is no sliding_window", f"write its width, or {FULL} for all layers")
    if width is not None and (type(width) is not int or width < 1):
        config.refuse("sliding_window", "must be a positive number", "write null for no window")
        return {}
    if width is None or (layer_types is not None and SLIDING not in layer_types):
        return {}
    settings: dict[str, Any] = {"window_size": (width - 1, 0)}
    if layer_types is not None and FULL in layer_types:
        settings["window_attn_skip_freq"] = [int(kind == SLIDING) for kind in layer_types]
    return settings


def window_of(model: Architecture) -> tuple[int | None, list[str]]:
    """Tokens a window shows, None without one, and the type of each layer."""
    config = model.transformer
    types = [SLIDING if uses_window(config, number) else FULL for number in range(1, config.num_layers + 1)]
    width = None
    if config.window_size is not None and SLIDING in types:
        # A window that theirs has no word for (unlimited to the left) is found when the result is compared.
        width = config.window_size[0] + 1
    return width, types
