"""tools/draw_expert_parallel.py: what is drawn comes from the groups, and layouts that do not fit are refused."""

import itertools
import re
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from megatron_lite.rank_generator import ParallelLayout
from tools import draw_expert_parallel as tool

LAYOUT = ParallelLayout.from_sizes(8, tp=2, cp=2, ep=4, etp=1)


def test_both_grids_are_those_of_the_documented_example() -> None:
    """Mutations: cp and tp exchanged; the experts of rank 0 for all; ranks in the order of the dense grid."""
    dense, experts = tool.dense_grid(LAYOUT), tool.expert_grid(LAYOUT)
    assert dense.ranks == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert experts.ranks == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dense.texts[3] == "batch 0\nchunk 2"
    assert dense.texts[5] == "batch 1\nchunk 3"
    assert experts.texts[6] == "experts 4, 5\nwhole"
    halves = tool.expert_grid(ParallelLayout.from_sizes(8, tp=2, cp=2, ep=4, etp=2))
    assert halves.texts[5] == "experts 4, 5\nright half"


def test_a_colour_for_each_group_that_exchanges_tokens() -> None:
    """In both grids. Mutation: colours by expert data parallel group."""
    patches = tool.draw(LAYOUT).axes[0].patches
    colours = [patch.get_facecolor() for patch in patches if isinstance(patch, Rectangle)][:16]
    assert len(set(colours)) == 2
    assert colours == [*[colours[0]] * 4, *[colours[4]] * 4] * 2


