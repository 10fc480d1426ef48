"""Multi-token prediction: what it is given, what the model returns, and who reads it.

That its gradients are those of plain torch at every layout is in tests/parallel/test_layout_matrix.py.
"""

from typing import Any

import pytest
import torch

from megatron_lite.models.gpt.future_tokens import future_tokens
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.tensor_parallel.parameters import named_parameter_specs
from megatron_lite.training.batches import names_read
from megatron_lite.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron_lite.transformer.transformer_config import TransformerConfig

VOCABULARY, LENGTH = 40, 8


def config(**settings: Any) -> TransformerConfig:
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "mtp_num_layers": 2}
    return TransformerConfig(**{**shape, "init_method_std": 0.2, **settings})


def model(part: dict[str, Any] | None = None, tied: bool = True, **settings: Any) -> GPTModel:
    return GPTModel(
        config(**settings),
        VOCABULARY,
        LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        **(part or {}),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    text = torch.arange(1, 2 * LENGTH + 3).view(2, LENGTH + 1)
    mask = torch.ones(2, LENGTH)
    mask[0, 3] = 0.0
    return text[:, :-1], text[:, 1:], mask


def test_each_position_is_given_later_tokens_of_its_document() -> None:
    """Mutations: a depth counted from 0; the next document's tokens; the mask not moved."""
    tokens, labels, mask = batch()
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 6, 7], [0] * 8])
    future = future_tokens(tokens, labels, mask, 2, starts)
    assert future.tokens[0, :, 0].tolist() == [2, 3, 0, 5, 6, 0, 0, 0]
    assert future.labels[0, :, 0].tolist() == [3, 4, 0, 6, 7, 0, 0, 0]
    assert future.loss_mask[0, :, 0].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert future.tokens[0, :, 1].tolist() == [3, 0, 0, 6, 0, 0, 0, 0]
    whole = future_tokens(tokens, labels, mask, 2)
    assert whole.tokens[1, :, 1].tolist() == [*tokens[1, 2:].tolist(), 0, 0]
    assert whole.loss_mask[0, :, 0].tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
    assert future_tokens(tokens[:, :1], labels[:, :1], mask[:, :1], 3).tokens.shape == (2, 1, 3)


def test_the_model_returns_the_losses_of_all_depths() -> None:
    """The first is the loss of the next token, which the depths do not change."""
    tokens, labels, mask = batch()
    gpt, positions = model(), torch.arange(LENGTH).expand(2, -1)
    alone = gpt(tokens, positions, labels=labels, loss_mask=mask)
    future = future_tokens(tokens, labels, mask, 2)
    losses = gpt(tokens, positions, labels=labels, loss_mask=mask, future_tokens=future)
    assert losses.shape == (3, 2, LENGTH)
    assert torch.equal(losses[0], alone)
    assert losses[1:].eq(0).equal(future.loss_mask.movedim(-1, 0).eq(0))
    assert gpt(tokens, positions).shape == (2, LENGTH, VOCABULARY)


def test_a_depth_sees_nothing_behind_its_token() -> None:
    """The loss of depth 1 at position t depends on tokens up to t + 1, and on no later one.

    Mutation: the layer of a depth attends to all positions.
    """
    tokens, labels, mask = batch()
    gpt, positions = model(mtp_num_layers=1).double(), torch.arange(LENGTH).expand(2, -1)

    def losses(changed: torch.Tensor) -> torch.Tensor:
        future = future_tokens(changed, labels, mask, 1)
        return gpt(changed, positions, labels=labels, loss_mask=mask, future_tokens=future)[1]  # type: ignore[no-any-return]

    changed = tokens.clone()
    changed[:, 5] = 0
    differs = (losses(tokens) - losses(changed)).abs().amax(0) > 1e-9
    assert differs.tolist() == [False, False, False, False, True, True, True, False]


@pytest.mark.parametrize("tied", [True, False])
def test_the_last_stage_has_a_copy_of_the_embeddings(tied: bool) -> None:
    """One copy, tied or not, which is then the output layer too. Mutation: a second copy as output layer."""
    first = model({"pre_process": True, "post_process": False, "layer_indices": [0]}, tied)
    last = model({"pre_process": False, "post_process": True, "layer_indices": [1]}, tied)
    copies = {name: spec.copy_of for name, spec in named_parameter_specs(last).items() if spec.copy_of}
    assert copies == {"mtp_embedding.word_embeddings.weight": "embedding.word_embeddings.weight"}
    assert (last.shared_embedding_or_output_weight() is last.mtp_embedding.word_embeddings.weight) == tied
    assert ("output_layer.weight" in dict(last.named_parameters())) == (not tied)
    assert first.mtp is None
    assert first.has_copy_of_embeddings
    assert names_read([first]) == {"tokens"}
    assert names_read([last]) == {"labels", "loss_mask"}
    assert not any(spec.copy_of for spec in named_parameter_specs(model(tied=tied)).values())


def test_names_are_megatrons_and_layers_are_like_the_last() -> None:
    """Mutation: MTP layers counted on in moe_layer_freq give the second depth experts, or none."""
    mixed = {"num_moe_experts": 2, "moe_layer_freq": [0, 1], "moe_router_topk": 1, "moe_router_pre_softmax": True}
    gpt = model(**mixed, window_size=(2, 0), window_attn_skip_freq=[0, 1])
    names = {name.partition(".transformer_layer.")[0] for name, _ in gpt.mtp.named_parameters()}  # type: ignore[union-attr]
    parts = ("enorm.weight", "enorm.bias", "hnorm.weight", "hnorm.bias", "eh_proj.weight")
    parts += ("final_layernorm.weight", "final_layernorm.bias")
    assert names == {f"layers.{depth}" for depth in (0, 1)} | {f"layers.{d}.{part}" for d in (0, 1) for part in parts}
    for depth, layer in enumerate(gpt.mtp.layers.values(), start=1):  # type: ignore[union-attr]
        assert isinstance(layer, MultiTokenPredictionLayer)
        assert layer.transformer_layer.layer_number == 2 + depth
        assert type(layer.transformer_layer.mlp).__name__ == "MoELayer"
        assert layer.transformer_layer.self_attention.core_attention.window_size == (2, 0)
    assert gpt.config.num_moe_layers == 3


def test_a_float32_residual_stream() -> None:
    """Mutation: the joined projection left in bfloat16 before the layer's additions."""
    gpt = model(bf16=True, fp32_residual_connection=True)
    seen: list[torch.dtype] = []
    for layer in gpt.mtp.layers.values():  # type: ignore[union-attr]
        layer.get_submodule("transformer_layer").register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].dtype)
        )
    tokens, labels, mask = batch()
    future = future_tokens(tokens, labels, mask, 2)
    losses = gpt(tokens, torch.arange(LENGTH).expand(2, -1), labels=labels, loss_mask=mask, future_tokens=future)
    assert seen == [torch.float32] * 2
    assert losses.isfinite().all()
