"""The rules between the knobs of a mixture of experts: one full sentence for each that is broken."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_lite.lazy import LazyModule
from megatron_lite.model_parallel_config import divisors, nearest_multiples

if TYPE_CHECKING:
    import torch

    from megatron_lite.transformer.moe.moe_config import MoEConfig
else:
    torch = LazyModule("torch")

# What DeepEP's high-throughput kernels need: a number of ranks that get_dispatch_config and get_combine_config know;
# tokens of bfloat16 in two halves of whole 16 bytes, which inside a node pass through 8 KiB with 8 bytes for a barrier,
# and between nodes, together with 8 bytes and 8 for each expert, through 16 KiB; a lane of a warp for each expert.
_RANKS_OF_DEEP_EP = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
_MULTIPLE_OF_DEEP_EP = 16
_LARGEST_HIDDEN_OF_DEEP_EP, _RANKS_OF_A_NODE = 8176, 8
_BYTES_BETWEEN_NODES = 16384
_LARGEST_TOPK_OF_DEEP_EP = 32


def moe_violations(config: "MoEConfig") -> Iterator[str]:
    """Every rule that the experts, the router, the balance and the dispatch break.

    Without experts nothing but expert parallelism is judged; the other flags are then said to be without effect.
    """
    if config.num_moe_experts is None:
        if config.expert_model_parallel_size > 1:
            yield (
                f"expert_model_parallel_size is {config.expert_model_parallel_size}, but there are no experts to "
                "distribute: write --num-experts N, or leave it out."
            )
        return
    if config.num_moe_experts < 1:
        yield f"num_moe_experts is {config.num_moe_experts}, but must be at least 1: leave it out for a dense model."
        return
    yield from _not_negative(config)
    yield from _experts(config, config.num_moe_experts)
    yield from _router(config, config.num_moe_experts)
    yield from _groups_of_experts(config, config.num_moe_experts)
    yield from _balance(config)
    yield from _dispatch(config)
    yield from _upcycling(config, config.num_moe_experts)


def layer_frequency_violations(config: "MoEConfig", num_layers: int) -> Iterator[str]:
    """What moe_layer_freq breaks, given how many layers there are."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None or num_layers < 1:
        return
    if isinstance(frequency, int):
        if frequency < 1:
            yield f"moe_layer_freq is {frequency}, but it must be at least 1: 1 gives experts to every layer."
        return
    if len(frequency) != num_layers or not set(frequency) <= {0, 1}:
        yield (
            f"moe_layer_freq is {frequency}, but it must have a 0 (dense) or 1 (experts) for each of the {num_layers} "
            f"layers: write for example [1]*{num_layers}."
        )
    elif not any(frequency):
        yield f"moe_layer_freq is {frequency}, but no layer has experts then: leave out --num-experts, or write a 1."


def _not_negative(config: "MoEConfig") -> Iterator[str]:
    for name in ("moe_z_loss_coeff", "moe_input_jitter_eps", "moe_router_bias_update_rate", "moe_aux_loss_coeff"):
        value = getattr(config, name)
        if min(value if isinstance(value, list) else [value or 0.0], default=0.0) < 0.0:
            yield f"{name} is {value}, but it must not be negative: write 0 or more."
    for name in (
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_expert_capacity_factor",
        "moe_router_topk_scaling_factor",
    ):
        value = getattr(config, name)
        if value is not None and value <= 0:
            yield f"{name} is {value}, but it must be positive: leave it out for the default."


def _experts(config: "MoEConfig", experts: int) -> Iterator[str]:
    ep, etp = max(config.expert_model_parallel_size, 1), max(config.expert_tensor_parallel_size or 1, 1)
    if experts % ep:
        yield (
            f"num_moe_experts is {experts}, but it must be a multiple of expert_model_parallel_size ({ep}); use "
            f"{nearest_multiples(experts, ep)} experts, or an expert parallel size among {divisors(experts)}."
        )
    width = config.moe_ffn_hidden_size
    if width and width % etp:
        yield (
            f"moe_ffn_hidden_size is {width}, but it must be a multiple of expert_tensor_parallel_size ({etp}); use "
            f"{nearest_multiples(width, etp)}, or --expert-tensor-parallel-size 1."
        )
    shared, tp = config.moe_shared_expert_intermediate_size, max(config.tensor_model_parallel_size, 1)
    if shared and shared % tp:
        yield (
            f"moe_shared_expert_intermediate_size is {shared}, but it must be a multiple of "
            f"tensor_model_parallel_size ({tp}), over which shared experts are split; use "
            f"{nearest_multiples(shared, tp)}."
        )
    for name in ("moe_shared_expert_gate", "moe_shared_expert_overlap"):
        if getattr(config, name) and shared is None:
            yield (
                f"{name} is set, but there is no shared expert: write --moe-shared-expert-intermediate-size N, or "
                "leave it out."
            )


