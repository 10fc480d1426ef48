"""Mixture of experts: router, balance, dispatch, grouped experts."""

from megatron_lite.lazy import names_from

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

__getattr__ = names_from(__name__, _HOMES)  # TransformerConfig needs moe_config before the rest
