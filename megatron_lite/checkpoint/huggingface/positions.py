"""Rotary positions: `rope_scaling` and `rope_theta`, or `rope_parameters` since transformers 5, and our settings."""

from collections.abc import Mapping
from typing import Any

from megatron_lite.checkpoint.conversion.architecture import Architecture
from megatron_lite.checkpoint.huggingface.config_json import ConfigJson
from megatron_lite.transformer.rope import YarnScaling, yarn_attention_factor

# What ours has for these is not a setting.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_KINDS = ("default", "linear", "llama3", "yarn")
_TOLERANCE = 1e-6


class _Rope:
    """The description of rotary positions that transformers takes from a config.json, with its faults noted there.

    `rope_scaling` wins over `rope_parameters`, `rope_theta` inside over the one outside, but the context length of the
    original training (`original_max_position_embeddings`) outside over the one inside.
    """

    def __init__(self, config: ConfigJson, theta: float, absent: Mapping[str, Any]) -> None:
        self.config = config
        given = config.get("rope_scaling") or config.get("rope_parameters", absent)
        if not isinstance(given, Mapping):
            config.problems.append(f"the rotary positions of {config.path} are {given!r}, but must be an object.")
            given = {}
        nested = [key for key, value in given.items() if isinstance(value, Mapping)]
        if nested:
            self.refuse(nested[0], given[nested[0]], "positions of one kind of layer alone cannot be expressed")
        self.given = given
        self.kind = given.get("rope_type", given.get("type", "default"))
        self.theta = self.number("rope_theta", config.get("rope_theta", theta))
        self.partial = self.number("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        self.length = config.integer("max_position_embeddings")
        original = config.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
        self.original = self.length if original is None else original

    def number(self, key: str, default: Any = None) -> float:
        """A member that is a number; without a default it must be there."""
        value = self.given.get(key)
        value = default if value is None else value
        if type(value) in (int, float):
            return float(value)
        self.refuse(key, value, "must be a number")
        return 1.0

    def refuse(self, key: str, value: Any, rule: str, remedy: str = "another model must be used") -> None:
        """Note a member that cannot be expressed."""
        self.config.problems.append(
            f"{key} of the rotary positions is {value!r} in {self.config.path}, but {rule}: {remedy}."
        )


def read_positions(
    config: ConfigJson,
    theta: float = 10000.0,
    absent: Mapping[str, Any] | None = None,
    partial: bool = False,
    kinds: tuple[str, ...] = _KINDS,
) -> dict[str, Any]:
    """Our settings of rotary positions.

    Args:
        config: what cannot be expressed is noted in it.
        theta: base of the wavelengths where none is named.
        absent: the description that a config.json without one means.
        partial: models of this family can rotate a part of each head.
        kinds: of positions that models of this family have.
    """
    rope = _Rope(config, theta, absent or {})
    if rope.partial != 1.0 and not partial:
        rope.refuse(
            "partial_rotary_factor",
            rope.partial,
            "transformers' models of this type rotate whole heads whatever it says",
            "leave it out if these weights were trained so; models that rotate parts of heads are of type phi3",
        )
    settings: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": rope.theta,
        "rotary_percent": rope.partial if partial else 1.0,
    }
    if rope.kind not in kinds:
        rope.refuse("rope_type", rope.kind, f"must be one of: {', '.join(kinds)}")
    elif rope.kind == "llama3":
        for name, value in _LLAMA3.items():
            actual = rope.original if name.startswith("original") else rope.number(name)
            if actual != value:
                rope.refuse(name, actual, f"only {value} can be expressed")
        settings |= {"use_rope_scaling": True, "rope_scaling_factor": rope.number("factor")}
    elif rope.kind == "linear":
        settings["rotary_seq_len_interpolation_factor"] = rope.number("factor")
    elif rope.kind == "yarn":
        settings |= _read_yarn(rope)
    if rope.kind in ("llama3", "linear") and rope.given.get("mscale_all_dim"):
        rope.refuse("mscale_all_dim", rope.given["mscale_all_dim"], "belongs to yarn")
    return settings


def _read_yarn(rope: _Rope) -> dict[str, Any]:
    given, original = rope.given, rope.original
    if type(original) is not int or original < 1:
        rope.refuse("original_max_position_embeddings", original, "must be a positive number")
        original = 1
    factor = rope.length / original if "factor" in given and given["factor"] is None else rope.number("factor")
    if factor < 1.0:
        rope.refuse("factor", factor, "must be at least 1")
        factor = 1.0
    yarn = {
        "rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(given.get("beta_fast") or 32),
        "yarn_beta_slow": float(given.get("beta_slow") or 1),
        # Null means no to theirs, where a missing one means yes.
        "yarn_correction_range_round_to_int": bool(given.get("truncate", True)),
    }
    # Theirs reads the two weights of the temperature only where both are there.
    scales = {"mscale": 1.0, "mscale_all_dim": 0.0}
    if given.get("mscale") and given.get("mscale_all_dim"):
        scales = {name: rope.number(name) for name in scales}
    elif given.get("mscale_all_dim"):
        rope.refuse("mscale_all_dim", given["mscale_all_dim"], "has no mscale next to it", "write both")
    ours = yarn_attention_factor(YarnScaling(factor, mscale=scales["mscale"], mscale_all_dim=scales["mscale_all_dim"]))
    actual = rope.number("attention_factor", ours)
    if abs(actual - ours) > _TOLERANCE:
        rope.refuse("attention_factor", actual, f"must be what mscale and factor make, {ours}")
    return {"position_embedding_type": "yarn", **yarn, **scales}


def write_positions(model: Architecture) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every version of transformers reads, for heads rotated as a whole."""
    gpt = model.gpt
    theirs: dict[str, Any] = {"rope_theta": gpt.rotary_base, "rope_scaling": None}
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
