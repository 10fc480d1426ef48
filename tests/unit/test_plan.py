"""tools/plan.py and tools/draw_pipeline_schedules.py: the plan is that of the run, the picture is whole."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_lite.arguments import parse_args
from megatron_lite.pipeline_layout import even_layout
from megatron_lite.pipeline_parallel.orders import pipeline_order
from megatron_lite.pipeline_parallel.timeline import Durations, pipeline_timeline
from tools import draw_pipeline_schedules as drawing
from tools import plan

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
SMALL = (
    *("--num-layers", "8", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"),
    *("--micro-batch-size", "1", "--global-batch-size", "16", "--world-size", "8", "--lr", "1", "--train-iters", "1"),
)
FOUR = (*SMALL, "--pipeline-model-parallel-size", "4")  # data parallel 2, so 8 micro-batches


def report_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the tool prints."""
    plan.main(list(words))
    return capsys.readouterr().out


def shown(report: str, schedule: str) -> tuple[float, int]:
    """Bubble in percent and activations of a schedule in the table."""
    found = re.search(rf"^  {schedule} +([\d.]+)% +([\d,]+)", report, re.MULTILINE)
    assert found is not None, report
    return float(found[1]), int(found[2])


def test_a_preset_on_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 ranks = tensor 8 x pipeline 8 x data 16; 1,536 sequences are 96 micro-batches. Full recomputation is on.

    Mutations: the micro-batches of all data parallel ranks; the split schedules computed as if their backward pass
    were split (with recomputation it is not, and the V is slower than interleaving).
    """
    words = ("--config", str(ROOT / "configs/gpt3_175b.yaml"), "--world-size", "1024")
    pipeline = ("--pipeline-model-parallel-size", "8", "--num-virtual-stages-per-pipeline-rank", "2")
    report = report_of(capsys, *words, *pipeline)
    assert "pipeline rank 7: stage 7 (layers 43 to 48); stage 15 (layers 91 to 96, loss)" in report
    assert "interleaved, 96 micro-batches a step" in report
    assert "bubble: 3.5% of" in report  # 7 / (2 x 96 + 7)
    assert "ranks 0 to 7: 23, 21, 19, 17, 15, 13, 11, 9" in report
    assert "a backward pass takes 3 forward passes, which is not split" in report
    assert shown(report, "gpipe") == (3.5, 192)
    assert shown(report, "zbv")[0] > 5 > shown(report, "interleaved")[0]


def test_schedules_of_one_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    """Those for several chunks are left out; the run's own is marked. Mutation: none of them is left out."""
    report = report_of(capsys, *FOUR, "--dry-run")
    assert shown(report, "1f1b") == (27.3, 4)  # 3 / (8 + 3)
    assert shown(report, "gpipe") == (27.3, 8)
    assert shown(report, "interleaved-zero-bubble") == (11.1, 4)
    assert not re.search(r"^  (interleaved|zbv|dualpipev) ", report, re.MULTILINE)
    assert re.search(r"^  1f1b .*<- this run$", report, re.MULTILINE)
    assert report.count("<- this run") == 1


def test_schedules_of_two_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    """All but 1f1b, each over the same stages on the ranks where it wants them. Mutation: all V-shaped or none."""
    interleaved = report_of(capsys, *FOUR, "--num-virtual-stages-per-pipeline-rank", "2")
    v_shaped = report_of(capsys, *FOUR, "--pipeline-schedule", "zbv")
    expected = {"gpipe": 15.8, "interleaved": 15.8, "interleaved-zero-bubble": 5.9, "zbv": 5.9, "dualpipev": 5.9}
    for report in (interleaved, v_shaped):
        assert {schedule: shown(report, schedule)[0] for schedule in expected} == expected
        assert "  1f1b " not in report
    assert "pipeline rank 0: stage 0 (embedding, layer 1); stage 4 (layer 5)" in interleaved
    assert "pipeline rank 0: stage 0 (embedding, layer 1); stage 7 (layer 8, loss)" in v_shaped


def test_embedding_and_loss_count_where_the_split_counts_them() -> None:
    """Then all stages take as long as each other. Mutation: they count nothing, which adds waiting."""
    run = parse_args(
        [
            *(*FOUR, "--dry-run", "--num-layers", "14"),
            *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
        ]
    )
    assert plan.durations_of(run) == Durations(embedding=1, loss=1)
    assert "bubble: 27.3%" in plan.plan(run)


