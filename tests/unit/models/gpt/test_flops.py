"""The count of operations against torch's own counter, the modules of every preset, and Megatron-LM's formula."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.models.gpt.flops import num_floating_point_operations
from megatron_lite.models.gpt.future_tokens import future_tokens
from megatron_lite.models.gpt.gpt_model import GPTModel, build_gpt_model
from megatron_lite.models.gpt.parameter_count import count_parameters
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.tensor_parallel.replicated_linear import ReplicatedLinear
from megatron_lite.transformer.attention import Attention
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.transformer_config import TransformerConfig

CONFIGS = sorted((Path(__file__).parents[4] / "configs").glob("*.yaml"))
BATCH, LENGTH, VOCABULARY = 2, 16, 128

MIXED = {"num_moe_experts": 4, "moe_router_topk": 3, "moe_layer_freq": [0, 1, 1], "moe_ffn_hidden_size": 24}
LATENT = {"multi_latent_attention": True, "kv_lora_rank": 12, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4}
LATENT |= {"v_head_dim": 10, "qk_layernorm": True, "position_embedding_type": "rope"}
GATED = {"attention_output_gate": True, "num_query_groups": 2}
SINKS = {"softmax_type": "learnable", "window_size": (5, 0), "window_attn_skip_freq": 2}
ALL = MIXED | {
    "swiglu": True,
    "moe_shared_expert_intermediate_size": 40,
    "mtp_num_layers": 2,
    "softmax_type": "learnable",
}


def tiny_model(positions: str = "none", **settings: Any) -> GPTModel:
    config = TransformerConfig(**{"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, **settings})
    return GPTModel(config, VOCABULARY, LENGTH, position_embedding_type=positions)


def counted(model: GPTModel, training: bool) -> int:
    """What torch counts in a forward pass with loss, or in that and its backward pass.

    The loss adds the weight's gradient up in place, by an operation that torch's counter does not know. Nor does it
    know the kernels of a CPU, so attention is given a mask that hides nothing, which leads to SDPA.
    """
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    depths = model.config.mtp_num_layers
    future = future_tokens(ids, ids, torch.ones_like(ids), depths) if depths else None
    products_in_place = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with (
        FlopCounterMode(display=False, custom_mapping=products_in_place) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.set_grad_enabled(training),
    ):
        loss = model(ids, positions, mask, labels=ids, future_tokens=future)
        if training:
            loss.sum().backward()
    return counter.get_total_flops()


def not_counted_of_forward(config: TransformerConfig) -> float:
    """What a forward pass computes beside: the half of the scores that is masked, what the core fills up of the
    narrower of latent attention's queries and values, one more key for sinks, and the router's products.
    """
    layers, tokens = config.num_layers + (config.mtp_num_layers or 0), BATCH * LENGTH
    heads, query, value = config.num_attention_heads, config.query_channels, config.value_channels
    masked = tokens * LENGTH * heads * (query + value)
    filled = 2 * tokens * LENGTH * heads * abs(query - value)
    sinks = 0 if config.softmax_type == "vanilla" else 2 * tokens * heads * 2 * max(query, value)
    routers = config.num_moe_layers * 2 * tokens * config.hidden_size * (config.num_moe_experts or 0)
    return layers * (masked + filled + sinks) + routers


@pytest.mark.parametrize("training", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"swiglu": True, "num_query_groups": 2, "kv_channels": 16},
        {"num_query_groups": 1},
        {"num_moe_experts": 4},
        MIXED,
        MIXED | {"swiglu": True, "moe_shared_expert_intermediate_size": 40},
        MIXED | {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_layer_freq": 2},
        GATED,
        LATENT,
        LATENT | {"q_lora_rank": 20},
        LATENT | {"q_lora_rank": 20, "v_head_dim": 14},
        {"mtp_num_layers": 1},
        {"mtp_num_layers": 2} | MIXED,
        SINKS,
        ALL | LATENT | {"q_lora_rank": 20},
        ALL | GATED | SINKS,
    ],
)
def test_equals_torchs_counter(settings: dict[str, Any], training: bool) -> None:
    """Of a forward pass, and of a whole training step, which is three of them.

    Mutations, each of which fails some case: no topk; the dense width for experts; all layers alike; no gate; queries
    without their latent; keys without their rotated part; values as wide as queries; depths without projection, without
    output layer, without attention, or always dense; a window counted by its width.
    """
    given = dict(settings)
    model = tiny_model(given.pop("position_embedding_type", "none"), **given)
    found = counted(model, training)
    wanted = num_floating_point_operations(model.config, VOCABULARY, BATCH, LENGTH)
    assert (found if training else 3 * found) - 3 * not_counted_of_forward(model.config) == wanted


def test_parameters_that_a_token_meets() -> None:
    """Mutations: counting experts as active, or 1 of them instead of topk, changes the second number."""
    model = tiny_model(add_bias_linear=False, **MIXED)
    count = count_parameters(model, model.config)
    one_expert = 2 * 32 * 24
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.experts == 2 * 4 * one_expert
    assert count.active == count.total - 2 * one_expert


def preset(path: Path) -> RunConfig:
    """What a preset describes, whatever its layout."""
    words = "--dry-run --world-size 8192 --global-batch-size 8192 --micro-batch-size 1"
    return parse_args(["--config", str(path), *words.split()])


def operations_of_modules(model: GPTModel, length: int) -> float:
    """Operations of a step a token, from the weights that a model really has: 6 for each of a matrix.

    An expert counts by the share of the tokens that come to it. Tied output weights are counted where they are used.
    """
    config = model.config

    def weights(module: nn.Module) -> Iterator[float]:
        if (
            isinstance(module, ColumnParallelLinear | RowParallelLinear | ReplicatedLinear)
            and module.weight is not None
        ):
            yield module.weight.numel()
        if isinstance(module, GroupedMLP):
            share = config.moe_router_topk / (config.num_moe_experts or 1)
            yield share * (module.weight1.numel() + module.weight2.numel())

    of_layers = sum(n for name, one in model.named_modules() if name != "output_layer" for n in weights(one))
    outputs = (1 + (config.mtp_num_layers or 0)) * model.shared_embedding_or_output_weight().numel()
    cores = 0.0
    for module in model.modules():
        if isinstance(module, Attention):
            values = module.linear_proj.input_size
            queries = values // config.value_channels * config.query_channels
            cores += 3.0 * (queries + values) * length
    return 6 * (of_layers + outputs) + cores


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_counts_what_its_modules_have(path: Path) -> None:
    """Mutations: as those of torch's counter; and a configuration that the modules do not follow."""
    run = preset(path)
    alone = {"tensor_model_parallel_size": 1, "context_parallel_size": 1, "pipeline_model_parallel_size": 1}
    alone |= {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1, "sequence_parallel": False}
    with torch.device("meta"):
        model = build_gpt_model(replace(run.transformer, **alone), run.gpt, 1, run.sequence_length)
    tokens = 5 * run.sequence_length
    found = num_floating_point_operations(run.transformer, model.padded_vocab_size, 5, run.sequence_length)
    assert found == tokens * operations_of_modules(model, run.sequence_length)


