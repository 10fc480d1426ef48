"""The training loops that can be measured, all built from one RunConfig with the same initial weights.

Each is a function `step(micro_batches) -> loss` that trains on one global batch and does not wait for the device.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import huggingface, plain_gpt, plain_llama
from benchmarks.peers.training_loop import build_optimizer
from benchmarks.peers.training_loop import train_step as peer_step
from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint.conversion.filling import pieces_of_tensors
from megatron_lite.checkpoint.conversion.pieces import take
from megatron_lite.checkpoint.huggingface import Architecture, config_of
from megatron_lite.checkpoint.model_state import model_tensors
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron_lite.pipeline_parallel import ForwardBackward, get_forward_backward_func
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.training.batches import MicroBatch
from megatron_lite.training.initialize import keep_freed_memory
from megatron_lite.training.setup import build_model
from megatron_lite.training.step import train_step

Step = Callable[[list[MicroBatch]], Tensor]


def build_megatron_lite(config: RunConfig, device: torch.device) -> Step:
    """This framework, through the functions that pretrain_gpt.py uses."""
    keep_freed_memory(device)
    model = model_chunks(config, device, bool(config.training.compile))
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
    values = peer_model(config)
    with device:
        model = plain_model(values)
    weights = peer_weights(config, device)
    if values["model_type"] == "gpt2":
        # Theirs are stored the other way around, but for the embeddings.
        inside = {name for name, tensor in weights.items() if ".h." in name and tensor.dim() == 2}
        weights = {name: tensor.t() if name in inside else tensor for name, tensor in weights.items()}
    embedding = next(name for name in weights if name.endswith(("wte.weight", "embed_tokens.weight")))
    weights.setdefault("lm_head.weight", weights[embedding])  # tied
    model.load_state_dict(weights)
    return _step_of_peer(config, model, model)


def build_huggingface(config: RunConfig, device: torch.device) -> Step:
    """`transformers` with a plain loop; under --compile the whole model is one torch.compile.

    Raises:
        ConfigError: `transformers` has no such model.
    """
    model = huggingface.build(peer_model(config), peer_weights(config, device)).to(device)
    return _step_of_peer(config, model, functools.partial(huggingface.loss_of, model))


CONTENDERS = {"megatron_lite": build_megatron_lite, "plain": build_plain, "huggingface": build_huggingface}
PEERS = {"plain": "plain torch", "huggingface": "transformers"}


def _step_of_peer(config: RunConfig, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    chosen = config.optimizer
    assert chosen.lr is not None, "a run has a learning rate"
    betas = (chosen.adam_beta1, chosen.adam_beta2)
    optimizer = build_optimizer(model, chosen.lr, betas, chosen.adam_eps, chosen.weight_decay)
    parameters, bf16 = list(model.parameters()), config.transformer.params_dtype == torch.bfloat16
    if config.training.compile:
        model.compile()

    def step(micro_batches: list[MicroBatch]) -> Tensor:
        pairs = [(batch["tokens"], batch["labels"]) for batch in micro_batches]
        return peer_step(loss_of, parameters, optimizer, pairs, bf16=bf16, clip_grad=chosen.clip_grad)

    return step


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


def peer_model(config: RunConfig) -> dict[str, Any]:
    """The model of a run as a config.json of `transformers`, which describes it for all peers.

    Raises:
        ConfigError: with each setting that the peers do not know.
    """
    layers = config.transformer
    required = {
        "no dropout": layers.hidden_dropout == layers.attention_dropout == 0.0,
        "no activation recomputation": layers.recompute_granularity is None,
        "no balance loss of experts": layers.num_moe_experts is None or not any(layers.balance_coefficients),
        "AdamW": config.optimizer.optimizer == "adam",
        "float32 or bfloat16": layers.params_dtype in (torch.float32, torch.bfloat16),
        "a residual stream in the default dtype": not layers.fp32_residual_connection,
    }
    missing = [rule for rule, holds in required.items() if not holds]
    if missing:
        raise ConfigError(
            f"the peers train models with {', '.join(missing)}, and this configuration is another. Compare with a "
            "second configuration instead (--against 'FLAGS')."
        )
    family, values = config_of(_architecture(config))
    if family.model_type not in ("gpt2", "llama", "mixtral"):
        raise ConfigError(
            f"the peers train models like GPT-2, Llama or Mixtral, and this configuration is a {family.model_type}. "
            "Compare with a second configuration instead (--against 'FLAGS')."
        )
    return values


def check_peer(name: str, config: RunConfig) -> None:
    """Whether a peer can be measured.

    Raises:
        ConfigError: it is not installed, or does not know the model.
    """
    if name == "huggingface" and importlib.util.find_spec("transformers") is None:
        raise ConfigError("--against huggingface needs the package transformers: pip install transformers.")
    peer_model(config)


def _architecture(config: RunConfig) -> Architecture:
    gpt = config.gpt
    if gpt.max_position_embeddings is None:
        gpt = dataclasses.replace(gpt, max_position_embeddings=config.sequence_length)
    return Architecture(config.transformer, gpt, gpt.vocab_size)


def plain_model(values: dict[str, Any]) -> nn.Module:
    """The plain model that a config.json of GPT-2, Llama or Mixtral describes."""
    if values["model_type"] == "gpt2":
        return plain_gpt.PlainGPT(
            plain_gpt.PlainGPTConfig(
                num_layers=values["n_layer"],
                hidden_size=values["n_embd"],
                num_heads=values["n_head"],
                ffn_hidden_size=values["n_inner"],
                vocab_size=values["vocab_size"],
                max_length=values["n_positions"],
                tied=values["tie_word_embeddings"],
                norm_epsilon=values["layer_norm_epsilon"],
            )
        )
    return plain_llama.PlainLlama(
        plain_llama.PlainLlamaConfig(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            num_heads=values["num_attention_heads"],
            num_key_heads=values["num_key_value_heads"],
            head_size=values["head_dim"],
            ffn_hidden_size=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            rope_theta=values["rope_theta"],
            tied=values["tie_word_embeddings"],
            norm_epsilon=values["rms_norm_eps"],
            num_experts=values.get("num_local_experts", 0),
            experts_per_token=values.get("num_experts_per_tok", 0),
        )
    )


def peer_weights(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """The initial float32 weights of a run on one rank, under the names of `transformers` and in its order of rows."""
    family, _ = config_of(_architecture(config))
    (model,) = model_chunks(config, device)
    tensors = model_tensors([model])
    pieces = pieces_of_tensors(tensors, family, model)
    return {piece.name: take(piece, local(tensors[name])).clone() for name, found in pieces.items() for piece in found}
