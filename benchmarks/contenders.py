"""The training loops that can be measured, all built from one RunConfig with the same initial weights.

Each is a function `step(micro_batches) -> loss` that trains on one global batch and does not wait for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers import plain_gpt
from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron_lite.pipeline_parallel import ForwardBackward, get_forward_backward_func
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.training.batches import MicroBatch
from megatron_lite.training.setup import build_model
from megatron_lite.training.step import train_step

Step = Callable[[list[MicroBatch]], Tensor]


def build_megatron_lite(config: RunConfig, device: torch.device) -> Step:
    """This framework on one rank, through the functions that pretrain_gpt.py uses."""
    model = model_chunks(config, device, config.training.compile)
    optimizer = get_megatron_optimizer(config.optimizer, model)
    return step_of(config, model, optimizer, get_forward_backward_func(config.transformer))


def step_of(
    config: RunConfig, model: list[nn.Module], optimizer: MegatronOptimizer, forward_backward: ForwardBackward
) -> Step:
    """The training step of this rank, in the global groups."""

    def step(micro_batches: list[MicroBatch]) -> Tensor:
        return train_step(
            model,
            optimizer,
            micro_batches,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            per_token_loss=config.transformer.calculate_per_token_loss,
            forward_backward_func=forward_backward,
        ).loss

    return step


def build_plain(config: RunConfig, device: torch.device) -> Step:
    """The plain torch loop; under --compile the whole model is one torch.compile, as its users do it.

    Raises:
        ConfigError: the plain loop cannot build that model.
    """
    shape = plain_shape(config)
    with device:
        model: nn.Module = plain_gpt.PlainGPT(shape)
    (whole,) = model_chunks(config, device)
    model.load_state_dict(plain_state_dict(whole, shape))
    chosen = config.optimizer
    assert chosen.lr is not None, "a run has a learning rate"
    betas = (chosen.adam_beta1, chosen.adam_beta2)
    optimizer = plain_gpt.build_optimizer(model, chosen.lr, betas, chosen.adam_eps, chosen.weight_decay)
    bf16 = config.transformer.params_dtype == torch.bfloat16
    if config.training.compile:
        model.compile()

    def step(micro_batches: list[MicroBatch]) -> Tensor:
        pairs = [(batch["tokens"], batch["labels"]) for batch in micro_batches]
        return plain_gpt.train_step(model, optimizer, pairs, bf16=bf16, clip_grad=chosen.clip_grad)

    return step


CONTENDERS = {"megatron_lite": build_megatron_lite, "plain": build_plain}


def model_chunks(config: RunConfig, device: torch.device, compile_layers: bool = False) -> list[nn.Module]:
    """This rank's part of the model of a run."""
    assert config.gpt.vocab_size is not None, "the command asks for it"
    return build_model(
        config.transformer,
        config.gpt,
        config.ddp,
        vocab_size=config.gpt.vocab_size,
        max_sequence_length=config.sequence_length,
        device=device,
        seed=config.rng.seed,
        compile_layers=compile_layers,
    )


def plain_shape(config: RunConfig) -> plain_gpt.PlainGPTConfig:
    """The plain loop's description of the same model.

    Raises:
        ConfigError: with each setting that the plain loop does not know.
    """
    layers, gpt = config.transformer, config.gpt
    assert gpt.vocab_size is not None, "the command asks for it"
    assert layers.ffn_hidden_size is not None, "TransformerConfig derives it"
    tanh_gelu = layers.activation_func is torch.nn.functional.gelu and not layers.gated_linear_unit
    required = {
        "LayerNorm without --apply-layernorm-1p": layers.normalization == "LayerNorm"
        and not layers.layernorm_zero_centered_gamma,
        "gelu in its tanh form": tanh_gelu and (layers.openai_gelu or layers.bias_gelu_fusion),
        "learned positions": gpt.position_embedding_type == "learned_absolute",
        "biases": layers.add_bias_linear,
        "one key and value head a query head": layers.num_query_groups == layers.num_attention_heads,
        "heads that make up the hidden size": layers.kv_channels == layers.hidden_size // layers.num_attention_heads,
        "no query and key norms": not layers.qk_layernorm,
        "no sliding window": layers.window_size is None,
        "no dropout": layers.hidden_dropout == layers.attention_dropout == 0.0,
        "no activation recomputation": layers.recompute_granularity is None,
        "AdamW": config.optimizer.optimizer == "adam",
        "float32 or bfloat16": layers.params_dtype in (torch.float32, torch.bfloat16),
        "a residual stream in the default dtype and place": not layers.fp32_residual_connection
        and not layers.apply_residual_connection_post_layernorm,
    }
    missing = [rule for rule, holds in required.items() if not holds]
    if missing:
        raise ConfigError(
            f"--against plain trains a GPT-2, and this configuration does not have: {', '.join(missing)}. Compare with "
            "a second configuration instead (--against 'FLAGS')."
        )
    return plain_gpt.PlainGPTConfig(
        num_layers=layers.num_layers,
        hidden_size=layers.hidden_size,
        num_heads=layers.num_attention_heads,
        ffn_hidden_size=layers.ffn_hidden_size,
        vocab_size=gpt.vocab_size,
        max_length=gpt.max_position_embeddings or config.sequence_length,
        tied=gpt.share_embeddings_and_output_weights,
        norm_epsilon=layers.layernorm_epsilon,
    )


_RENAMED = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "proj",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "up",
    "mlp.linear_fc2": "down",
}


def plain_state_dict(model: nn.Module, shape: plain_gpt.PlainGPTConfig) -> dict[str, Tensor]:
    """The weights of a GPTModel on one rank under the plain model's names, in its order of rows."""
    ours = {name: local(parameter.detach()) for name, parameter in model.named_parameters()}
    words = ours["embedding.word_embeddings.weight"]
    plain = {
        "token_embedding.weight": words[: shape.vocab_size],
        "position_embedding.weight": ours["embedding.position_embeddings.weight"],
        "head.weight": ours.get("output_layer.weight", words)[: shape.vocab_size],
    }
    for kind in ("weight", "bias"):
        plain[f"final_norm.{kind}"] = ours[f"decoder.final_layernorm.{kind}"]
        for layer in range(shape.num_layers):
            for name, renamed in _RENAMED.items():
                plain[f"blocks.{layer}.{renamed}.{kind}"] = ours[f"decoder.layers.{layer}.{name}.{kind}"]
            qkv = f"blocks.{layer}.qkv.{kind}"
            # Here the rows of each head stand together, there all queries, then all keys, then all values.
            by_head = plain[qkv].unflatten(0, (shape.num_heads, 3, -1))
            plain[qkv] = by_head.transpose(0, 1).flatten(0, 2)
    return plain
