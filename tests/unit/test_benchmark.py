"""tools/benchmark.py: both sides train the same thing, the operations are counted right, and the report is whole.

Nothing here looks at a clock: how fast something is, benchmarks/results/ says.
"""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory
from benchmarks.breakdown import REST, kind_of
from benchmarks.contenders import CONTENDERS, peer_model, plain_model
from benchmarks.measure import Window, configuration, synthetic_batches
from benchmarks.report import Case
from megatron_lite import parallel_state

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "96"),
    *("--seq-length", "16", "--micro-batch-size", "2", "--vocab-size", "256"),
)


def tool():
    """tools/benchmark.py as a module."""
    specification = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


LLAMA = (
    *("--normalization", "RMSNorm", "--position-embedding-type", "rope", "--swiglu", "--disable-bias-linear"),
    "--untie-embeddings-and-output-weights",
)
EXPERTS = (*LLAMA, "--num-experts", "4", "--moe-router-load-balancing-type", "none", "--moe-grouped-gemm")
PEERS = ["plain", "huggingface"] if importlib.util.find_spec("transformers") else ["plain"]


@pytest.fixture
def world():
    """A world of one process."""
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.shutdown()


def losses(contender: str, *flags: str, steps: int = 4) -> list[float]:
    """Losses of the first steps, measured on batches that come by twice."""
    config = configuration((*SMALL, *flags))
    step, batches = CONTENDERS[contender](config, CPU), synthetic_batches(config, CPU)
    return [step(batches[number % 2]).item() for number in range(steps)]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--untie-embeddings-and-output-weights",),
        ("--global-batch-size", "6"),
        ("--lr", "0.05", "--init-method-std", "0.3", "--clip-grad", "0.1"),
        ("--vocab-size", "200"),
        (*LLAMA, "--group-query-attention", "--num-query-groups", "2"),
        EXPERTS,
    ],
    ids=["tied", "untied", "accumulation", "clipped", "padded-vocabulary", "llama", "experts"],
)
def test_both_sides_train_the_same_model(world, flags, peer):
    """The first loss compares the models and their weights, later ones gradients, clipping and AdamW."""
    ours, theirs = losses("megatron_lite", *flags), losses(peer, *flags)
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert ours[2] < ours[0]


