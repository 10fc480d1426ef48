"""Command lines of Megatron-LM's own GPT examples and functional tests: accepted, or refused for what is named."""

import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_lite.arguments import command_line, parse_args
from megatron_lite.errors import ConfigError

FILE = Path(__file__).parent / "megatron_lists.txt"
DOCS = Path(__file__).parents[2] / "docs" / "command_line.md"


@dataclass
class Entry:
    """A command line, `number` scripts have it; accepted if `refused` is empty."""

    kind: str
    name: str
    ranks: int
    number: int
    flags: list[list[str]]
    refused: list[str]


def entries() -> list[Entry]:
    """What the file holds; its first lines say how it is to be read."""
    found: dict[str, Entry] = {}
    text = "\n".join(line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    for block in re.split(r"\n(?=example |functional )", text.strip()):
        head, _, rest = block.partition("\n")
        kind, ranks, name, *more = head.split()
        lines = rest.splitlines()
        words = shlex.split(" ".join(line for line in lines if not line.startswith("! ")))
        base: dict[str, list[str]] = {}
        if words[0] == "=":
            base = {flag[0]: flag for flag in found[words[1]].flags}
            words = words[2:]
        while words[:1] == ["without"]:
            del base[words[1]]
            words = words[2:]
        flags: list[list[str]] = []
        for word in words:
            if re.match(r"--[A-Za-z]", word):
                flags.append([])
            flags[-1].append(word)
        if base:
            flags = list((base | {flag[0]: flag for flag in flags}).values())
        refused = [line.removeprefix("! ") for line in lines if line.startswith("! ")]
        number = 1 + (int(more[0]) if more else 0)
        found[name] = Entry(kind, name, int(ranks), number, flags, refused)
    return list(found.values())


LISTS = entries()


@pytest.fixture
def _one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same for all, and takes the most time."""
    monkeypatch.setattr(command_line, "build_parser", _parser)


_parser = functools.cache(command_line.build_parser)


def problems_of(words: list[str]) -> list[str]:
    """What is wrong with a command line, a sentence each."""
    try:
        parse_args(words)
    except ConfigError as error:
        lines = str(error).splitlines()
        return [re.sub(r"^\s*\d+\. ", "", line) for line in lines if "settings do not fit together" not in line]
    return []


@pytest.mark.usefixtures("_one_parser")
@pytest.mark.parametrize("entry", LISTS, ids=lambda entry: entry.name)
def test_the_answer_to_a_list_of_megatron(entry: Entry) -> None:
    """A dry run, which asks for no tokenizer file and no package. Mutation: move a flag to the other table."""
    words = [word for flag in entry.flags for word in flag]
    found = problems_of([*words, "--dry-run", "--world-size", str(entry.ranks)])
    assert len(found) == len(entry.refused), found
    for problem, named in zip(sorted(found), sorted(entry.refused), strict=True):
        assert problem.startswith(named)
        assert "is not a flag" not in problem


def test_the_figures_of_the_documentation() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for kind in ("example", "functional"):
        of_kind = [entry for entry in LISTS if entry.kind == kind]
        accepted = sum(entry.number for entry in of_kind if not entry.refused)
        assert f"{accepted} of {sum(entry.number for entry in of_kind)}" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--moe-router-score-function sigmoid --moe-router-pre-softmax", "--moe-router-pre-softmax: without effect"),
        (
            "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
            "backend hybridep: tokens travel by",
        ),
        ("--moe-use-legacy-grouped-gemm", "--moe-use-legacy-grouped-gemm: accepted without effect (withdrawn from Meg"),
        ("--DDP-impl local", "--DDP-impl local: accepted without effect (withdrawn from Megatron-LM: data parallelism"),
        ("--no-async-tensor-model-parallel-allreduce", "(withdrawn from Megatron-LM: communication overlaps"),
        ("--data-parallel-random-init", "(every data parallel replica starts from the same weights"),
        (
            "--transformer-impl transformer_engine --tensor-model-parallel-size 2 --sequence-parallel "
            "--tp-comm-overlap",
            "--tp-comm-overlap: switched off, because the layers of Transformer Engine communicate by themselves",
        ),
        ("--fp8-format hybrid --fp8-param-gather", "parameters are gathered in the dtype of the run"),
        (
            "--activations-checkpoint-method uniform",
            "withdrawn from Megatron-LM; read as --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1.",
        ),
        (
            "--activations-checkpoint-method block --activations-checkpoint-num-layers 2",
            "--activations-checkpoint-num-layers: withdrawn from Megatron-LM; read as --recompute-num-layers 2.",
        ),
        ("--fp8-hybrid", "--fp8-hybrid: withdrawn from Megatron-LM; read as --fp8-format hybrid."),
        ("--eval-micro-batch-size 1", "an evaluation has the micro-batch size of training"),
    ],
)
@pytest.mark.usefixtures("_one_parser")
def test_what_users_pass_is_accepted_with_a_word(words: str, said: str) -> None:
    line = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2
        --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --bf16 --num-experts 4
        --dry-run --world-size 2"""
    assert said in "\n".join(parse_args([*line.split(), *words.split()]).notices)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--moe-extended-tp", "withdrawn from Megatron-LM: write --expert-tensor-parallel-size"),
        ("--ckpt-format torch", "other formats cannot be read, nor written; leave it out"),
        ("--ckpt-format fsdp_dtensor", "other formats cannot be read, nor written; leave it out"),
        ("--eval-global-batch-size 7 --global-batch-size 8", "--eval-global-batch-size 7 is given, but not supported"),
        ("--deepspeed", "--deepspeed is not a flag; --help lists what there is"),
        ("--zero-stage 1", "--zero-stage is not a flag; --help lists what there is"),
        ("--sequence-lenght 8", "--sequence-lenght is not a flag; the closest is --seq-length"),
        ("--hiden-size 8", "--hiden-size is not a flag; the closest is --hidden-size"),
        (
            "--tensor-parallel-size 2",
            "--tensor-parallel-size is not a flag; the closest is --tensor-model-parallel-size",
        ),
    ],
)
@pytest.mark.usefixtures("_one_parser")
def test_what_users_pass_is_refused_with_the_way_out(words: str, said: str) -> None:
    """Mutation: compare names with their dashes, by the cutoff that difflib has."""
    assert said in "\n".join(problems_of(words.split()))


@pytest.mark.usefixtures("_one_parser")
def test_an_evaluation_of_the_training_batch_size_asks_for_nothing_special() -> None:
    settings = command_line.read_settings(["--eval-global-batch-size", "8", "--global-batch-size", "8"])
    assert not settings.problems