def _router(config: "MoEConfig", experts: int) -> Iterator[str]:
    k, score, types = config.moe_router_topk, config.moe_router_score_function, config.balance_types
    if not 1 <= k <= experts:
        yield (
            f"moe_router_topk is {k}, but each token goes to at least 1 and at most num_moe_experts ({experts}) "
            f"experts: write --moe-router-topk {min(max(k, 1), experts)}."
        )
    if k == 1 and score == "softmax" and not config.moe_router_pre_softmax and "sinkhorn" not in types:
        yield (
            "moe_router_topk is 1 and the softmax is over the chosen experts, so the score would always be 1 and the "
            "router would learn nothing: add --moe-router-pre-softmax, or --moe-router-score-function sigmoid."
        )
    if config.moe_router_enable_expert_bias and score == "softmax":
        yield (
            "moe_router_enable_expert_bias is set with moe_router_score_function softmax, but the bias is added to "
            "scores that do not compete: write --moe-router-score-function sigmoid or sqrtsoftplus."
        )


def _groups_of_experts(config: "MoEConfig", experts: int) -> Iterator[str]:
    groups, chosen, k = config.moe_router_num_groups, config.moe_router_group_topk, config.moe_router_topk
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        name, other = ("num_groups", "group-topk") if chosen is None else ("group_topk", "num-groups")
        yield f"moe_router_{name} is set, but groups of experts need both: write --moe-router-{other} N too."
        return
    if groups < 1 or experts % groups:
        yield (
            f"moe_router_num_groups is {groups}, but it must divide num_moe_experts ({experts}): use one of "
            f"{divisors(experts)}."
        )
    elif not 1 <= chosen <= groups:
        yield f"moe_router_group_topk is {chosen}, but a token uses between 1 and all {groups} groups."
    elif k % chosen or k // chosen > experts // groups:
        yield (
            f"moe_router_topk is {k}, but it must be a multiple of moe_router_group_topk ({chosen}), and a group of "
            f"{experts // groups} experts must hold its part: write for example --moe-router-topk {chosen}."
        )


def _balance(config: "MoEConfig") -> Iterator[str]:
    types, coefficients = config.balance_types, config.moe_aux_loss_coeff
    given = coefficients if isinstance(coefficients, list) else [coefficients]
    if len(given) != len(types):
        yield (
            f"moe_aux_loss_coeff has {len(given)} values, but moe_router_load_balancing_type has {len(types)}: write "
            "one coefficient for each type."
        )
    if len(set(types)) != len(types):
        yield f"moe_router_load_balancing_type is {types}, but a type counts once: leave out the repeated one."
    alone = [one for one in ("none", "sinkhorn") if one in types]
    if alone and len(types) > 1:
        yield f"moe_router_load_balancing_type is {types}, but {alone[0]} cannot be combined: keep it alone, or not."
    if "sinkhorn" in types:
        yield from _sinkhorn(config, given)


def _sinkhorn(config: "MoEConfig", coefficients: list[float]) -> Iterator[str]:
    """Sinkhorn chooses the experts itself, from the logits of all tokens together."""
    others = {
        "moe_aux_loss_coeff": any(coefficients),
        "moe_router_enable_expert_bias": config.moe_router_enable_expert_bias,
        "moe_router_num_groups": config.moe_router_num_groups is not None,
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
        "moe_router_score_function": config.moe_router_score_function != "softmax",
        "moe_router_topk_scaling_factor": config.moe_router_topk_scaling_factor is not None,
    }
    for name, is_set in others.items():
        if is_set:
            yield (
                f"{name} is {getattr(config, name)} with moe_router_load_balancing_type sinkhorn, which chooses "
                "the experts itself: leave it out, or write --moe-router-load-balancing-type aux_loss."
            )


def _dispatch(config: "MoEConfig") -> Iterator[str]:
    kind = config.moe_token_dispatcher_type
    if config.moe_pad_expert_input_to_capacity and config.moe_expert_capacity_factor is None:
        yield (
            "moe_pad_expert_input_to_capacity is set, but experts have no capacity: write "
            "--moe-expert-capacity-factor 1.0 or more, or leave it out."
        )
    if config.moe_pad_expert_input_to_capacity and kind == "flex":
        yield (
            "moe_pad_expert_input_to_capacity is set with moe_token_dispatcher_type flex, which sends what there is: "
            f"write {without_flex(config)}, or leave it out."
        )
    if config.moe_shared_expert_overlap and kind == "allgather":
        yield (
            "moe_shared_expert_overlap is set with moe_token_dispatcher_type allgather, but only alltoall and flex "
            "leave time to overlap: write --moe-token-dispatcher-type alltoall, or leave it out."
        )
    if config.moe_enable_deepep and kind != "flex":
        yield (
            f"moe_enable_deepep is set with moe_token_dispatcher_type {kind}, but DeepEP is behind flex alone: write "
            "--moe-token-dispatcher-type flex, or leave out --moe-enable-deepep."
        )
    # A process group that holds this rank alone sends nothing.
    ep, etp = config.expert_model_parallel_size, config.expert_tensor_parallel_size or 1
    if kind == "flex" and ep * etp > 1 and config.params_dtype != torch.bfloat16:
        yield (
            f"moe_token_dispatcher_type is flex over {ep * etp} ranks (expert_model_parallel_size {ep}, "
            f"expert_tensor_parallel_size {etp}) and tokens are {str(config.params_dtype).removeprefix('torch.')}, but "
            f"DeepEP's kernels take bfloat16 only: add --bf16, or write {without_flex(config)}."
        )