@pytest.mark.parametrize(
    "words", ["", "--world-size 16 --tp 4 --cp 1 --ep 4 --etp 2", "--world-size 1 --tp 1 --cp 1 --ep 1"]
)
def test_a_picture_is_written(tmp_path: Path, words: str) -> None:
    path = tmp_path / "new" / "experts.png"
    assert tool.main([*words.split(), "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", ["--ep 3", "--world-size 65", "--world-size 0", "--cp 0"])
def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    path = tmp_path / "experts.png"
    assert tool.main([*words.split(), "--output", str(path)]) == 2
    assert "error: " in capsys.readouterr().err
    assert not path.exists()


def test_an_ending_that_is_no_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--output", str(tmp_path / "new" / "experts.doc")]) == 2
    assert "no kind of picture" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# What follows reads the picture back from its rectangles and texts.
# world size, then tp, cp, ep, etp: the documented example, both grids folded, groups of one, more groups than colours,
# long texts, uneven sizes.
SIZES = [
    (8, 2, 2, 4, 1),
    (8, 2, 2, 4, 2),
    (16, 4, 1, 4, 2),
    (16, 1, 4, 2, 4),
    (1, 1, 1, 1, 1),
    (36, 3, 2, 6, 1),
    (64, 1, 1, 1, 1),
    (64, 2, 32, 64, 1),
    (64, 64, 1, 1, 64),
]
every_layout = pytest.mark.parametrize("sizes", SIZES, ids=str)


def layout_of(sizes):
    world, tp, cp, ep, etp = sizes
    return ParallelLayout.from_sizes(world, tp=tp, cp=cp, ep=ep, etp=etp)


def inside(box, x, y):
    left, top = box.get_x(), box.get_y()
    return left <= x <= left + box.get_width() and top <= y <= top + box.get_height()


def middle(cell):
    return cell.get_x() + cell.get_width() / 2, cell.get_y() + cell.get_height() / 2


def cells_of(figure: Figure):
    """For the dense grid and for that of the experts: each rank's rectangle, and the text in it."""
    (axes,) = figure.axes
    grids: list[dict[int, tuple[Rectangle, str]]] = [{}, {}]
    for text in axes.texts:
        found = re.fullmatch(r"rank (\d+)", text.get_text())
        if found:
            (cell,) = [p for p in axes.patches if type(p) is Rectangle and inside(p, *text.get_position())]
            (content,) = [t for t in axes.texts if t is not text and inside(cell, *t.get_position())]
            # The dense grid is drawn first.
            grid = grids[int(found[1]) in grids[0]]
            assert int(found[1]) not in grid
            grid[int(found[1])] = (cell, content.get_text())
    return grids


def style(cell):
    return cell.get_facecolor(), cell.get_hatch() or ""


@every_layout
def test_colours_are_the_ranks_that_exchange_tokens(sizes):
    """In both grids two ranks look alike just where they are in one tp_ep group.

    Mutations: the groups of "ep" instead of "tp_ep" (with ETP 2); no hatches (64 groups).
    """
    layout = layout_of(sizes)
    for grid in cells_of(tool.draw(layout)):
        assert sorted(grid) == list(range(sizes[0]))
        looks: dict[tuple, list[int]] = {}
        for rank, (cell, _) in grid.items():
            looks.setdefault(style(cell), []).append(rank)
        assert sorted(sorted(ranks) for ranks in looks.values()) == sorted(map(sorted, layout.groups()["tp_ep"]))


@every_layout
def test_frames_are_the_copies_of_experts(sizes):
    """Each frame holds the ranks of one expt_dp group in the experts' grid and no others; none where nothing is twice.

    Mutations: the groups of "dp" instead of "expt_dp"; frames in the dense grid; a frame for groups of one.
    """
    layout = layout_of(sizes)
    figure = tool.draw(layout)
    dense, expert = cells_of(figure)
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    framed = [sorted(rank for rank, (cell, _) in expert.items() if inside(frame, *middle(cell))) for frame in frames]
    assert sorted(framed) == sorted(sorted(ranks) for ranks in layout.groups()["expt_dp"] if len(ranks) > 1)
    assert not any(inside(frame, *middle(cell)) for frame in frames for cell, _ in dense.values())


@every_layout
def test_places_and_labels_are_those_of_the_groups(sizes):
    """Ranks in a row or a column of the picture are those that the labels of the row and the column say.

    Mutations: dense rows labelled cp first; the columns of the experts as etp x ep; cp and dp swapped in the title.
    """
    layout = layout_of(sizes)
    figure = tool.draw(layout)
    place = {
        kind: {rank: number for ranks in layout.groups()[kind] for number, rank in enumerate(ranks)}
        for kind in ("tp", "cp", "dp", "ep", "expt_tp", "expt_dp")
    }
    texts = [(text.get_text(), *text.get_position()) for text in figure.axes[0].texts]
    for name, grid in zip(("dense", "expert"), cells_of(figure), strict=True):
        left, top = (min(middle(cell)[i] for cell, _ in grid.values()) for i in range(2))
        for rank, (cell, _) in grid.items():
            x, y = middle(cell)
            # The nearest label to the left of the row, and above the column.
            row = max((t for t in texts if t[1] < left - 0.5 and abs(t[2] - y) < 0.01), key=lambda t: t[1])[0]
            column = max((t for t in texts if t[2] < top - 0.4 and abs(t[1] - x) < 0.01), key=lambda t: t[2])[0]
            if name == "dense":
                assert row == f"dp {place['dp'][rank]}\ncp {place['cp'][rank]}"
                assert column == f"tp {place['tp'][rank]}"
            else:
                assert row == f"edp {place['expt_dp'][rank]}"
                assert column == f"ep {place['ep'][rank]}\netp {place['expt_tp'][rank]}"
    world, tp, cp, ep, etp = sizes
    shown = [text for text, _, _ in texts]
    assert f"dense layers: dp {world // (tp * cp)} x cp {cp} x tp {tp}" in shown
    assert f"experts: edp {world // (ep * etp)} x ep {ep} x etp {etp}" in shown


@every_layout
def test_every_chunk_of_a_batch_is_brought_once(sizes):
    """Mutation: chunks dealt over tp without the ranks of cp."""
    _, tp, cp, _, _ = sizes
    dense, _ = cells_of(tool.draw(layout_of(sizes)))
    brought: dict[str, list[int]] = {}
    for _, text in dense.values():
        batch, own = text.split("\n")
        brought.setdefault(batch, []).extend(map(int, re.findall(r"\d+", own)))
    everything = set() if tp * cp == 1 else set(range(max(brought["batch 0"]) + 1))
    for chunks in brought.values():
        assert len(chunks) == len(everything)
        assert set(chunks) == everything


@every_layout
def test_no_text_meets_another_or_leaves_its_place(sizes):
    """Mutation: cells of 0.8 inches; a second grid that begins where the first does."""
    figure = tool.draw(layout_of(sizes))
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes:
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    assert [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)] == []
    for grid in cells_of(figure):
        for cell, content in grid.values():
            room = cell.get_window_extent(renderer)
            own = [box for _, box in boxes if room.contains((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)]
            assert len(own) == 2
            assert all(room.x0 <= box.x0 and box.x1 <= room.x1 for box in own), content