@pytest.mark.parametrize(
    ("words", "durations"),
    [
        ((), Durations()),
        (("--compile",), Durations(backward_input=2, backward_weight=0)),
        (("--recompute-granularity", "selective"), Durations(backward_input=2, backward_weight=0)),
        (
            ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
            Durations(backward_input=3, backward_weight=0),
        ),
    ],
)
def test_backward_passes_that_are_not_split(words: tuple[str, ...], durations: Durations) -> None:
    """As in pipelined.py: compiled and recomputed layers give both kinds of gradients in one piece."""
    assert plan.durations_of(parse_args([*FOUR, "--dry-run", *words])) == durations


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (SMALL, "plan.py: pipeline_model_parallel_size is 1, so there is no pipeline to plan"),
        ((*FOUR, "--num-layers", "9"), "num_layers is 9"),
        ((*FOUR, "--draw-pipline", "x.svg"), "--draw-pipline is not a flag"),
        ((*FOUR, "--draw-pipeline", "pipeline.png"), "end its name in .svg"),
        ((*FOUR, "--draw-pipeline", "/dev/null/pipeline.svg"), "'/dev/null'"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence and exit status 1."""
    with pytest.raises(SystemExit) as ended:
        plan.main(list(words))
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def boxes_of(path: Path) -> list[ElementTree.Element]:
    """The boxes of actions in a picture, which must be well-formed."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    return [box for box in root.iter(f"{SVG}rect") if box.get("class") == "action"]


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_the_picture_of_a_plan(schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A box for each action, none outside the picture, no two of a rank on top of each other, all with numbers.

    Mutations: gradients of weights are not drawn; boxes begin where the page does, not where the row does.
    """
    path = tmp_path / "new" / "pipeline.svg"
    report = report_of(capsys, *FOUR, "--pipeline-schedule", schedule, "--draw-pipeline", str(path))
    assert report.endswith(f"picture: {path}\n")
    boxes = boxes_of(path)
    layout = even_layout(8, 4, 1 if schedule == "1f1b" else 2, v_shaped=schedule != "1f1b")
    order = pipeline_order(schedule, layout, 8)
    assert len(boxes) == sum(len(action.sub_actions or (action,)) for actions in order.values() for action in actions)
    root = ElementTree.parse(path).getroot()
    titles = [text.text for text in root.iter(f"{SVG}text")]
    bubble = pipeline_timeline(schedule, layout, 8).bubble_fraction
    assert titles[0] is not None
    assert titles[0].startswith(f"{schedule}, 4 ranks")
    assert titles[0].endswith(f"8 micro-batches: {100 * bubble:.1f}% bubble")
    numbers = [text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "middle"]
    assert len(numbers) >= len(boxes)
    width = float(root.get("width", 0))
    rows: dict[str, list[tuple[float, float]]] = {}
    for box in boxes:
        left = float(box.get("x", -1))
        assert left + float(box.get("width", 0)) <= width
        rows.setdefault(box.get("y", ""), []).append((left, left + float(box.get("width", 0))))
    assert len(rows) == 4
    for row in rows.values():
        ends = [0.0, *(end for _, end in sorted(row))]
        assert all(start >= end - 0.02 for (start, _), end in zip(sorted(row), ends, strict=False))


def test_a_long_pipeline_has_no_numbers_and_is_no_wider_than_a_screen_scrolls(tmp_path: Path) -> None:
    """16 ranks x 128 micro-batches. Mutation: numbers wherever their own digits fit, which draws the first ten."""
    path = tmp_path / "pipeline.svg"
    words = ["--ranks", "16", "--num-microbatches", "128", "--schedules", "1f1b", "--output", str(path)]
    assert drawing.main(words) == 0
    root = ElementTree.parse(path).getroot()
    assert len(boxes_of(path)) == 16 * 128 * 2
    assert float(root.get("width", 0)) < 2600
    numbers = [text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "middle"]
    assert len(numbers) < 60, "those of the axis"


def test_the_picture_of_the_documentation_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    """docs/pipeline.svg is made by the tool without flags."""
    path = tmp_path / "pipeline.svg"
    assert drawing.main(["--output", str(path)]) == 0
    assert path.read_text() == (ROOT / "docs" / "pipeline.svg").read_text()
    assert drawing.main(["--ranks", "0", "--output", str(path)]) == 2