def megatrons_formula(c: TransformerConfig, padded_vocab_size: int, tokens: int, length: int) -> float:
    """The closed form of Megatron-LM's num_floating_point_operations (core 0.20) for sequences that are not packed.

    Its terms: MLPs of dense layers and of layers of experts, attention's projections, norms and projection of each
    depth, the output layers, attention's core.
    """
    depths = c.mtp_num_layers or 0
    pattern = [0] * c.num_layers
    if c.num_moe_experts is not None:
        every = c.moe_layer_freq
        pattern = [int(i % every == 0) for i in range(c.num_layers)] if isinstance(every, int) else every
    experts = sum(pattern) + depths * pattern[-1]
    layers = c.num_layers + depths
    h, heads, factor = c.hidden_size, c.num_attention_heads, 3 if c.gated_linear_unit else 2
    of_experts = (c.moe_ffn_hidden_size or 0) * c.moe_router_topk + (c.moe_shared_expert_intermediate_size or 0)
    mlps = 6 * h * factor * ((c.ffn_hidden_size or 0) * (layers - experts) + (of_experts * experts if experts else 0))
    if c.multi_latent_attention:
        query, value = c.qk_head_dim + c.qk_pos_emb_head_dim, c.v_head_dim
        latent = c.q_lora_rank
        q_term = h * heads * query if latent is None else latent * (h + heads * query + 1)
        kv_term = c.kv_lora_rank * (h + heads * (c.qk_head_dim + value) + 1) + h * c.qk_pos_emb_head_dim
        projections, core = 6 * (q_term + kv_term + heads * value * h), 3 * heads * (query + value)
    else:
        q, kv = (c.kv_channels or 0) * heads, (c.kv_channels or 0) * (c.num_query_groups or 0)
        projections = 6 * (h * (q + 2 * kv + (q if c.attention_output_gate else 0)) + q * h)
        core = 6 * q
    further = 6 * depths * (3 * h + 2 * h * h)
    logits = 6 * h * padded_vocab_size * (depths + 1)
    return float(tokens * (mlps + projections * layers + further + logits + length * core * layers))


