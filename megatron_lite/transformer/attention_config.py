"""AttentionConfig: the knobs of a layer's attention. TransformerConfig extends it."""

from dataclasses import dataclass

from megatron_lite.config_field import knob
from megatron_lite.model_parallel_config import CP_COMM_TYPES
from megatron_lite.transformer.attention_choices import cp_comm_type_of
from megatron_lite.transformer.attention_rules import attention_violations
from megatron_lite.transformer.moe.moe_config import MoEConfig

SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")


@dataclass
class AttentionConfig(MoEConfig):
    """The width of the residual stream and what attention does with it. Field names and defaults are Megatron's.

    Symbols used in docstrings: h = hidden_size, n = num_attention_heads, g = num_query_groups, d = kv_channels.
    """

    # Shape
    hidden_size: int = knob(0, "Width h of the residual stream.")
    num_attention_heads: int = knob(0, "Number of attention heads n.")
    kv_channels: int | None = knob(None, "Width d of one head; default h / n.")
    group_query_attention: bool = knob(False, "Share keys and values between heads; see --num-query-groups.")
    num_query_groups: int | None = knob(None, "Number of key/value heads g; default n, or 1 with the flag above.")

    # Contents
    add_qkv_bias: bool = knob(False, "The query-key-value projection has a bias even if other linears have none.")
    qk_layernorm: bool = knob(
        False, "Normalize each query and key head before the attention scores; in latent attention the latents."
    )
    attention_output_gate: bool = knob(False, "Multiply the attention's output by a learned sigmoid gate per channel.")
    softmax_type: str = knob(
        "vanilla",
        "off-by-one and learnable add a key to the softmax that has no value, so that a head can look nowhere: an "
        "attention sink, its score 0 or a parameter of each head.",
        choices=SOFTMAX_TYPES,
    )
    softmax_scale: float | None = knob(None, "Scale of the attention scores; default 1 / sqrt(d).", flag=False)
    window_size: tuple[int, int] | None = knob(
        None, "Sliding-window attention: positions visible to the left and right, such as 4095,0; -1 is unlimited."
    )
    window_attn_skip_freq: int | list[int] | None = knob(
        None, "Layers with full attention among sliding-window ones: every N-th, or a list of 0 (full) and 1 (window)."
    )
    no_rope_freq: int | list[int] | None = knob(
        None, "Layers without rotary positions: every N-th, or a list of 0 (rotary) and 1 (none), as [0,0,0,1]*4."
    )
    attention_dropout: float = knob(0.0, "Dropout on the attention probabilities (Megatron's default is 0.1).")

    # Multi-latent attention
    multi_latent_attention: bool = knob(
        False, "Keys and values come out of one small vector a token (DeepSeek's MLA); positions are rotary."
    )
    q_lora_rank: int | None = knob(None, "MLA: width of the queries' latent vector; default: queries have none.")
    kv_lora_rank: int = knob(32, "MLA: width of the latent vector of keys and values.")
    qk_head_dim: int = knob(128, "MLA: width of the part of queries and keys that knows no position.")
    qk_pos_emb_head_dim: int = knob(64, "MLA: width of the part of queries and keys that is rotated.")
    v_head_dim: int = knob(128, "MLA: width of the values.")

    # Communication and kernels
    cp_comm_type: str | list[str] | None = knob(
        None,
        "How context parallel ranks communicate in attention: p2p (a ring, the default), all_gather (or allgather), "
        "a2a, or a2a+p2p with --hierarchical-context-parallel-sizes; one for all layers or one for each.",
        choices=CP_COMM_TYPES,
    )
    attention_softmax_in_fp32: bool = knob(True, "Softmax in float32, as every backend here.", flag=False)
    apply_query_key_layer_scaling: bool = knob(
        False, "Divide the scores by the layer number before and multiply after the cast, for fp16."
    )
    attention_backend: str = knob(
        "auto",
        "Attention implementation: auto lets torch choose, flash and fused (cuDNN) insist, unfused is plain math.",
        choices=("auto", "flash", "fused", "unfused", "local"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tidy_cp_comm_type()
        if self.num_query_groups is None:
            self.num_query_groups = 1 if self.group_query_attention else self.num_attention_heads
        if self.kv_channels is None and self.num_attention_heads > 0:
            self.kv_channels = self.hidden_size // self.num_attention_heads

    def _tidy_cp_comm_type(self) -> None:
        """One spelling of each type, and a list only where layers may differ."""
        given = self.cp_comm_type
        if given is None:
            return
        types = ["all_gather" if one == "allgather" else one for one in ([given] if isinstance(given, str) else given)]
        self.cp_comm_type = types[0] if len(types) == 1 else types

    @property
    def query_channels(self) -> int:
        """Width of one query, and of one key, in the scores: d, or both parts of latent attention's."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim if self.multi_latent_attention else self.kv_channels or 0

    @property
    def value_channels(self) -> int:
        """Width of one value, and of what one head puts out."""
        return self.v_head_dim if self.multi_latent_attention else self.kv_channels or 0

    @property
    def rotary_channels(self) -> int:
        """Width of what rotary positions may rotate of a query."""
        return self.qk_pos_emb_head_dim if self.multi_latent_attention else self.kv_channels or 0

    @property
    def has_hierarchical_context_parallelism(self) -> bool:
        """Whether a layer communicates over the two groups of hierarchical_context_parallel_sizes."""
        layers = range(1, self.num_layers + 1)
        return self.context_parallel_size > 1 and any(cp_comm_type_of(self, n) == "a2a+p2p" for n in layers)

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        return super().violations() + list(attention_violations(self))
