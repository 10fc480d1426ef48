"""TransformerConfig: the shape and the numerics of a stack of transformer layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lite.config_field import knob
from megatron_lite.lazy import LazyModule
from megatron_lite.model_parallel_config import divisors as divisors
from megatron_lite.model_parallel_config import nearest_multiples as nearest_multiples
from megatron_lite.ops.fp8_choices import FORMATS, RECIPES
from megatron_lite.transformer.attention_choices import cp_comm_type_of as cp_comm_type_of
from megatron_lite.transformer.attention_choices import uses_window as uses_window
from megatron_lite.transformer.attention_config import AttentionConfig
from megatron_lite.transformer.moe.moe_config import is_moe_layer
from megatron_lite.transformer.moe.moe_rules import deep_ep_violations, layer_frequency_violations

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
else:
    torch, F = LazyModule("torch"), LazyModule("torch.nn.functional")


@dataclass
class TransformerConfig(AttentionConfig):
    """Everything a transformer layer is built from. Field names and defaults are Megatron's, but dropout is 0.

    Symbols used in docstrings: those of AttentionConfig, f = ffn_hidden_size, s = sequence, b = micro-batch.
    """

    # Shape
    ffn_hidden_size: int | None = knob(
        None, "Width f of the MLP; default 4 h, with a gated activation 2/3 of that, rounded to a multiple of 64."
    )

    # Layer contents
    normalization: str = knob("LayerNorm", "Which norm stands before each block.", choices=("LayerNorm", "RMSNorm"))
    layernorm_epsilon: float = knob(1e-5, "Epsilon inside the norms.", flag=("--norm-epsilon", "--layernorm-epsilon"))
    layernorm_zero_centered_gamma: bool = knob(
        False, "Store norm weights minus one, so that weight decay pulls towards one.", flag="--apply-layernorm-1p"
    )
    add_bias_linear: bool = knob(True, "Linear layers have biases.", flag="--disable-bias-linear")
    swiglu: bool = knob(False, "Gated MLP: silu(gate) * up.")
    geglu: bool = knob(False, "Gated MLP: gelu(gate) * up.")
    quick_geglu: bool = knob(False, "Gated MLP: gate * sigmoid(1.702 gate) * up.")
    squared_relu: bool = knob(False, "MLP activation: relu(x) squared.")
    activation_func_clamp_value: float | None = knob(
        None, "Gated MLP: cut gates off above this, and ups above and below, as gpt-oss does."
    )
    glu_linear_offset: float = knob(0.0, "Gated MLP: add this to the up half: act(gate) * (up + offset).")
    openai_gelu: bool = knob(False, "The tanh form of gelu as OpenAI wrote it, with or without the next.")
    bias_gelu_fusion: bool = knob(True, "gelu in the tanh form of Megatron's fused kernel; off: the exact, erf form.")
    activation_func: "Callable[[torch.Tensor], torch.Tensor]" = knob(None, "MLP activation; default gelu.", flag=False)
    gated_linear_unit: bool = knob(False, "The MLP multiplies its activation by a second projection.", flag=False)
    apply_residual_connection_post_layernorm: bool = knob(
        False, "The residual connection starts from the norm's output instead of its input."
    )

    # Regularization (Megatron's default is 0.1)
    hidden_dropout: float = knob(0.0, "Dropout after the embedding and at the end of each block.")

    # Numerics
    fp32_residual_connection: bool = knob(False, "Keep the residual stream in float32.")
    fp8: str | None = knob(
        None,
        "Multiply the linear layers of transformer layers in 8-bit floating point: e4m3, or hybrid, which has e5m2 for "
        "gradients, but those of routed experts.",
        flag="--fp8-format",
        choices=FORMATS,
    )
    fp8_recipe: str = knob(
        "tensorwise",
        "fp8: one scale for each tensor, or one for each row, as routed experts always have it (Megatron's default, "
        "delayed, is not there).",
        choices=RECIPES,
    )
    first_last_layers_bf16: bool = knob(False, "Keep layers at both ends of the model out of fp8; the next say which.")
    num_layers_at_start_in_bf16: int = knob(1, "--first-last-layers-bf16: layers at the start.")
    num_layers_at_end_in_bf16: int = knob(1, "--first-last-layers-bf16: layers at the end.")
    transformer_impl: str = knob(
        "auto",
        "auto and local use torch, but auto a package for grouped products where it is faster; transformer_engine uses "
        "that package's linear layers and attention.",
        choices=("auto", "local", "transformer_engine"),
    )
    norm_impl: str = knob("torch", "Whose fused kernels compute norms.", choices=("torch", "apex"))

    # Initial values
    init_method_std: float = knob(0.02, "Standard deviation of the initial weights.")
    embedding_init_method_std: float | None = knob(None, "The same for the embeddings; default --init-method-std.")
    init_method_xavier_uniform: bool = knob(False, "Draw initial weights from Xavier's uniform distribution.")
    init_method: "Callable[[torch.Tensor], Any] | None" = knob(None, "Fills a weight; default normal.", flag=False)
    output_layer_init_method: "Callable[[torch.Tensor], Any] | None" = knob(
        None, "Fills the last matrix of each block; default normal, std / sqrt(2 num_layers).", flag=False
    )
    embedding_init_method: "Callable[[torch.Tensor], Any] | None" = knob(None, "Fills the embeddings.", flag=False)

    # Loss
    mtp_loss_scaling_factor: float = knob(
        0.1,
        "Weight of the loss of multi-token prediction, the mean over its depths, beside the loss of the next token.",
    )
    calculate_per_token_loss: bool = knob(
        True,
        "Weigh every valid token of the global batch alike; off: mean over micro-batches of their token means.",
        flag=("--calculate-per-token-loss", "--no-calculate-per-token-loss"),
    )

    # Activation recomputation
    recompute_granularity: str | None = knob(
        None,
        "What to recompute in the backward pass instead of storing: parts of a layer, or whole layers.",
        choices=("full", "selective"),
    )
    recompute_method: str | None = knob(
        None, "full: uniform cuts layers into equal chunks, block takes the first ones.", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = knob(None, "full: layers per chunk (uniform) or layers recomputed (block).")
    recompute_modules: list[str] | None = knob(
        None,
        "selective: which parts; default core_attn. mla_up_proj is what latent attention makes of the latents, moe a "
        "whole layer of experts, moe_act their activations.",
        choices=("core_attn", "mla_up_proj", "mlp", "layernorm", "moe", "moe_act"),
    )
    distribute_saved_activations: bool = knob(False, "full: split the stored layer inputs over the TP ranks.")
    cpu_offloading_num_layers: int = knob(
        0, "Move what the first N layers keep for the backward pass to the host's memory, and back when it is needed."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose_activation()
        if self.ffn_hidden_size is None:
            # Llama's convention keeps the parameter count of a gated MLP near that of a plain one.
            full = 4 * self.hidden_size
            self.ffn_hidden_size = int(full * 2 / 3 / 64) * 64 if self.gated_linear_unit else full
        if self.num_moe_experts is not None and self.moe_ffn_hidden_size is None:
            self.moe_ffn_hidden_size = self.ffn_hidden_size
        self._choose_recompute_modules()
        self._choose_init_methods()

    def _choose_recompute_modules(self) -> None:
        if self.moe_layer_recompute and self.recompute_granularity in (None, "selective"):
            self.recompute_granularity = "selective"
            self.recompute_modules = [*(self.recompute_modules or []), "moe"]
        if self.recompute_granularity == "selective" and self.recompute_modules is None:
            self.recompute_modules = ["core_attn"]
        if self.recompute_modules is not None:
            self.recompute_modules = list(dict.fromkeys(self.recompute_modules))

    def _choose_activation(self) -> None:
        from megatron_lite.transformer.activations import quick_gelu, squared_relu

        if self.activation_func is None:
            self.activation_func = F.gelu
        for flag, function, gated in (
            ("swiglu", F.silu, True),
            ("geglu", F.gelu, True),
            ("quick_geglu", quick_gelu, True),
            ("squared_relu", squared_relu, False),
        ):
            if getattr(self, flag):
                self.activation_func, self.gated_linear_unit = function, gated

    def _choose_init_methods(self) -> None:
        std, layers = self.init_method_std, max(self.num_layers, 1)
        embedding_std = std if self.embedding_init_method_std is None else self.embedding_init_method_std
        if self.init_method_xavier_uniform:
            self.init_method = self.init_method or torch.nn.init.xavier_uniform_
            self.output_layer_init_method = self.output_layer_init_method or torch.nn.init.xavier_uniform_
        self.init_method = self.init_method or normal_init(std)
        self.output_layer_init_method = self.output_layer_init_method or normal_init(std / (2.0 * layers) ** 0.5)
        self.embedding_init_method = self.embedding_init_method or normal_init(embedding_std)

    @property
    def mtp_loss_weights(self) -> tuple[float, ...]:
        """What the mean loss of each depth of multi-token prediction is multiplied with; empty without it."""
        depths = self.mtp_num_layers or 0
        return (self.mtp_loss_scaling_factor / max(depths, 1),) * depths

    @property
    def num_moe_layers(self) -> int:
        """Layers that have experts, those of multi-token prediction included."""
        layers = self.num_layers + (self.mtp_num_layers or 0)
        return sum(is_moe_layer(self, number) for number in range(1, layers + 1))

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        found = super().violations()
        tp = self.tensor_model_parallel_size
        if self.ffn_hidden_size and self.ffn_hidden_size % max(tp, 1):
            found.append(
                f"ffn_hidden_size is {self.ffn_hidden_size}, but it must be a multiple of tensor_model_parallel_size "
                f"({tp}); use {nearest_multiples(self.ffn_hidden_size, tp)}."
            )
        activations = [name for name in ("swiglu", "geglu", "quick_geglu", "squared_relu") if getattr(self, name)]
        if len(activations) > 1:
            found.append(f"{' and '.join(activations)} are given together; an MLP has one activation, keep one.")
        clamp, offset = self.activation_func_clamp_value, self.glu_linear_offset
        if (clamp is not None or offset) and not self.gated_linear_unit:
            found.append(
                f"activation_func_clamp_value is {clamp} and glu_linear_offset {offset}, but they change gated "
                "activations: add --swiglu, --geglu or --quick-geglu, or leave them out."
            )
        if self.mtp_loss_scaling_factor < 0.0:
            found.append(
                f"mtp_loss_scaling_factor is {self.mtp_loss_scaling_factor}, but it must not be negative: write 0.1."
            )
        if clamp is not None and clamp <= 0:
            found.append(f"activation_func_clamp_value is {clamp}, but it must be positive: leave it out for none.")
        if not 0.0 <= self.hidden_dropout < 1.0:
            found.append(f"hidden_dropout is {self.hidden_dropout}, but it is a probability: 0 <= value < 1.")
        if self.ffn_hidden_size is not None and self.ffn_hidden_size < 1 and self.hidden_size > 0:
            found.append(
                f"ffn_hidden_size is {self.ffn_hidden_size}, but it must be at least 1; leave it out for the default."
            )
        for name in ("layernorm_epsilon", "init_method_std", "embedding_init_method_std"):
            if (getattr(self, name) or 0.0) < 0.0:
                found.append(f"{name} is {getattr(self, name)}, but it must not be negative; leave it out.")
        from megatron_lite.transformer.fp8 import fp8_violations  # needs torch, which reading the fields does not

        found += layer_frequency_violations(self, self.num_layers)
        found += deep_ep_violations(self, self.hidden_size)
        found += fp8_violations(self)
        return found + self._recompute_violations() + self._offload_violations()

    @property
    def has_apex_norms(self) -> bool:
        """Whether apex computes norms, whose kernels take the whole factor and not what it differs from one."""
        return self.norm_impl == "apex" and not self.layernorm_zero_centered_gamma

    @property
    def gradients_together(self) -> str | None:
        """The flag for which a layer computes gradients of weights and activations in one piece; None if it need not.

        Recomputation would be done twice, and Transformer Engine's layers can be differentiated once only.
        """
        if self.recompute_granularity is not None:
            return "--recompute-granularity"
        return "--transformer-impl transformer_engine" if self.transformer_impl == "transformer_engine" else None

    def _recompute_violations(self) -> list[str]:
        found = []
        experts = [name for name in ("moe", "moe_act") if name in (self.recompute_modules or [])]
        if len(experts) == 2:
            found.append("recompute_modules names moe and moe_act, but moe_act is a part of moe: keep one of them.")
        if "mla_up_proj" in (self.recompute_modules or []) and not self.multi_latent_attention:
            found.append(
                "recompute_modules names mla_up_proj, a part of latent attention, but multi_latent_attention is not "
                "set: leave it out."
            )
        if self.moe_layer_recompute and self.recompute_granularity == "full":
            found.append(
                "moe_layer_recompute is set with recompute_granularity full, which recomputes whole layers already: "
                "leave out one of them."
            )
        if self.recompute_granularity == "selective" and not self.recompute_modules:
            found.append(
                "recompute_modules names nothing to recompute: write core_attn, mla_up_proj, mlp, layernorm, moe or "
                "moe_act."
            )
        if self.recompute_granularity == "full":
            if self.recompute_method is None or self.recompute_num_layers is None:
                found.append(
                    "recompute_granularity is full, which needs --recompute-method (uniform or block) and "
                    "--recompute-num-layers; give both, for example uniform and 1."
                )
            elif self.num_layers and not 1 <= self.recompute_num_layers <= self.num_layers:
                found.append(
                    f"recompute_num_layers is {self.recompute_num_layers}, but it must lie between 1 and num_layers "
                    f"({self.num_layers})."
                )
        elif self.recompute_method is not None or self.recompute_num_layers is not None:
            found.append(
                "recompute_method and recompute_num_layers belong to --recompute-granularity full, which is not set; "
                "set it, or leave them out."
            )
        return found

    def _offload_violations(self) -> list[str]:
        number, found = self.cpu_offloading_num_layers, []
        if number < 0 or (number and number >= self.num_layers > 0):
            found.append(
                f"cpu_offloading_num_layers is {number}, but it must be less than num_layers ({self.num_layers}), and "
                "not below 0: the last layer's activations are needed at once."
            )
        if number and self.pipeline_model_parallel_size > 1:
            found.append(
                f"cpu_offloading_num_layers is {number} with pipeline_model_parallel_size "
                f"{self.pipeline_model_parallel_size}, but a pipeline keeps the activations of several micro-batches, "
                "whose backward passes begin in another order: leave out one of them."
            )
        if number and self.recompute_granularity is not None:
            found.append(
                f"cpu_offloading_num_layers is {number} with recompute_granularity {self.recompute_granularity}, but "
                "an activation is either moved to the host or recomputed: leave out one of them."
            )
        return found


def normal_init(std: float) -> "Callable[[torch.Tensor], torch.Tensor]":
    """An initializer that draws from a normal distribution of mean 0 and the given standard deviation."""

    def initialize(tensor: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.init.normal_(tensor, mean=0.0, std=std)

    return initialize