@pytest.mark.parametrize("peer", PEERS)
def test_both_sides_train_the_same_model_in_bf16(world, peer):
    """bfloat16 has 8 bits of mantissa; the losses of another seed are further away than this."""
    ours, theirs = losses("megatron_lite", "--bf16"), losses(peer, "--bf16")
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert losses(peer, "--bf16", "--seed", "7") != pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("flags", [(), LLAMA], ids=["gpt", "llama"])
def test_operations_are_those_that_torch_counts(flags):
    """The formula against torch's counter on the plain model; attention is counted as the half that is not masked."""
    config = configuration((*SMALL, *flags))
    model = plain_model(peer_model(config))
    length = config.sequence_length
    tokens = torch.randint(0, 256, (2, length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    counted = counter.get_flop_counts()["Global"]
    attention = counted.pop(torch.ops.aten.bmm)
    assert Case(config, []).flops_per_step == sum(counted.values()) + attention / 2


def test_rate_is_of_processor_time_on_a_cpu_and_of_the_clock_on_a_gpu():
    """32 tokens a step, 10 steps."""
    case = Case(configuration(SMALL), [])
    window = Window(steps=10, wall_seconds=4.0, cpu_seconds=2.0, matmul_flops=1e9, peak_memory=1, loss=1.0)
    assert case.rate(window, "cpu") == 160.0
    assert case.rate(window, "cuda") == 80.0


def test_report(tmp_path, capsys):
    """One round of one step a side, in processes of their own: every field is there and the sides agree.

    Tensor parallel ranks too; --nproc-per-node among the flags says how many there are.
    """
    output = tmp_path / "results" / "small"
    words = ["--config", str(ROOT / "benchmarks/configs/gpt_cpu.yaml"), *SMALL, "--dtype", "bf16"]
    two = "--nproc-per-node 2 --tensor-model-parallel-size 2"
    settings = ["--steps", "1", "--rounds", "1", "--warmup", "0", "--breakdown", "--output", str(output)]
    assert tool().main([*words, "--against", "plain", two, *settings]) == 0
    result = json.loads(output.with_name("small.json").read_text())
    assert {"date", "commit", "cpu", "cores", "threads", "torch", "omp_wait_policy"} <= result["environment"].keys()
    assert result["settings"] == {"steps": 1, "rounds": 1, "warmup": 0, "threads": 1}
    (case,) = result["cases"]
    assert (case["dtype"], case["compiled"], case["tokens_per_step"]) == ("bfloat16", False, 32)
    ours, plain, split = case["sides"]
    assert [side["ranks"] for side in case["sides"]] == [1, 1, 2]
    for side in (ours, plain, split):
        assert side["rates"] == [side["tokens_per_cpu_second"]]
        assert 0 < side["mfu"] < 1
        assert side["peak_memory_bytes"] > 50 * 2**20
        assert len(side["windows"]) == 1
    assert ours["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-3)
    assert ours["last_loss"] == pytest.approx(split["last_loss"], rel=1e-3)
    assert ours["mfu"] / plain["mfu"] == pytest.approx(ours["rates"][0] / plain["rates"][0])
    assert case["ratios"]["plain torch"] == [ours["rates"][0] / plain["rates"][0]]
    page = output.with_name("small.md").read_text()
    assert page == capsys.readouterr().out
    assert f"with {two}" in page
    assert page.count("| bfloat16 | eager |") == 6  # in the table of speed, and in that of the breakdown
    assert all(side["breakdown_ms"]["matrix products"] > 0 for side in (ours, plain))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_can_be_compared(path):
    """Peers know it; it is small enough for one GPU to hold three sides of it, 16 bytes a parameter each."""
    config = configuration(["--config", str(path)])
    with torch.device("meta"):
        plain = plain_model(peer_model(config))
    assert 3 * 16 * sum(parameter.numel() for parameter in plain.parameters()) < 70e9


def test_the_command_for_a_gpu_names_models_that_are_there():
    """Its command lines up to where measuring would begin."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "gpu.sh")], check=True)
    named = re.findall(r"benchmarks/configs/\w+\.yaml", script)
    assert len(named) == 4
    for path in named:
        against = ["--fp8-format hybrid --fp8-recipe tensorwise", "--fp8-format hybrid --fp8-recipe rowwise"]
        kernels = ["--attention-backend flash", "--attention-backend fused"]
        sides = tool().sides_of(["--config", str(ROOT / path), "--compile"], ["plain", *against, *kernels])
        assert len(sides) == 6


def test_kinds_of_operations():
    """Names as the profiler gives them, on a CPU and on a GPU."""
    names = {
        "aten::mm": "matrix products",
        "aten::addmm_": "matrix products",
        "aten::_scaled_grouped_mm": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "flash_fwd_kernel": "attention",
        "aten::_fused_adamw_": "optimizer",
        "_c10d_functional::wait_tensor": "communication",
        "aten::copy_": "copies and casts",
        "triton_poi_fused__to_copy_mul_silu_1": "compiled kernels",
        "aten::linalg_vector_norm": REST,
        "aten::_softmax": "softmax of the loss",
        "aten::silu": REST,
    }
    assert {name: kind_of(name) for name in names} == names


def test_sides():
    """A second configuration is this framework with further flags."""
    ours, plain, other = tool().sides_of(list(SMALL), ["plain", "--normalization RMSNorm"])
    assert [side.contender for side in (ours, plain, other)] == ["megatron_lite", "plain", "megatron_lite"]
    assert other.arguments == (*SMALL, "--normalization", "RMSNorm")
    assert len(tool().sides_of(list(SMALL), ["nothing"])) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "rounds is 0"),
        (["--bf16", "--dtype", "fp32"], "keep one of them"),
        (["--qk-layernorm", "--swiglu", "--normalization", "RMSNorm"], "no model type of transformers"),
        (["--attention-dropout", "0.1"], "no dropout"),
        (["--nproc-per-node", "2"], "runs on one rank"),
        (
            ["--against", "nothing", "--nproc-per-node", "2", "--context-parallel-size", "2"],
            "benchmarks.context_parallel",
        ),
        (["--against", "--seq-length 8"], "keep the batch"),
        (["--hiden-size", "8"], "--hidden-size"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(words, message, capsys):
    """Exit status 2 and a sentence."""
    assert tool().main([*SMALL, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("model", ["dense", "8 experts, 2 active"])
def test_memory_against_the_estimate(tmp_path, capsys, monkeypatch, model):
    """A row for each model, dtype and way; at a size where activations are most of it, the peak is near the estimate.

    Mutation: leave the activations, or the optimizer's state, out of the estimate.
    """
    monkeypatch.setattr(memory, "MODELS", {model: memory.MODELS[model]})
    small = (
        "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --seq-length 256 --vocab-size 256 --micro-batch-size 4"
    )
    assert memory.main([*small.split(), "--output", str(tmp_path / "memory")]) == 0
    rows = json.loads((tmp_path / "memory.json").read_text())
    assert len(rows) == 2 * 3
    plain = rows[0]
    assert (plain["model"], plain["dtype"], plain["way"]) == (model, "float32", "kept")
    assert 0.9 < plain["peak_bytes"] / sum(plain["estimate"].values()) < 1.6
    assert (tmp_path / "memory.md").read_text().strip() in capsys.readouterr().out
