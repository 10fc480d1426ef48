"""Mixture of experts: router, balance, dispatch, grouped experts."""

import importlib
from typing import Any

_HOMES = {
    "AllGatherTokenDispatcher": "token_dispatcher",
    "AlltoAllTokenDispatcher": "token_dispatcher",
    "FlexTokenDispatcher": "flex_dispatcher",
    "GroupedMLP": "experts",
    "MoEConfig": "moe_config",
    "MoELayer": "moe_layer",
    "MoERouter": "router",
    "SharedExperts": "shared_experts",
    "TopKRouter": "router",
    "build_token_dispatcher": "token_dispatcher",
    "is_moe_layer": "moe_config",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """The public names, each imported when first asked for: TransformerConfig needs moe_config before the rest."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