def megatrons_norms(c: TransformerConfig) -> int:
    """What Megatron adds for each token and we do not, as it is no matrix product: one weight for each normalized
    channel, of the latents of each layer and of 3 h in each depth of multi-token prediction.
    """
    depths = c.mtp_num_layers or 0
    latents = (c.q_lora_rank or 0) + c.kv_lora_rank if c.multi_latent_attention else 0
    return 6 * ((c.num_layers + depths) * latents + depths * 3 * c.hidden_size)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_counts_as_megatron_does(path: Path) -> None:
    """But for norms, which are next to nothing. Mutation: count those of latents, or of depths."""
    run = preset(path)
    padded = -(-(run.gpt.vocab_size or 0) // 1024) * 1024
    tokens = 3 * run.sequence_length
    theirs = megatrons_formula(run.transformer, padded, tokens, run.sequence_length)
    norms = tokens * megatrons_norms(run.transformer)
    assert num_floating_point_operations(run.transformer, padded, 3, run.sequence_length) == theirs - norms
    assert norms < (1e-5 if run.transformer.hidden_size >= 2048 else 1e-3) * theirs


def test_what_megatrons_own_code_counts() -> None:
    """One sequence of Llama-3 8B, and of DeepSeek-V3 with and without multi-token prediction, by Megatron-LM's code."""
    folder = CONFIGS[0].parent
    llama = preset(folder / "llama3_8b.yaml").transformer
    assert num_floating_point_operations(llama, 128_256, 1, 8192) == 421_645_529_382_912
    deepseek = preset(folder / "deepseek_v3.yaml").transformer
    alone = replace(deepseek, mtp_num_layers=None, pipeline_model_parallel_layout=None, pipeline_model_parallel_size=1)
    for config, theirs in ((deepseek, 1_064_931_126_411_264), (alone, 1_023_230_173_249_536)):
        norms = 4096 * megatrons_norms(config)
        assert num_floating_point_operations(config, 129_280, 1, 4096) == theirs - norms


def test_llama3_8b() -> None:
    """6 operations per token and weight of a matrix product, plus attention; 8.03 G weights, 0.53 embed."""
    config = TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        swiglu=True,
    )
    weights = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    attention = 6 * 4096 * 8192 * 32
    assert num_floating_point_operations(config, 128_256, 1, 8192) == 8192 * (6 * weights + attention)
