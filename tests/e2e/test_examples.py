"""Every file of scripts/examples runs, on one process and on several, and says what it should."""

import contextlib
import io
import re
import runpy
import sys

import pytest

from tests.e2e.commands import REPOSITORY, run
from tests.parallel.pool import WorkerPool

EXAMPLES = REPOSITORY / "scripts" / "examples"

pytestmark = pytest.mark.e2e


def run_example(rank: int, world_size: int, name: str, arguments: list[str]) -> str:
    """What the example prints on this rank; torch.distributed is there already, as under torchrun."""
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(arguments)
    return printed.getvalue()


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]


def test_readme_lists_every_example() -> None:
    listed = re.findall(r"^\| `(\w+\.py)`", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_simple_mlp(pool: WorkerPool, world_size: int) -> None:
    first = pool.run(run_example, "simple_mlp.py", ["--hidden-size", "8"], world_size=world_size)[0]
    assert f"tensor parallel rank {world_size - 1} of {world_size}" in first
    assert "equal to the MLP in one piece: output and 4 gradients" in first


@pytest.mark.parametrize("arguments", [[], ["--sequence-parallel"]], ids=["tensor", "sequence"])
def test_attention_block(pool: WorkerPool, arguments: list[str]) -> None:
    first = pool.run(run_example, "attention_block.py", arguments, world_size=2)[0]
    assert "4 of 8 heads" in first
    assert "equal to the attention in one piece" in first


def test_sequence_parallel(pool: WorkerPool) -> None:
    """Each line names the mapping, its shapes, and the collectives heard forward and backward."""
    first = pool.run(run_example, "sequence_parallel.py", ["--sequence", "8"], world_size=2)[0]
    heard = dict(re.findall(r"^  (\w+) +(\[.*)$", first, flags=re.MULTILINE))
    expected = {
        "copy_to_tensor_model_parallel_region": "[8, 2, 4] -> [8, 2, 4] nothing all-reduce",
        "reduce_from_tensor_model_parallel_region": "[8, 2, 4] -> [8, 2, 4] all-reduce nothing",
        "gather_from_sequence_parallel_region": "[4, 2, 4] -> [8, 2, 4] all-gather reduce-scatter",
        "reduce_scatter_to_sequence_parallel_region": "[8, 2, 4] -> [4, 2, 4] reduce-scatter all-gather",
        "scatter_to_sequence_parallel_region": "[8, 2, 4] -> [4, 2, 4] nothing all-gather",
        "scatter_to_tensor_model_parallel_region": "[8, 2, 4] -> [8, 2, 2] nothing all-gather",
    }
    assert {name: " ".join(line.split()) for name, line in heard.items()} == expected


@pytest.mark.parametrize(
    ("world_size", "arguments", "seen"),
    [
        (1, [], ["padding 0: 101 tokens", "tokens 0 to 100 of each sequence"]),
        (2, [], ["padding 3: 104 tokens", "context 1 of 2, tokens 26 to 51 and 52 to 77 of each sequence"]),
        (4, [], ["rank 3: tensor 1 of 2, heads 4 to 7; context 1 of 2", "query [104, 1, 4, 8] -> output [104, 1, 32]"]),
        (4, ["--cp-comm-type", "a2a"], ["a2a: equal"]),
        (4, ["--cp-comm-type", "all_gather", "--tp", "1"], ["context 0 of 4, tokens 0 to 12 and 91 to 103"]),
        (
            4,
            ["--cp-comm-type", "a2a+p2p", "--tp", "1", "--hierarchical-context-parallel-sizes", "2", "2"],
            ["a2a+p2p: equal"],
        ),
    ],
    ids=["one process", "ring", "ring and tensor", "all-to-all and tensor", "gather", "all-to-all and ring"],
)
def test_context_parallel(pool: WorkerPool, world_size: int, arguments: list[str], seen: list[str]) -> None:
    """The example compares output and gradients with the attention in one piece, on every rank.

    Mutations: the part of rank + 1 taken; heads not split by tensor rank; padding left out of the packed parameters.
    """
    first = pool.run(run_example, "context_parallel.py", ["--seq-length", "101", *arguments], world_size=world_size)[0]
    assert "equal to the attention in one piece, output and 3 gradients" in first
    for text in seen:
        assert text in first


@pytest.mark.parametrize(
    ("world_size", "arguments", "seen"),
    [
        (1, [], ["expert 0 of 1: experts 0 to 7; x [2, 16, 32] -> output [2, 16, 32], balance loss 1."]),
        (2, [], ["rank 1: tensor 1 of 2, data 0 of 1, expert 1 of 2: experts 4 to 7;"]),
        (4, [], ["rank 2: tensor 0 of 2, data 1 of 2, expert 1 of 2: experts 4 to 7, part 0 of 2 of each;"]),
        (4, ["--tp", "1", "--ep", "2", "--etp", "1"], ["rank 3: tensor 0 of 1, data 3 of 4, expert 1 of 2: experts 4"]),
        (4, ["--ep", "4", "--etp", "1", "--dispatcher", "allgather"], ["rank 1: tensor 1 of 2", "experts 2 to 3;"]),
    ],
    ids=["one process", "TP 2, EP 2", "TP 2, EP 2, ETP 2", "DP 4, EP 2, two copies", "TP 2, EP 4, allgather"],
)
def test_moe_block(pool: WorkerPool, world_size: int, arguments: list[str], seen: list[str]) -> None:
    """The example compares output, balance loss and gradients with the experts in one piece, on every rank.

    Mutations of the example: gradients of experts summed over all ranks, or of the router over copies of experts only;
    the output's gradient summed over tensor parallel ranks; the balance loss of each replica at full weight; the first
    part of the sequence routed by all tensor parallel ranks.
    """
    first = pool.run(run_example, "moe_block.py", arguments, world_size=world_size)[0]
    assert "equal to the experts in one piece: output, balance loss and 4 gradients" in first
    for text in seen:
        assert text in first


def test_train_tiny_gpt_is_the_same_at_every_layout(pool: WorkerPool) -> None:
    """One process, two tensor parallel ranks, two data parallel ranks: the same losses, and they fall."""
    small = ["--steps", "10", "--hidden-size", "32", "--sequence", "32"]
    layouts = {"one process": (1, []), "tensor parallel": (2, []), "data parallel": (2, ["--tensor-parallel", "1"])}
    found = {
        name: losses(pool.run(run_example, "train_tiny_gpt.py", small + extra, world_size=size)[0])
        for name, (size, extra) in layouts.items()
    }
    assert len(found["one process"]) == 2
    assert found["one process"][1] < found["one process"][0] - 0.5
    for name, values in found.items():
        assert values == pytest.approx(found["one process"], rel=1e-4), name


def test_pipeline_is_the_same_in_stages(pool: WorkerPool) -> None:
    """One process, and a V on two ranks: the same losses, and they fall."""
    layouts = {"one process": (1, []), "zbv": (2, ["--schedule", "zbv"])}
    found = {
        name: losses(pool.run(run_example, "pipeline.py", ["--steps", "10", *extra], world_size=size)[0])
        for name, (size, extra) in layouts.items()
    }
    assert found["one process"][1] < found["one process"][0] - 0.5
    for name, values in found.items():
        assert values == pytest.approx(found["one process"], rel=1e-4), name


def test_parallel_groups_of_a_running_world(pool: WorkerPool) -> None:
    outputs = pool.run(run_example, "parallel_groups.py", ["--tp", "2", "--cp", "2"], world_size=4)
    assert "dense layers: 4 = tp 2 x cp 2 x pp 1 x dp 1" in outputs[0]
    assert "context        place 1 of 2    with ranks 1, 3" in outputs[3]


def test_parallel_groups_of_an_imagined_world() -> None:
    """A command line without torchrun: rank 77 of 128, its groups worked out by hand."""
    flags = ["--tp", "8", "--cp", "4", "--ep", "2", "--pp", "2", "--world-size", "128", "--rank", "77"]
    output = run([sys.executable, str(EXAMPLES / "parallel_groups.py"), *flags])
    rows = dict(re.findall(r"^  (\w+(?: \w+)?) +place \d+ of \d+ +with ranks (.*)$", output, flags=re.MULTILINE))
    # Fastest to slowest: tp 8, cp 4, dp 2, pp 2, so 77 = tp 5 + 8 * cp 1 + 32 * dp 0 + 64 * pp 1.
    assert rows["tensor"] == "72, 73, 74, 75, 76, 77, 78, 79"
    assert rows["context"] == "69, 77, 85, 93"
    assert rows["data"] == "77, 109"
    assert rows["pipeline"] == "13, 77"
    assert rows["expert"] == "69, 77"
    assert rows["expert data"] == "77, 93, 109, 125"


@pytest.mark.full
def test_torchrun() -> None:
    """As the README of the examples says, with a real launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    output = run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(EXAMPLES / "simple_mlp.py")]
    )
    assert "tensor parallel rank 1 of 2" in output
    assert "equal to the MLP in one piece" in output
