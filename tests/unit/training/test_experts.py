"""Experts in the training loop: the scale of their losses, the bias, what is counted and where it is written."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_lite import parallel_state
from megatron_lite.distributed import DistributedDataParallelConfig
from megatron_lite.inference.load_model import load_model
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.pipeline_parallel.pipelined import PipelinedForwardBackward
from megatron_lite.training import setup, step, train
from megatron_lite.training.metrics import IterationRecord
from megatron_lite.training.writers import Writers, console_line
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.moe import auxiliary_losses
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.moe.statistics import routers_of
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.unit.training.test_loop import MOCK, lines, run

EXPERTS = ["--num-experts", "4", "--moe-aux-loss-coeff", "1e-2", "--moe-z-loss-coeff", "1e-3", "--num-layers", "2"]
BIAS = ["--num-experts", "4", "--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"]


@pytest.fixture
def _one_process():
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.shutdown()


def small_model(compile_layers: bool = False, **settings) -> nn.Module:
    """Two layers, of which the second has experts, built as for training."""
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, num_moe_experts=4, moe_layer_freq=[0, 1],
        moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid", **settings,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig()
    (model,) = setup.build_model(
        config,
        GPTModelConfig(),
        ddp,
        vocab_size=64,
        max_sequence_length=16,
        device=torch.device("cpu"),
        seed=1,
        compile_layers=compile_layers,
    )
    return model


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_balance_losses_are_averaged_over_micro_batches_and_replicas(monkeypatch, loss_scale):
    """3 micro-batches on each of 6 / 2 = 3 data parallel ranks.

    Mutations: without the loss scale, without the micro-batches, or over dp x cp ranks the number differs.
    """
    sizes = {"dp_cp": 6, "cp": 2}
    monkeypatch.setattr(step, "group_size", lambda group: sizes[group])
    monkeypatch.setattr(step, "sum_over", lambda tensor, group: None)
    monkeypatch.setattr(step, "forward_step", lambda model, batch, _: batch["loss_mask"] * model.weight.sum())
    seen = []
    monkeypatch.setattr(auxiliary_losses, "begin_step", seen.append)
    optimizer = SimpleNamespace(
        zero_grad=lambda: None,
        get_loss_scale=lambda: torch.tensor(loss_scale),
        scale_loss=lambda loss: loss,
        device=torch.device("cpu"),
    )
    batches = [{"loss_mask": torch.ones(1, 4)} for _ in range(3)]
    step.forward_backward(nn.Linear(2, 2), optimizer, batches, dp_cp_group="dp_cp", cp_group="cp")  # type: ignore[arg-type]
    (scale,) = seen
    assert scale.shape == ()
    assert scale.item() == pytest.approx(loss_scale / 9)


@pytest.mark.usefixtures("_one_process")
def test_buffers_survive_being_built_without_storage(monkeypatch):
    """Mutation: leave out reset_buffers in build_model; counts and bias start with what was in memory."""
    fill = nn.Module.to_empty

    def to_garbage(module, **options):
        fill(module, **options)
        for buffer in module.buffers():
            buffer.fill_(7)
        return module

    monkeypatch.setattr(nn.Module, "to_empty", to_garbage)
    model = small_model()
    (router,) = routers_of(model)
    assert router.expert_bias is not None
    assert not any(buffer.any() for buffer in router.buffers())


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["TransformerLayer"]),
        (
            {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 8},
            ["attend", "TopKRouter", "rows"],
        ),
        ({"moe_input_jitter_eps": 0.1}, ["attend", "rows"]),
        ({"recompute_granularity": "full", "recompute_method": "uniform"}, ["attend", "rows"]),
        ({"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1}, ["TransformerLayer"]),
    ],
)
@pytest.mark.usefixtures("_one_process")
def test_what_is_compiled_of_a_layer_with_experts(monkeypatch, settings, parts):
    """The second layer has experts; no backward pass of compiled layers is split.

    Mutations: always whole; the router though it draws noise; pipelined.py that takes none for compiled.
    """
    compiled = []

    def compile_module(module, **options):
        compiled.append(type(module).__name__)
        assert options == {"fullgraph": True, "backend": "inductor"}

    def compile_function(function, **options):
        compiled.append(function.__name__)
        assert options == {"fullgraph": True, "backend": "inductor"}
        return function

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(GroupedMLP, "compile_rows", lambda *given: compiled.append("rows"))
    model = small_model(compile_layers=True, **settings)
    assert compiled == ["TransformerLayer", *parts]
    split = SimpleNamespace(config=SimpleNamespace(gradients_together=None, schedule="zbv"))
    assert PipelinedForwardBackward._splits_backward(split, small_model(**settings))  # type: ignore[arg-type]
    assert not PipelinedForwardBackward._splits_backward(split, model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--train-iters", "6", "--save-interval", "3"], id="saved before"),
        pytest.param(["--train-iters", "6", "--save-interval", "6", "--eval-interval", "6"], id="saved at the end"),
        pytest.param(
            ["--train-iters", "9", "--exit-interval", "6", "--eval-interval", "6", "--save-interval", "9"], id="stopped"
        ),
    ],
)
def test_statistics_of_each_log_interval(monkeypatch, tmp_path, capsys, words):
    """In the file with the last iteration of an interval, and on its line; the mean of the layers and each.

    Mutations: collect at every reading of metrics, as before a checkpoint; iteration 3 then has them too. Log the last,
    short interval after the evaluation and the checkpoint; iteration 6 then has none.
    """
    words = [*words, "--log-interval", "4", "--eval-iters", "1", "--save", str(tmp_path / "s")]
    run(monkeypatch, *MOCK, *EXPERTS, *words, "--metrics-jsonl", str(tmp_path / "m.jsonl"))
    entries = lines(tmp_path / "m.jsonl")
    assert [entry["iteration"] for entry in entries if "moe_balance" in entry] == [1, 2, 4, 6]
    for entry in entries:
        if "moe_balance" in entry:
            both = [entry[f"moe/load_balancing_loss_layer_{layer}"] for layer in (0, 1)]
            assert entry["load_balancing_loss"] == pytest.approx(sum(both) / 2)
            assert entry["load_balancing_loss"] == pytest.approx(1, abs=0.5)
            assert 1 <= entry["moe_balance"] <= 4
            assert entry["moe_dropped"] == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "learning rate: " in line]
    assert len(printed) == 4
    for line in printed:
        assert "| load_balancing_loss: " in line
        assert "| z_loss: " in line
        assert "| experts: fullest / mean " in line


def test_a_dense_run_says_nothing_of_experts(monkeypatch, capsys):
    run(monkeypatch, *MOCK, "--train-iters", "1", "--eval-iters", "0")
    assert "experts" not in capsys.readouterr().out


def test_the_bias_moves_once_a_step_and_evaluation_counts_nothing(monkeypatch):
    """Two micro-batches a step, an evaluation after the second; a rate of 0.5 shows each move.

    Mutations: a router that records in evaluation leaves counts behind; an update in each micro-batch moves twice.
    """
    seen, counts_before_evaluation = [], []
    original_step, original_evaluate = train.train_step, train.evaluate

    def watched_step(model, *arguments, **options):
        before = [router.expert_bias.clone() for router in routers_of(model)]
        output = original_step(model, *arguments, **options)
        if len(seen) < 2:  # what was counted since the last log line is what this step counted
            for router, bias in zip(routers_of(model), before, strict=True):
                fewer_than_mean = (router.tokens_per_expert.sum() - 4 * router.tokens_per_expert).sign()
                assert torch.equal(router.expert_bias, bias + 0.5 * fewer_than_mean)
        seen.append([(router.expert_bias.clone(), router.step_tokens_per_expert.sum()) for router in routers_of(model)])
        counts_before_evaluation.append(routers_of(model)[0].tokens_per_expert.sum().item())
        return output

    def watched_evaluate(model, *arguments, **options):
        before = [router.tokens_per_expert.clone() for router in routers_of(model)]
        loss = original_evaluate(model, *arguments, **options)
        for router, counts in zip(routers_of(model), before, strict=True):
            assert torch.equal(router.tokens_per_expert, counts)
            assert router.step_tokens_per_expert.sum() == 0
        return loss

    monkeypatch.setattr(train, "train_step", watched_step)
    monkeypatch.setattr(train, "evaluate", watched_evaluate)
    words = ["--train-iters", "4", "--eval-interval", "2", "--eval-iters", "2", "--global-batch-size", "4"]
    run(monkeypatch, *MOCK, *BIAS, *words, "--moe-router-bias-update-rate", "0.5", "--log-interval", "100")
    assert len(seen) == 4
    for number, routers in enumerate(seen, start=1):
        for bias, counted in routers:
            assert counted == 0
            assert bias.abs().max() <= 0.5 * number
            assert torch.equal(bias * 2, (bias * 2).round())
    assert seen[0][0][0].any()
    # After iterations 1 and 2 a line was logged, and the counts read: 4 sequences of 16 tokens, 2 experts each.
    assert counts_before_evaluation == [128, 128, 128, 256]


def test_a_skipped_step_moves_the_bias_too(monkeypatch):
    """As in Megatron-LM. Mutation: update only where the gradient was finite."""
    moved = []
    original = train.train_step

    def watched(model, *arguments, **options):
        before = routers_of(model)[0].expert_bias.clone()
        output = original(model, *arguments, **options)
        moved.append((output.found_inf.item(), not torch.equal(routers_of(model)[0].expert_bias, before)))
        return output

    monkeypatch.setattr(train, "train_step", watched)
    # A scale that no float16 gradient survives.
    scale = ["--fp16", "--initial-loss-scale", "1e30", "--train-iters", "1", "--eval-iters", "0"]
    run(monkeypatch, *MOCK, *BIAS, *scale)
    assert moved == [(1.0, True)]


def test_a_trained_model_with_experts_writes(monkeypatch, tmp_path):
    """Loaded on one process from a checkpoint alone, expert bias included; token by token as all at once.

    Mutations: the stored capacity factor drops other tokens of a whole prompt than of a single token; a bias left out.
    """
    words = ["--train-iters", "3", "--eval-iters", "0", "--save", str(tmp_path), "--save-interval", "3"]
    capacity = ["--moe-expert-capacity-factor", "0.5", "--moe-router-bias-update-rate", "0.5"]
    run(monkeypatch, *MOCK, *BIAS, *words, *capacity, "--moe-shared-expert-intermediate-size", "32")
    model = load_model(tmp_path).model
    (router,) = routers_of(model)
    assert router.expert_bias is not None
    assert router.expert_bias.any()
    tokens, positions = torch.arange(12).view(1, 12), torch.arange(12).view(1, 12)
    with torch.no_grad():
        whole = model(tokens, positions)
        cache = InferenceContext(1, 12)
        parts = [model(tokens[:, i : i + 1], positions[:, i : i + 1], inference_context=cache) for i in range(12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def with_experts(iteration: int) -> IterationRecord:
    """An iteration at the end of an interval."""
    values = {"lm_loss": 1.0, "learning_rate": 1e-3, "loss_scale": 1.0, "grad_norm": 0.5, "skipped": 0.0, "nan": 0.0}
    experts = {"load_balancing_loss": 1.25, "moe_balance": 1.5, "moe_dropped": 0.125, "moe_entropy": 1.0}
    return IterationRecord(iteration, 8, 8, 250.0, 256, values, experts | {"moe/load_balancing_loss_layer_1": 1.25})


def test_the_line_names_dropped_pairs_where_there_are_some():
    line = console_line([with_experts(3)], 10, None)
    assert "lm loss: 1.000000E+00 | load_balancing_loss: 1.250000E+00 | " in line
    assert "| experts: fullest / mean 1.50, entropy 1.00, 12.50% dropped |" in line


def test_tags_of_tensorboard(monkeypatch):
    """Megatron's tags, also where the interval of TensorBoard misses the iteration; no second axis for each layer."""
    written = []
    config = SimpleNamespace(
        metrics_jsonl=None, tensorboard_dir=None, wandb_project=None, tensorboard_log_interval=2,
        log_loss_scale_to_tensorboard=True, log_world_size_to_tensorboard=False,
    )  # fmt: skip
    writers = Writers(config, True, 1, {})  # type: ignore[arg-type]
    board = SimpleNamespace(add_scalar=lambda tag, value, at: written.append((tag, value, at)))
    monkeypatch.setattr(writers, "_tensorboard", board)
    writers.iterations([with_experts(3)], 1)
    assert [entry[:2] for entry in written] == [
        ("load_balancing_loss", 1.25),
        ("load_balancing_loss vs samples", 1.25),
        ("moe_balance", 1.5),
        ("moe_dropped", 0.125),
        ("moe_entropy", 1.0),
        ("moe/load_balancing_loss_layer_1", 1.25),
    ]
    json.dumps(with_experts(3).as_json())
