"""MoEConfig: the knobs of a mixture of experts. TransformerConfig extends it."""

from dataclasses import dataclass

from megatron_lite.config_field import knob
from megatron_lite.errors import ConfigError
from megatron_lite.pipeline_parallel_config import PipelineConfig
from megatron_lite.transformer.moe.moe_rules import moe_violations

BALANCE_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
LOAD_BALANCING_TYPES = (*BALANCE_LOSSES, "sinkhorn", "none")


@dataclass
class MoEConfig(PipelineConfig):
    """Experts, router, balance and dispatch. Field names and defaults are Megatron's.

    Symbols used in docstrings: E = num_moe_experts, k = moe_router_topk, t = tokens.
    """

    # Experts
    num_moe_experts: int | None = knob(
        None, "Experts E of each MoE layer; none: all layers are dense.", flag="--num-experts"
    )
    moe_layer_freq: int | list[int] = knob(
        1, "Which layers have experts: every N-th (the first, N+1st, ...), or a list of 0 and 1, as [0]*3+[1]*58."
    )
    moe_ffn_hidden_size: int | None = knob(None, "Width of one expert; default --ffn-hidden-size.")
    moe_grouped_gemm: bool = knob(False, "Compute all experts of a rank in grouped matrix products (else one by one).")
    moe_shared_expert_intermediate_size: int | None = knob(
        None, "Width of the shared experts, all together, that see every token."
    )
    moe_shared_expert_gate: bool = knob(False, "Multiply the shared experts' output by a learned sigmoid gate.")
    moe_shared_expert_overlap: bool = knob(False, "Compute the shared experts while tokens travel.")

    # Router
    moe_router_type: str = knob("linear", "linear is one matrix; gmlp a small gated MLP.", choices=("linear", "gmlp"))
    moe_router_topk: int = knob(2, "Experts k that each token goes to.")
    moe_router_score_function: str = knob(
        "softmax", "Turns router logits into scores.", choices=("softmax", "sigmoid", "sqrtsoftplus")
    )
    moe_router_pre_softmax: bool = knob(
        False, "Softmax over all experts, then top-k; off: top-k, then softmax over the k."
    )
    moe_router_topk_scaling_factor: float | None = knob(None, "Factor on the chosen scores.")
    moe_router_num_groups: int | None = knob(
        None, "Groups of experts of which a token may use --moe-router-group-topk."
    )
    moe_router_group_topk: int | None = knob(None, "Groups that each token may use.")
    moe_router_dtype: str | None = knob(
        None, "Dtype of the router's matrix product; default fp32 (fp64 under --fp64).", choices=("fp32", "fp64")
    )
    moe_input_jitter_eps: float | None = knob(None, "Multiply the router's input by uniform noise in 1 +- eps.")
    moe_router_force_load_balancing: bool = knob(False, "Random logits: for benchmarks, not for training.")

    # Balance
    moe_router_load_balancing_type: str | list[str] = knob(
        "aux_loss", "How the load of the experts is balanced; several may be combined.", choices=LOAD_BALANCING_TYPES
    )
    moe_aux_loss_coeff: float | list[float] = knob(0.0, "Coefficient of the balance loss; one for each type given.")
    moe_z_loss_coeff: float | None = knob(None, "Coefficient of the z-loss, which keeps router logits small.")
    moe_router_enable_expert_bias: bool = knob(False, "Balance by a bias on the scores that decide (no loss).")
    moe_router_bias_update_rate: float = knob(1e-3, "What the expert bias moves by after each step.")

    # Capacity
    moe_expert_capacity_factor: float | None = knob(
        None, "Drop tokens beyond factor * t * k / E of an expert, t the tokens of one rank; default: drop nothing."
    )
    moe_pad_expert_input_to_capacity: bool = knob(False, "Give each expert exactly its capacity, padded with zeros.")
    moe_token_drop_policy: str = knob(
        "probs", "Which tokens stay: the likeliest, or the first.", choices=("probs", "position")
    )

    # Dispatch
    moe_token_dispatcher_type: str = knob(
        "allgather", "How tokens reach their experts' ranks.", choices=("allgather", "alltoall", "flex")
    )
    moe_flex_dispatcher_backend: str = knob(
        "deepep",
        "Package behind the flex dispatcher; instead of hybridep and ncclep, which are not here, alltoall is used.",
        choices=("deepep", "hybridep", "ncclep"),
    )
    moe_enable_deepep: bool = knob(False, "The same as --moe-token-dispatcher-type flex (deprecated in Megatron).")

    # Start from a dense model
    moe_use_upcycling: bool = knob(False, "Load a dense checkpoint and copy its MLPs into the experts.")
    moe_upcycling_granularity: int = knob(1, "Upcycling: experts into which each dense MLP is divided.")

    # Another spelling of Megatron's
    moe_layer_recompute: bool = knob(False, "The same as --recompute-granularity selective --recompute-modules moe.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
            given = getattr(self, name)
            if isinstance(given, list) and len(given) == 1:
                setattr(self, name, given[0])
        if self.moe_enable_deepep and self.moe_token_dispatcher_type == "allgather":  # the default
            self.moe_token_dispatcher_type = "flex"
        if self.moe_flex_dispatcher_backend != "deepep" and self.moe_token_dispatcher_type == "flex":
            self.moe_token_dispatcher_type = "alltoall"

    @property
    def balance_types(self) -> list[str]:
        """moe_router_load_balancing_type as a list."""
        types = self.moe_router_load_balancing_type
        return types if isinstance(types, list) else [types]

    @property
    def balance_coefficients(self) -> dict[str, float]:
        """Balance loss -> its coefficient, of those that have one other than 0.

        Raises:
            ConfigError: not as many coefficients as types.
        """
        types, given = self.balance_types, self.moe_aux_loss_coeff
        coefficients = given if isinstance(given, list) else [given]
        if len(coefficients) != len(types):
            raise ConfigError(
                f"moe_aux_loss_coeff is {given}, but moe_router_load_balancing_type has {len(types)} types "
                f"({', '.join(types)}); give one coefficient for each."
            )
        return {kind: one for kind, one in zip(types, coefficients, strict=True) if kind in BALANCE_LOSSES and one}

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        return super().violations() + list(moe_violations(self))


def is_moe_layer(config: MoEConfig, layer_number: int) -> bool:
    """Whether layer `layer_number` (counted from 1) has experts instead of one MLP.

    moe_layer_freq N gives them to the layers 1, N + 1, 2 N + 1, ...; a list holds 1 (experts) or 0 (dense) per layer.
    The layers of multi-token prediction, behind the last of the decoder, are as that one.
    """
    if config.num_moe_experts is None:
        return False
    frequency = config.moe_layer_freq
    layer_number = min(layer_number, config.num_layers) if config.num_layers > 0 else layer_number
    if isinstance(frequency, int):
        return (layer_number - 1) % frequency == 0
    return bool(frequency[layer_number - 1])
