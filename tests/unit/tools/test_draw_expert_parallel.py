"""tools/draw_expert_parallel.py: what is drawn comes from the groups, and layouts that do not fit are refused."""

from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

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


@pytest.mark.parametrize("words", ["--ep 3", "--world-size 65"])
def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    path = tmp_path / "experts.png"
    assert tool.main([*words.split(), "--output", str(path)]) == 2
    assert "error: " in capsys.readouterr().err
    assert not path.exists()
