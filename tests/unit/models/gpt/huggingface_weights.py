"""Where each weight of a model of the `transformers` package stands in GPTModel: tables, one for each family.

A row of a table is our name, how the weight is put together, and the names of theirs that it is made of. Rows whose
sources a layer does not have (experts in a dense layer) do not apply to it. Nothing changes but order and shape, so
gradients are converted by the same tables.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from megatron_lite.models.gpt.gpt_model import GPTModel
from tests.unit.models.gpt.test_huggingface_moe import interleaved

GROUPS = 2  # of heads that share keys and values, in all models here but those with latent attention

Arrange = Callable[..., Tensor]
Table = dict[str, tuple[Arrange, tuple[str, ...]]]


def same(weight: Tensor) -> Tensor:
    return weight


def transposed(experts: Tensor) -> Tensor:
    return experts.transpose(1, 2)


def by_group(*parts: Tensor) -> Tensor:
    """Rows of the first query group in all parts, then of the second: [g (n/g + 2) d, h] of queries, keys, values."""
    return torch.cat([one.unflatten(0, (GROUPS, -1)) for one in parts], dim=1).flatten(0, 1)


def by_group_with_gates(queries_and_gates: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Theirs has the gates of each head behind its query, ours those of each group behind its queries."""
    head = key.size(0) // GROUPS
    query, gate = (one.flatten(0, 1) for one in queries_and_gates.unflatten(0, (-1, 2, head)).unbind(1))
    return by_group(query, gate, key, value)


def gates_and_ups(gate: Tensor, up: Tensor) -> Tensor:
    return interleaved(gate, up, 0)


def gates_and_ups_of_experts(gates_then_ups: Tensor) -> Tensor:
    gate, up = gates_then_ups.chunk(2, dim=1)
    return interleaved(gate, up, 1)


