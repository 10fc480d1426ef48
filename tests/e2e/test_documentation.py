"""The documentation does what it says: commands run or parse, flags exist, links lead somewhere.

Each ```bash block of README.md, CONTRIBUTING.md, docs/ and scripts/examples/ carries a mark in the line above it:

    <!-- test: run -->      executed as written
    <!-- test: small -->    executed with tiny sizes added to each command
    <!-- test: dry-run -->  pretrain_gpt.py commands, validated and built on the meta device (or --help, --print-config)
    <!-- test: syntax -->   valid bash whose scripts and flags exist

Commands run in a scratch folder that looks like the repository, so that they leave nothing behind.
"""

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_lite import parallel_state
from megatron_lite.arguments import parse_args, read_settings
from megatron_lite.arguments.command_line import build_parser
from megatron_lite.commands import COMMANDS
from megatron_lite.context_parallel import zigzag_positions
from megatron_lite.dry_run import dry_run
from megatron_lite.model_parallel_config import CP_COMM_TYPES
from megatron_lite.rank_generator import ParallelLayout
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer
from tests.e2e.batch_script import submit
from tests.e2e.commands import REPOSITORY, environment, run
from tests.e2e.warm_launcher import launch
from tests.parallel.pool import WorkerPool
from tests.parallel.test_context_parallel import Case, expected_bytes

pytestmark = pytest.mark.e2e

