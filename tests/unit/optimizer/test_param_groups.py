"""Who decays and who has its own learning rate."""

import torch
from torch import nn

from megatron_lite.optimizer.config import OptimizerConfig
from megatron_lite.optimizer.param_groups import get_param_groups
from megatron_lite.tensor_parallel.parameters import ParameterSpec

SHAPES = {
    "embedding.word_embeddings.weight": (16, 4),
    "embedding.position_embeddings.weight": (8, 4),
    "decoder.layers.0.input_layernorm.weight": (4,),
    "decoder.layers.0.self_attention.q_layernorm.weight": (2,),
    "decoder.layers.0.self_attention.k_layernorm.bias": (2,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (12, 4),
    "decoder.layers.0.self_attention.linear_qkv.bias": (12,),
    "decoder.layers.0.mlp.experts.bias": (2, 4),
    "output_layer.weight": (16, 4),
}
PARAMETERS = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
MATRICES = {
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "output_layer.weight",
}


def decayed(config: OptimizerConfig, specs=None) -> set[str]:
    groups = get_param_groups(PARAMETERS, specs or {}, config)
    assert sorted(name for group in groups for name in group["names"]) == sorted(SHAPES)
    return {name for group in groups if group["wd_mult"] == 1.0 for name in group["names"]}


def test_vectors_and_biases_do_not_decay():
    """A bias of two dimensions (one per expert) is still a bias."""
    assert decayed(OptimizerConfig()) == MATRICES


def test_query_and_key_norms_decay_when_asked():
    qk_norms = {name for name in SHAPES if "q_layernorm" in name or "k_layernorm" in name}
    assert decayed(OptimizerConfig(apply_wd_to_qk_layernorm=True)) == MATRICES | qk_norms
    older_spelling = OptimizerConfig(no_weight_decay_cond_type="apply_wd_to_qk_layernorm")
    assert decayed(older_spelling) == MATRICES | qk_norms


def test_a_declaration_has_the_last_word():
    specs = {
        "output_layer.weight": ParameterSpec(nn.init.zeros_, apply_weight_decay=False),
        "decoder.layers.0.input_layernorm.weight": ParameterSpec(nn.init.zeros_, apply_weight_decay=True),
    }
    expected = MATRICES - {"output_layer.weight"} | {"decoder.layers.0.input_layernorm.weight"}
    assert decayed(OptimizerConfig(), specs) == expected


def test_decoupled_learning_rate_is_for_embedding_and_output():
    config = OptimizerConfig(lr=1.0, decoupled_lr=0.5, decoupled_min_lr=0.25)
    own = [group for group in get_param_groups(PARAMETERS, {}, config) if not group["default_config"]]
    assert [sorted(group["names"]) for group in own] == [["embedding.word_embeddings.weight", "output_layer.weight"]]
    assert (own[0]["max_lr"], own[0]["min_lr"], own[0]["lr"]) == (0.5, 0.25, 0.5)
    assert all(group["default_config"] for group in get_param_groups(PARAMETERS, {}, OptimizerConfig(lr=1.0)))