MODEL: Table = {
    "embedding.word_embeddings.weight": (same, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": (same, ("model.norm.weight",)),
    "output_layer.weight": (same, ("lm_head.weight",)),
}
NORMS: Table = {
    "input_layernorm.weight": (same, ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": (same, ("post_attention_layernorm.weight",)),
}
QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
ATTENTION: Table = {
    "self_attention.linear_qkv.weight": (by_group, QKV),
    "self_attention.linear_proj.weight": (same, ("self_attn.o_proj.weight",)),
}
NORMS_OF_HEADS: Table = {
    "self_attention.q_layernorm.weight": (same, ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": (same, ("self_attn.k_norm.weight",)),
}
LATENT_ATTENTION: Table = {
    "self_attention.linear_q_proj.weight": (same, ("self_attn.q_proj.weight",)),
    "self_attention.linear_q_down_proj.weight": (same, ("self_attn.q_a_proj.weight",)),
    "self_attention.q_layernorm.weight": (same, ("self_attn.q_a_layernorm.weight",)),
    "self_attention.linear_q_up_proj.weight": (same, ("self_attn.q_b_proj.weight",)),
    "self_attention.linear_kv_down_proj.weight": (same, ("self_attn.kv_a_proj_with_mqa.weight",)),
    "self_attention.kv_layernorm.weight": (same, ("self_attn.kv_a_layernorm.weight",)),
    "self_attention.linear_kv_up_proj.weight": (same, ("self_attn.kv_b_proj.weight",)),
    "self_attention.linear_proj.weight": (same, ("self_attn.o_proj.weight",)),
}
MLP: Table = {
    "mlp.linear_fc1.weight": (gates_and_ups, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": (same, ("mlp.down_proj.weight",)),
}
BIASES: Table = {
    name.replace("weight", "bias"): (arrange, tuple(source.replace("weight", "bias") for source in sources))
    for name, (arrange, sources) in {**ATTENTION, **MLP}.items()
}
EXPERTS: Table = {
    "mlp.router.weight": (same, ("mlp.gate.weight",)),
    "mlp.experts.weight1": (gates_and_ups_of_experts, ("mlp.experts.gate_up_proj",)),
    "mlp.experts.weight2": (same, ("mlp.experts.down_proj",)),
}


def shared_experts(theirs: str) -> Table:
    """The rows of shared experts, which some families write in the singular."""
    return {
        "mlp.shared_experts.linear_fc1.weight": (
            gates_and_ups,
            (f"mlp.{theirs}.gate_proj.weight", f"mlp.{theirs}.up_proj.weight"),
        ),
        "mlp.shared_experts.linear_fc2.weight": (same, (f"mlp.{theirs}.down_proj.weight",)),
    }


DEEPSEEK: Table = {**NORMS, **LATENT_ATTENTION, **MLP, **EXPERTS, **shared_experts("shared_experts")}
LAYERS: dict[str, Table] = {
    "DeepseekV2": DEEPSEEK,
    "DeepseekV3": {**DEEPSEEK, "mlp.router.expert_bias": (same, ("mlp.gate.e_score_correction_bias",))},
    "GptOss": {
        **NORMS,
        **ATTENTION,
        **BIASES,
        "self_attention.core_attention.softmax_offset": (same, ("self_attn.sinks",)),
        "mlp.router.weight": (same, ("mlp.router.weight",)),
        "mlp.router.bias": (same, ("mlp.router.bias",)),
        # Gates and ups are interleaved in theirs too, but each expert's matrix is the other way around.
        "mlp.experts.weight1": (transposed, ("mlp.experts.gate_up_proj",)),
        "mlp.experts.bias1": (same, ("mlp.experts.gate_up_proj_bias",)),
        "mlp.experts.weight2": (transposed, ("mlp.experts.down_proj",)),
        "mlp.experts.bias2": (same, ("mlp.experts.down_proj_bias",)),
    },
    "Llama": {**NORMS, **ATTENTION, **MLP, **BIASES},
    "Qwen2": {**NORMS, **ATTENTION, **MLP, **BIASES},
    "Qwen3": {**NORMS, **ATTENTION, **NORMS_OF_HEADS, **MLP},
    "Qwen3Moe": {**NORMS, **ATTENTION, **NORMS_OF_HEADS, **EXPERTS},
    "Qwen3Next": {
        **NORMS,
        **ATTENTION,
        "self_attention.linear_qkv.weight": (by_group_with_gates, QKV),
        **NORMS_OF_HEADS,
        **EXPERTS,
        **shared_experts("shared_expert"),
        "mlp.shared_experts.gate_weight": (same, ("mlp.shared_expert_gate.weight",)),
    },
    "SmolLM3": {**NORMS, **ATTENTION, **MLP},
}


def converted(theirs: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Their weights, or gradients, by our names. Every one of them must have a place."""
    ours: dict[str, Tensor] = {}
    read: set[str] = set()
    rows = [(name, arrange, sources) for name, (arrange, sources) in MODEL.items()]
    for number in {name.split(".")[2] for name in theirs if name.startswith("model.layers.")}:
        old, new = f"model.layers.{number}.", f"decoder.layers.{number}."
        rows += [
            (new + name, arrange, tuple(old + one for one in sources))
            for name, (arrange, sources) in LAYERS[family].items()
        ]
    for name, arrange, sources in rows:
        if all(one in theirs for one in sources):
            ours[name] = arrange(*(theirs[one] for one in sources))
            read.update(sources)
    assert read == set(theirs), f"without a place: {sorted(set(theirs) - read)}"
    return ours


# Standard deviation of what is added to the weights whose names end like this; to others 0.1 is.
NOISE = {
    "e_score_correction_bias": 0.2,
    "router.bias": 0.3,
    "gate_up_proj_bias": 4.0,  # beyond the clamp
    "bias": 0.5,
    "sinks": 1.0,
}


def their_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffer that is one."""
    buffers = {name: one for name, one in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {**dict(model.named_parameters()), **buffers}


def add_noise(model: nn.Module) -> None:
    """Change what starts at constants, so that norms, biases and sinks do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in their_weights(model).items():
            width = next((width for ending, width in NOISE.items() if name.endswith(ending)), 0.1)
            one.add_(torch.randn(one.shape, generator=generator).to(one.dtype), alpha=width)


def load_theirs(ours: GPTModel, theirs: nn.Module, family: str) -> None:
    """Copy their weights; every one of ours gets its value."""
    missing, unexpected = ours.load_state_dict(converted(their_weights(theirs), family), strict=False)
    assert not unexpected
    needed = {name for name, _ in ours.named_parameters()} | {name for name in missing if name.endswith("expert_bias")}
    assert not set(missing) & needed