def deep_ep_violations(config: "MoEConfig", hidden_size: int) -> Iterator[str]:
    """Sizes that DeepEP has no settings or no kernels for; at the first dispatch it would end with an assertion."""
    ep, etp = config.expert_model_parallel_size, config.expert_tensor_parallel_size or 1
    if config.num_moe_experts is None or config.moe_token_dispatcher_type != "flex" or ep * etp == 1:
        return
    instead = without_flex(config)
    if ep * etp not in _RANKS_OF_DEEP_EP:
        yield (
            f"moe_token_dispatcher_type is flex over {ep * etp} ranks (expert_model_parallel_size {ep}, "
            f"expert_tensor_parallel_size {etp}), but DeepEP has settings for "
            f"{', '.join(map(str, _RANKS_OF_DEEP_EP))} ranks only: choose sizes whose product is one of these, or "
            f"write {instead}."
        )
    if hidden_size % _MULTIPLE_OF_DEEP_EP:
        yield (
            f"moe_token_dispatcher_type is flex with hidden_size {hidden_size}, but DeepEP copies tokens in pieces of "
            f"{2 * _MULTIPLE_OF_DEEP_EP} bytes: choose a multiple of {_MULTIPLE_OF_DEEP_EP}, or write {instead}."
        )
    if ep * etp <= _RANKS_OF_A_NODE and hidden_size > _LARGEST_HIDDEN_OF_DEEP_EP:
        yield (
            f"moe_token_dispatcher_type is flex with hidden_size {hidden_size} over {ep * etp} ranks, but DeepEP's "
            f"kernels inside a node copy tokens of up to {_LARGEST_HIDDEN_OF_DEEP_EP}: write {instead}."
        )
    sent = -(-(2 * hidden_size + 8 + 8 * config.moe_router_topk * etp) // 16) * 16 + 8
    if ep * etp > _RANKS_OF_A_NODE and sent > _BYTES_BETWEEN_NODES:
        yield (
            f"moe_token_dispatcher_type is flex with hidden_size {hidden_size} over {ep * etp} ranks, but DeepEP's "
            f"kernels between nodes send tokens of up to {_BYTES_BETWEEN_NODES} bytes, and one would take {sent}: "
            f"write {instead}."
        )
    if config.moe_router_topk * etp > _LARGEST_TOPK_OF_DEEP_EP:
        yield (
            f"moe_token_dispatcher_type is flex with moe_router_topk {config.moe_router_topk} and "
            f"expert_tensor_parallel_size {etp}, but DeepEP sends a token to {_LARGEST_TOPK_OF_DEEP_EP} experts, or "
            f"parts of them, at most: choose smaller ones, or write {instead}."
        )


def without_flex(config: "MoEConfig") -> str:
    """The flags that lead away from the flex dispatcher, for error messages."""
    instead = "--moe-token-dispatcher-type alltoall"
    return f"{instead} and leave out --moe-enable-deepep" if config.moe_enable_deepep else instead


def _upcycling(config: "MoEConfig", experts: int) -> Iterator[str]:
    parts = config.moe_upcycling_granularity
    if not config.moe_use_upcycling:
        return
    if parts < 1 or experts % parts:
        yield (
            f"moe_upcycling_granularity is {parts}, but it must divide num_moe_experts ({experts}), since each dense "
            f"MLP becomes so many experts: use one of {divisors(experts)}."
        )
        return
    k, groups, chosen = config.moe_router_topk, config.moe_router_num_groups, config.moe_router_group_topk
    if 1 <= k <= experts and k % parts:
        yield (
            f"moe_router_topk is {k}, but with upcycling it must be a multiple of moe_upcycling_granularity ({parts}), "
            f"since a token needs all {parts} parts of an MLP: write --moe-router-topk {nearest_multiples(k, parts)}."
        )
    if groups and chosen and 0 < groups <= experts and not experts % groups:
        size = experts // groups
        # Either a group holds whole MLPs, or an MLP is whole groups and the chosen ones are whole MLPs.
        if size % parts and (parts % size or chosen % (parts // size)):
            yield (
                f"moe_router_num_groups is {groups}, which makes groups of {size} experts, but with upcycling they "
                f"must not divide the {parts} parts of an MLP (moe_upcycling_granularity), all of which a token needs: "
                f"use one of {divisors(experts // parts)}."
            )
