"""GPTModel split over TP ranks, with and without sequence parallelism, against the same weights on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.tensor_parallel import local, model_parallel_cuda_manual_seed
from megatron_lite.tensor_parallel.parameters import initialize_parameters, named_parameter_specs
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.parallel.pool import WorkerPool
from tests.requirements import needs_compiler

VOCAB, LENGTH, BATCH = 51, 8, 3

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2 with qk-norm": ({"qk_layernorm": True}, {"share_embeddings_and_output_weights": True}),
    "gated, biases, untied, grouped": (
        {"swiglu": True, "normalization": "RMSNorm", "num_query_groups": 4, "num_attention_heads": 8},
        {"position_embedding_type": "rope"},
    ),
    "fewer key/value heads than ranks": ({"num_query_groups": 1, "qk_layernorm": True}, {}),
    "no positions, tied": (
        {"add_bias_linear": False, "qk_layernorm": True},
        {"position_embedding_type": "none", "share_embeddings_and_output_weights": True},
    ),
}
SPLITS = [(2, False), (2, True), (4, True)]


def build(kind: str, **overrides: Any) -> GPTModel:
    settings, model_settings = MODELS[kind]
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "fp64": True, "init_method_std": 0.3}
    config = TransformerConfig(**{**shape, **settings, **overrides})
    model = GPTModel(config, VOCAB, LENGTH, make_vocab_size_divisible_by=4, **model_settings)
    initialize_parameters(model, seed=3)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, VOCAB, (2, BATCH, LENGTH), generator=generator)
    mask = torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64).round()
    return ids, torch.arange(LENGTH).expand(BATCH, -1), labels, mask


def _train_once(rank: int, world_size: int, kind: str, sequence_parallel: bool, granularity: str | None) -> None:
    """Compares on this rank: losses, logits, and each gradient after the sums its declaration asks for."""
    ids, positions, labels, mask = batch()
    alone = build(kind)  # before there are groups, a model is one process's
    wanted_loss, logits = alone(ids, positions, labels=labels, loss_mask=mask), alone(ids, positions)
    wanted_loss.sum().backward()

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    settings: dict[str, Any] = {"sequence_parallel": sequence_parallel, "recompute_granularity": granularity}
    if granularity == "full":
        settings |= {"recompute_method": "block", "recompute_num_layers": 1}
        settings["distribute_saved_activations"] = not sequence_parallel
    split = build(kind, tensor_model_parallel_size=world_size, **settings)
    loss = split(ids, positions, labels=labels, loss_mask=mask)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-11, atol=1e-12)
    loss.sum().backward()
    specs, wanted = named_parameter_specs(split), dict(alone.named_parameters())
    assert list(specs) == list(wanted)
    for name, parameter in split.named_parameters():
        reference = wanted[name].grad
        assert parameter.grad is not None, name
        assert reference is not None, name
        grad = local(parameter.grad)
        if specs[name].partial_over_tp:
            torch.distributed.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        if isinstance(parameter, DTensor):
            reference = reference.chunk(world_size, parameter.placements[0].dim)[rank]  # type: ignore[attr-defined]
        torch.testing.assert_close(
            grad, reference, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )

    mine = split(ids, positions)
    columns = mine.size(-1)
    part = logits[..., rank * columns : (rank + 1) * columns]
    torch.testing.assert_close(mine[..., : part.size(-1)], part, rtol=1e-10, atol=1e-11)
    assert mine[..., part.size(-1) :].eq(-torch.inf).all()
    split.parallel_output, split.output_layer.gather_output = False, True
    torch.testing.assert_close(split(ids, positions), logits, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("tp", "sequence_parallel"), SPLITS)
def test_equals_one_rank(pool: WorkerPool, kind: str, tp: int, sequence_parallel: bool) -> None:
    """T1, T2, T5, T7, T8, T10. Fails with any partial_over_tp changed, or with positions added after the split."""
    pool.run(_train_once, kind, sequence_parallel, None, world_size=tp)


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recomputation(pool: WorkerPool, granularity: str, sequence_parallel: bool) -> None:
    pool.run(_train_once, "gpt2 with qk-norm", sequence_parallel, granularity, world_size=2)


def _compiled(
    rank: int, world_size: int, sequence_parallel: bool, kinds: list[str], backend: str, settings: dict[str, Any]
) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    for kind in kinds:
        gradients = []
        for compiled in (False, True):
            model = build(
                kind,
                num_layers=1,
                tensor_model_parallel_size=world_size,
                sequence_parallel=sequence_parallel,
                **settings,
            )
            if compiled:
                torch.compiler.reset()
                for layer in model.decoder.layers.values():
                    layer.compile(fullgraph=True, backend=backend)
            ids, positions, labels, mask = batch()
            model(ids, positions, labels=labels, loss_mask=mask).sum().backward()
            gradients.append([local(p.grad) for p in model.parameters() if p.grad is not None])
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.full
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, True), (1, False), (2, False)])
def test_layers_trace_to_one_graph(pool: WorkerPool, tp: int, sequence_parallel: bool) -> None:
    """fullgraph=True raises at any break of the graph, also one at a collective."""
    kinds = list(MODELS) if tp == 1 or not sequence_parallel else ["gated, biases, untied, grouped"]
    pool.run(_compiled, sequence_parallel, kinds, "aot_eager", {}, world_size=tp)


@needs_compiler
@pytest.mark.full
def test_a_layer_compiles_with_its_collectives(pool: WorkerPool) -> None:
    pool.run(_compiled, True, ["gated, biases, untied, grouped"], "inductor", {}, world_size=2, timeout_s=400.0)


def test_compiled_layers_are_recomputed_whole(pool: WorkerPool) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    pool.run(_compiled, True, ["gpt2 with qk-norm"], "aot_eager", full, world_size=2)


def _dropout(rank: int, world_size: int, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model = build(
        "gpt2 with qk-norm",
        tensor_model_parallel_size=world_size,
        sequence_parallel=sequence_parallel,
        hidden_dropout=0.5,
    )
    model_parallel_cuda_manual_seed(7)
    ids, positions, _, _ = batch()
    embedded = model.embedding(ids, positions)
    logits = model(ids, positions)
    return embedded.detach() == 0, logits.detach()[..., :1]


def test_dropout_is_shared_where_activations_are(pool: WorkerPool) -> None:
    """T12. Replicated activations drop the same elements on both ranks, parts of a sequence different ones."""
    (first, _), (second, _) = pool.run(_dropout, False, world_size=2)
    assert torch.equal(first, second)
    assert 0.4 < first.double().mean() < 0.6
    (first, _), (second, _) = pool.run(_dropout, True, world_size=2)
    assert first.shape == (LENGTH // 2, BATCH, 32)
    assert not torch.equal(first, second)


def _decode(rank: int, world_size: int) -> None:
    ids, positions, _, _ = batch()
    wanted = build("gated, biases, untied, grouped")(ids, positions)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    split = build("gated, biases, untied, grouped", tensor_model_parallel_size=world_size)
    split.parallel_output, split.output_layer.gather_output = False, True
    context = InferenceContext(BATCH, LENGTH)
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4), (4, 8)):
            got = split(ids[:, start:end], positions[:, start:end], inference_context=context)
            torch.testing.assert_close(got, wanted[:, start:end], rtol=1e-10, atol=1e-11)


def test_decoding_with_a_cache(pool: WorkerPool) -> None:
    pool.run(_decode, world_size=2)


def _groups_that_do_not_split(rank: int, world_size: int) -> str:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    with pytest.raises(ConfigError) as raised:
        build("gpt2 with qk-norm", num_attention_heads=6, kv_channels=4, num_query_groups=3)
    return str(raised.value)


def test_key_value_heads_that_do_not_split_are_refused(pool: WorkerPool) -> None:
    assert "use a tensor parallel size among 1, 3" in pool.run(_groups_that_do_not_split, world_size=2)[0]
