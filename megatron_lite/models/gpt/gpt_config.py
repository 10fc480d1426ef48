"""GPTModelConfig: vocabulary and position embeddings, what a GPT has besides its transformer layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.config_field import Validated, knob

if TYPE_CHECKING:
    from megatron_lite.transformer.rope import YarnScaling

POSITION_EMBEDDING_TYPES = ("learned_absolute", "rope", "yarn", "none")


@dataclass
class GPTModelConfig(Validated):
    """Vocabulary, positions and the output layer. Flags and defaults are Megatron's."""

    # Vocabulary
    vocab_size: int | None = knob(None, "Size of the vocabulary before padding; default the tokenizer's.")
    padded_vocab_size: int | None = knob(None, "Size of the vocabulary after padding; default computed.")
    make_vocab_size_divisible_by: int = knob(128, "Pad the vocabulary to a multiple of this.")
    pad_vocab_size: bool = knob(True, "Pad the vocabulary.", flag=("--no-pad-vocab-size", "--disable-pad-vocab-size"))
    share_embeddings_and_output_weights: bool = knob(
        True, "The output layer uses the word embeddings as weights.", flag="--untie-embeddings-and-output-weights"
    )

    # Positions
    max_position_embeddings: int | None = knob(None, "Longest sequence the model can see; default the sequence length.")
    position_embedding_type: str = knob(
        "learned_absolute", "How positions enter the model.", choices=POSITION_EMBEDDING_TYPES
    )
    use_rotary_position_embeddings: bool = knob(False, "Older spelling of --position-embedding-type rope.")
    rope_type: str | None = knob(
        None,
        "Latent attention with --position-embedding-type rope: yarn, the default, applies the YaRN settings below.",
        choices=("rope", "yarn"),
    )
    rotary_base: float = knob(10000, "Base of the rotary wavelengths.")
    rotary_percent: float = knob(1.0, "Share of each head that is rotated.")
    rotary_interleaved: bool = knob(False, "Rotate neighbouring channels instead of the two halves of a head.")
    rotary_seq_len_interpolation_factor: float | None = knob(None, "Divide positions by this (linear interpolation).")
    use_rope_scaling: bool = knob(False, "Llama 3.1's scaling of the rotary wavelengths.")
    rope_scaling_factor: float = knob(8.0, "Factor of --use-rope-scaling.")

    # YaRN (--position-embedding-type yarn)
    rotary_scaling_factor: float = knob(1.0, "YaRN: new context length over the original one.")
    yarn_original_max_position_embeddings: int = knob(4096, "YaRN: context length of the original training.")
    yarn_beta_fast: float = knob(32.0, "YaRN: pairs that turn more often than this are kept.")
    yarn_beta_slow: float = knob(1.0, "YaRN: pairs that turn less often than this are interpolated.")
    mscale: float = knob(1.0, "YaRN: weight of the attention temperature.")
    mscale_all_dim: float = knob(0.0, "YaRN: weight of the temperature that is divided out.")
    yarn_correction_range_round_to_int: bool = knob(True, "YaRN: round the ramp's ends to whole pairs.")

    def __post_init__(self) -> None:
        if self.use_rotary_position_embeddings:
            self.position_embedding_type = "rope"

    def yarn(self, multi_latent_attention: bool = False) -> "YarnScaling | None":
        """The settings of YaRN, None unless it is the position embedding, in latent attention by default."""
        kind = self.position_embedding_type
        if kind == "rope" and multi_latent_attention and self.rope_type != "rope":
            kind = "yarn"
        if kind != "yarn":
            return None
        from megatron_lite.transformer.rope import YarnScaling

        return YarnScaling(
            scaling_factor=self.rotary_scaling_factor,
            original_max_position_embeddings=self.yarn_original_max_position_embeddings,
            beta_fast=self.yarn_beta_fast,
            beta_slow=self.yarn_beta_slow,
            mscale=self.mscale,
            mscale_all_dim=self.mscale_all_dim,
            correction_range_round_to_int=self.yarn_correction_range_round_to_int,
        )

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        found = super().violations()
        if self.make_vocab_size_divisible_by < 1:
            found.append(
                f"make_vocab_size_divisible_by is {self.make_vocab_size_divisible_by}, but it must be at least 1; "
                "the usual value is 128."
            )
        if self.vocab_size is not None and self.vocab_size < 1:
            found.append(f"vocab_size is {self.vocab_size}, but it must be at least 1; write that of the tokenizer.")
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            found.append(
                f"max_position_embeddings is {self.max_position_embeddings}, but it must be at least the sequence "
                "length; leave it out to have it so."
            )
        padded = self.padded_vocab_size
        if padded is not None and self.vocab_size is not None and padded < self.vocab_size:
            found.append(
                f"padded_vocab_size is {padded}, but it must hold vocab_size ({self.vocab_size}) tokens; leave it out "
                "to have it computed."
            )
        if not 0.0 < self.rotary_percent <= 1.0:
            found.append(f"rotary_percent is {self.rotary_percent}, but it is a share: 0 < value <= 1.")
        if self.use_rope_scaling and self.position_embedding_type != "rope":
            found.append(
                f"use_rope_scaling is set with position_embedding_type {self.position_embedding_type}, but it scales "
                "rope; set --position-embedding-type rope or leave it out."
            )
        if self.rope_type == "rope" and self.position_embedding_type == "yarn":
            found.append("rope_type is rope, but position_embedding_type is yarn, which says the opposite: keep one.")
        interpolated = self.rotary_seq_len_interpolation_factor
        if interpolated is not None and (interpolated <= 0 or self.position_embedding_type != "rope"):
            found.append(
                f"rotary_seq_len_interpolation_factor is {interpolated} with position_embedding_type "
                f"{self.position_embedding_type}, but it must be positive and belongs to rope."
            )
        for name in ("rotary_base", "rope_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast"):
            if getattr(self, name) <= 0:
                found.append(f"{name} is {getattr(self, name)}, but it must be positive; leave it out for the default.")
        if self.yarn_beta_slow <= 0 or self.yarn_beta_slow > self.yarn_beta_fast:
            found.append(
                f"yarn_beta_slow is {self.yarn_beta_slow}, but it must be positive and at most yarn_beta_fast "
                f"({self.yarn_beta_fast})."
            )
        if self.rotary_scaling_factor < 1.0:
            found.append(f"rotary_scaling_factor is {self.rotary_scaling_factor}, but YaRN extends: at least 1.")
        return found
