"""Rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` (before transformers 5), and our settings."""

from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.transformer.rope import YarnScaling, yarn_attention_factor

# What ours has for these is not a setting.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TOLERANCE = 1e-6


def read_positions(config: ConfigJson, theta: float = 10000.0, key: str = "rope_parameters") -> dict[str, Any]:
    """Our settings of rotary positions.

    Args:
        config: what cannot be expressed is noted in it.
        theta: base of the wavelengths where none is named.
        key: where they are described, for messages.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        config.refuse(key, "must be an object")
        return {}
    rope = {"rope_theta": config.get("rope_theta", theta), **{k: v for k, v in given.items() if v is not None}}
    kind = rope.get("rope_type", rope.get("type", "default"))
    settings: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)),
    }
    if kind == "llama3":
        for name, value in _LLAMA3.items():
            if rope.get(name, value) != value:
                config.problems.append(
                    f"{name} of the rotary positions is {rope[name]!r} in {config.path}, but only {value} can be "
                    "expressed: another model must be used."
                )
        return {**settings, "use_rope_scaling": True, "rope_scaling_factor": float(rope.get("factor", 8.0))}
    if kind == "linear":
        return {**settings, "rotary_seq_len_interpolation_factor": float(rope.get("factor", 1.0))}
    if kind == "yarn":
        return {**settings, **_read_yarn(config, rope)}
    if kind != "default":
        config.problems.append(
            f"the rotary positions are of rope_type {kind!r} in {config.path}, but must be default, linear, llama3 or "
            "yarn: another model must be used."
        )
    return settings


def _read_yarn(config: ConfigJson, rope: dict[str, Any]) -> dict[str, Any]:
    length = config.get("max_position_embeddings", 4096)
    original = int(rope.get("original_max_position_embeddings", length))
    yarn = {
        "rotary_scaling_factor": float(rope.get("factor", length / original)),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }
    # Theirs reads the two weights of the temperature only where both are there.
    scales = {"mscale": 1.0, "mscale_all_dim": 0.0}
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = {name: float(rope[name]) for name in scales}
    elif rope.get("mscale_all_dim"):
        config.problems.append(
            f"mscale_all_dim of the rotary positions is {rope['mscale_all_dim']} in {config.path} without an mscale, "
            "which cannot be expressed: write both."
        )
    ours = yarn_attention_factor(
        YarnScaling(yarn["rotary_scaling_factor"], mscale=scales["mscale"], mscale_all_dim=scales["mscale_all_dim"])
    )
    if abs(rope.get("attention_factor", ours) - ours) > _TOLERANCE:
        config.problems.append(
            f"attention_factor of the rotary positions is {rope['attention_factor']} in {config.path}, but must be "
            f"what mscale and factor make, {ours}: another model must be used."
        )
    return {"position_embedding_type": "yarn", **yarn, **scales}


def write_positions(model: Architecture) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every version of transformers reads."""
    gpt = model.gpt
    theirs: dict[str, Any] = {"rope_theta": gpt.rotary_base, "rope_scaling": None}
    if gpt.rotary_percent != 1.0:
        theirs["partial_rotary_factor"] = gpt.rotary_percent
    yarn = gpt.yarn(model.transformer.multi_latent_attention)
    if yarn is not None and yarn.scaling_factor > 1.0:
        scaling = {
            "rope_type": "yarn",
            "factor": yarn.scaling_factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
        if not yarn.correction_range_round_to_int:
            scaling["truncate"] = False
        if yarn.mscale_all_dim:
            scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        theirs["rope_scaling"] = scaling
    elif gpt.use_rope_scaling:
        theirs["rope_scaling"] = {"rope_type": "llama3", "factor": gpt.rope_scaling_factor, **_LLAMA3}
    elif gpt.rotary_seq_len_interpolation_factor is not None:
        theirs["rope_scaling"] = {"rope_type": "linear", "factor": gpt.rotary_seq_len_interpolation_factor}
    return theirs