PAGES = sorted(
    [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
    + list((REPOSITORY / "docs").glob("*.md"))
    + [REPOSITORY / "scripts" / "examples" / "README.md"]
)
MODES = ("run", "small", "dry-run", "syntax")
# Added to each command of a `small` block; the last of two equal flags wins. What a command must say is not added.
SMALL_MODEL = [
    *("--num-layers", "1", "--hidden-size", "32", "--ffn-hidden-size", "64", "--num-attention-heads", "4"),
    *("--max-position-embeddings", "32", "--vocab-size", "512"),
]
SMALL = {
    "pretrain_gpt.py": [
        *("--seq-length", "32"),
        *("--eval-iters", "1", "--num-workers", "0"),
    ],
    "tools/make_python_corpus.py": ["--root", str(Path(sysconfig.get_paths()["stdlib"]) / "email")],
    "tools/train_sentencepiece.py": ["--vocab-size", "400"],
    "tools/preprocess_data.py": ["--workers", "1"],
}
# Programs of others, whose flags are not ours to check.
FOREIGN = ("pip", "git", "python3.11", "source", "cd", "mkdir", "export", "tensorboard", "ruff", "mypy", "ls", "open")


class Block(NamedTuple):
    """A fenced block of commands: where it stands, how it is tested, and its text."""

    page: Path
    line: int
    mode: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command; comments and variables set for one command are left out."""
        joined = self.text.replace("\\\n", " ")
        found = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [_without_assignments(words) for words in found if words]


def _without_assignments(words: list[str]) -> list[str]:
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and line.strip() in ("```bash", "```sh", "```shell"):
            start = number
        elif start is not None and line.strip() == "```":
            mark = re.match(r"<!-- test: ([\w-]+) -->$", lines[start - 1].strip()) if start else None
            text = "\n".join(lines[start + 1 : number])
            yield Block(page, start + 1, mark.group(1) if mark else None, text)
            start = None


BLOCKS = [block for page in PAGES if page.exists() for block in blocks_of(page)]


def in_mode(*modes: str) -> pytest.MarkDecorator:
    """Each distinct text once, under the name of its first place."""
    first = {block.text: block for block in reversed(BLOCKS) if block.mode in modes}
    chosen = sorted(first.values(), key=lambda block: (str(block.page), block.line))
    return pytest.mark.parametrize("block", chosen, ids=[block.name for block in chosen])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to everything a documented command may name."""
    folder = tmp_path_factory.mktemp("documentation")
    for name in ("configs", "megatron_lite", "pretrain_gpt.py", "scripts", "tools", "tests", "pyproject.toml"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def test_every_block_is_marked() -> None:
    assert [block.name for block in BLOCKS if block.mode not in MODES] == []


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The program of this repository that a command runs, and the words after it."""
    for position, word in enumerate(words):
        if word.startswith(("tools/", "scripts/", "tests/slurm/")) or word == "pretrain_gpt.py":
            return word, words[position + 1 :]
        if word in ("megatron-lite", "megatron_lite"):
            command, *given = words[position + 1 :]
            return COMMANDS[command][0].removeprefix("megatron_lite.").replace(".", "/") + ".py", given
    return None


def ranks_of(words: list[str]) -> int:
    """How many ranks a command line starts."""
    text = " ".join(words)
    sizes = [re.search(rf"--{name}[ =](\d+)", text) for name in ("nproc-per-node", "nnodes")]
    ranks = 1
    for size in sizes:
        ranks *= int(size.group(1)) if size else 1
    return ranks


@pytest.fixture(scope="module")
def huggingface_folder(scratch: Path) -> None:
    """The folder `model` of docs/fine_tuning.md: a tiny Llama with its tokenizer."""
    from tests.unit.checkpoint.huggingface import tiny_models

    tiny_models.save("llama2", scratch / "model", vocab_size=300, max_position_embeddings=512)
    tiny_models.save_tokenizer(scratch / "model", begins_with="<s>")


@in_mode("run", "small")
def test_commands_run(block: Block, scratch: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Those of README.md as a user types them, the others in processes that start faster."""
    if block.page.name == "fine_tuning.md":
        request.getfixturevalue("huggingface_folder")
    commands = [_shortened(words) if block.mode == "small" else words for words in block.commands()]
    if block.page.name == "README.md" and block.page.parent == REPOSITORY:
        run(["bash", "-euo", "pipefail", "-c", "\n".join(map(shlex.join, commands))], folder=scratch, timeout=600)
        return
    for words in commands:
        found = program_of(words)
        if found is None:
            run(words, folder=scratch)
            continue
        assert words[0] in ("python", "torchrun"), words
        output = tmp_path / "output.txt"
        output.write_text("")
        status = launch(ranks_of(words), found[1], output, environment(), 300.0, program=found[0], folder=scratch)
        assert status == 0, f"{shlex.join(words)}\n{output.read_text()[-6000:]}"


def _shortened(words: list[str]) -> list[str]:
    found = program_of(words)
    if found is None:
        return words
    program, given = found
    if program != "pretrain_gpt.py":
        return words + SMALL.get(program, [])
    iterations = "4" if "--train-iters" in given else "2"
    # What a folder of weights describes is small already.
    model = SMALL_MODEL if "--config" in given or "--load-hf" not in given else []
    # A command that lacks the batch's size must fail here as it does for a reader.
    batch = ["--micro-batch-size", "2", "--global-batch-size", "4"]
    batch = batch if "--config" in given or "--micro-batch-size" in given else []
    return [*words, *model, *batch, *SMALL[program], "--train-iters", iterations]


@in_mode("dry-run")
def test_commands_are_sound(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validated with the number of ranks the command starts, and built without storage."""
    monkeypatch.chdir(REPOSITORY)
    for words in block.commands():
        found = program_of(words)
        assert found is not None, words
        program, given = found
        assert program == "pretrain_gpt.py"
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            if "--help" in given or "--print-config" in given:
                with pytest.raises(SystemExit) as ended:
                    parse_args(given)
                assert not ended.value.code
                assert ("hidden_size" if "--print-config" in given else "  --") in shown.getvalue()
            else:
                dry = [] if "--dry-run" in given else ["--dry-run", "--world-size", str(ranks_of(words))]
                dry_run(parse_args(given + dry))
                assert "Memory of " in shown.getvalue()


@in_mode("syntax")
def test_commands_parse(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for words in block.commands():
        found = program_of(words)
        if found is None:
            assert words[0] in FOREIGN, f"{words[0]} is neither a program of this repository nor a known one"
            continue
        program, given = found
        assert (REPOSITORY / program).is_file(), program
        if program.endswith(".sbatch"):
            _check_batch_script(tmp_path, given)
        elif program == "pretrain_gpt.py":
            assert read_settings(given).problems == []
        elif program.endswith(".py"):
            unknown = [word for word in _flags(given) if word not in _flags_of_tool(REPOSITORY / program)]
            assert unknown == [], f"{program}: {unknown}"


def _check_batch_script(folder: Path, given: list[str]) -> None:
    """The pretraining command that the batch script starts, with the arguments it passes on, breaks no rule."""
    job = submit(folder, *given, SLURM_GPUS_PER_NODE="8")
    assert job.status == 0, job.output
    parse_args([*job.pretraining, "--dry-run", "--world-size", str(4 * 8)])


def _flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def _flags_of_tool(path: Path) -> set[str]:
    """The flags a command line tool knows: those of its `build_parser`, and those its source spells out."""
    flags = set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if hasattr(module, "build_parser"):
        flags |= set(re.findall(r"--[\w-]+", module.build_parser().format_help()))
    return flags


def test_flags_in_the_text_exist() -> None:
    """Every flag named in backquotes is one of ours, of a tool or of torchrun."""
    known = {spelling for action in build_parser()._actions for spelling in action.option_strings}
    for tool in [*(REPOSITORY / "tools").glob("*.py"), *(REPOSITORY / "scripts" / "examples").glob("*.py")]:
        known |= _flags_of_tool(tool)
    known |= {"--nproc-per-node", "--nnodes", "--max-restarts", "--signals-to-handle", "--shutdown-timeout"}
    known |= {"--rdzv-endpoint", "--capture-range"}  # of torchrun and nsys
    known |= {"--time", "--nodes", "--signal", "--requeue", "--batch"}  # of SLURM
    known |= {"--full-matrix", "--layout-table", "--full"}  # of our tests, in tests/conftest.py
    wrong = {}
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        named = {flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"(?<!\S)--[\w-]+", code)}
        if named - known:
            wrong[page.name] = sorted(named - known)
    assert wrong == {}


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    text = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))


def _anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)}


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"https?://", target):
                continue
            path, _, anchor = target.partition("#")
            aim = page if not path else (page.parent / path).resolve()
            if not aim.exists() or (anchor and anchor not in _anchors(aim)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_readme_table_of_presets_is_complete() -> None:
    listed = re.findall(r"\(configs/(\w+)\.yaml\)", (REPOSITORY / "README.md").read_text())
    assert sorted(set(listed)) == sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))


def collectives_of_a_layer(rank: int, world_size: int, sequence_parallel: bool) -> tuple[list[str], list[str]]:
    listener = runpy.run_path(str(REPOSITORY / "scripts" / "examples" / "sequence_parallel.py"))["Listener"]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=world_size,
        sequence_parallel=sequence_parallel,
    )
    layer = TransformerLayer(config)
    x = torch.randn(4 // world_size if sequence_parallel else 4, 1, 8, requires_grad=True)
    with listener() as forward:
        output = layer(x)
    with listener() as backward:
        output.sum().backward()
    return sorted(forward.heard), sorted(backward.heard)


def test_table_of_communication(pool: WorkerPool) -> None:
    """The collectives that docs/tensor_parallel.md counts for a layer are those that run."""
    tensor, sequence = (pool.run(collectives_of_a_layer, split, world_size=2)[0] for split in (False, True))
    assert tensor == (["all-reduce"] * 2, ["all-reduce"] * 2)
    assert sequence == (["all-gather"] * 2 + ["reduce-scatter"] * 2, ["all-gather"] * 4 + ["reduce-scatter"] * 2)
    page = (REPOSITORY / "docs" / "tensor_parallel.md").read_text(encoding="utf-8")
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| (TP|TP \+ SP) \| (\d[^:]*): [^|]*\| (\d[^:]*):", page, re.MULTILINE)
    }
    assert rows["TP"] == ("2 all-reduces", "2 all-reduces")
    assert rows["TP + SP"] == ("2 all-gathers, 2 reduce-scatters", "4 all-gathers, 2 reduce-scatters")


def test_numbers_of_context_parallelism() -> None:
    """What docs/context_parallel.md works out, by the formula whose bytes tests/parallel counts.

    The attention of one tensor parallel rank of configs/llama3_8b_128k.yaml, in bf16.
    """
    flags = ["--config", str(REPOSITORY / "configs" / "llama3_8b_128k.yaml"), "--mock-data", "--dry-run"]
    run = parse_args([*flags, "--world-size", "32"])
    c = run.transformer
    tp, tokens = c.tensor_model_parallel_size, run.padded_sequence_length
    assert c.num_query_groups is not None
    assert c.kv_channels is not None
    heads = {"heads": c.num_attention_heads // tp, "groups": c.num_query_groups // tp}
    page = (REPOSITORY / "docs" / "context_parallel.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*) \| (\d+) MiB \| (\d+) MiB \|$", page, re.MULTILINE)
    found = {kind: (int(row[1]), int(row[2])) for row in rows for kind in re.findall(r"`([\w+]+)`", row[0])}
    expected = {}
    for kind in CP_COMM_TYPES:
        case = Case(c.context_parallel_size, kind, hierarchy=(2, 4) if kind == "a2a+p2p" else None, **heads)
        sent = expected_bytes(case, tokens, batch=1, head_size=c.kv_channels, width=2, wide=4)
        expected[kind] = (sent[0] // 2**20, sent[1] // 2**20)
    assert found == expected


def test_ranks_of_a_mixture_of_experts() -> None:
    """The table of docs/mixture_of_experts.md: TP 2, CP 2, DP 2 and EP 4 on eight ranks, with ETP 1 and with ETP 2."""
    page = (REPOSITORY / "docs" / "mixture_of_experts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.*) \|$", page, re.MULTILINE)
    whole, halves = (ParallelLayout.from_sizes(8, tp=2, cp=2, ep=4, etp=etp) for etp in (1, 2))

    def place(layout: ParallelLayout, kind: str, rank: int) -> int:
        (group,) = [ranks for ranks in layout.groups()[kind] if rank in ranks]
        return group.index(rank)

    expected = []
    for rank in range(8):
        tp, cp, dp = (place(whole, kind, rank) for kind in ("tp", "cp", "dp"))
        (chunk,) = zigzag_positions((0, 4), 2, cp).chunk(2)[tp].tolist()
        ep, edp = place(whole, "ep", rank), place(whole, "expt_dp", rank)
        half, of = place(halves, "expt_tp", rank), place(halves, "ep", rank)
        cells = [tp, cp, dp, f"batch {dp}, chunk {chunk}", ep, edp, f"{2 * ep}, {2 * ep + 1}"]
        cells += [half, of, f"{('left', 'right')[half]} half of {2 * of}, {2 * of + 1}"]
        expected.append((str(rank), " | ".join(map(str, cells))))
    assert rows == expected


def test_numbers_of_token_dispatchers() -> None:
    """What docs/mixture_of_experts.md works out for the presets, by its formulas, which tests/parallel counts."""
    page = (REPOSITORY / "docs" / "mixture_of_experts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for name, tokens, ranks, volumes in rows:
        flags = ["--config", str(REPOSITORY / "configs" / f"{name}.yaml"), "--mock-data", "--dry-run"]
        run = parse_args([*flags, "--tokenizer-type", "NullTokenizer", "--world-size", "64"])
        c = run.transformer
        h, k, ep, etp = c.hidden_size, c.moe_router_topk, c.expert_model_parallel_size, c.expert_tensor_parallel_size
        assert c.num_moe_experts is not None
        assert etp is not None
        t, s = run.padded_sequence_length // c.tensor_model_parallel_size, ep * etp
        a = t * k * etp * (s - 1) // s
        sent = [(s - 1) * t * (2 * h * 2 + 4 * k + 4 * k), (s - 1) * t * (2 * h * 2 + 4 * k)]
        sent += [a * (h * 2 + 4) + a * h * 2 + 8 * (s - 1) * c.num_moe_experts // ep, a * h * 2 + a * (h * 2 + 4)]
        found = (int(tokens.replace(",", "")), int(ranks), volumes)
        assert found == (t, s, " | ".join(f"{volume / 2**20:.1f}" for volume in sent)), name


def test_nothing_names_a_path_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", page.read_text(encoding="utf-8")), page
