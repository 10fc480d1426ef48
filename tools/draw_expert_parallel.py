#!/usr/bin/env python3
"""Draw how experts fold over the dense axes: the same ranks as two grids, from the package's own rank arithmetic.

tools/draw_expert_parallel.py --output docs/experts.png
tools/draw_expert_parallel.py --world-size 16 --tp 4 --cp 1 --ep 4 --etp 2
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from megatron_lite.context_parallel import zigzag_positions
from megatron_lite.errors import ConfigError
from megatron_lite.rank_generator import ParallelLayout, RankLists

# Light enough for black text and told apart by the colour-blind too (Paul Tol's light scheme); hatches from the ninth.
COLOURS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#DDDDDD")
HATCHES = ("", "//", "\\\\", "..", "xx", "--", "||", "++")
MOST_RANKS = len(COLOURS) * len(HATCHES)
EXPERTS_OF_A_RANK = 2
# Inches, y downwards.
CELL_WIDTH, CELL_HEIGHT, ROW_LABEL, HEADING, GAP = 1.08, 0.78, 0.62, 1.05, 0.16
MARGIN, BETWEEN, LEGEND_LINE, PAGE_WIDTH = 0.12, 0.5, 0.34, 10.0


class Grid(NamedTuple):
    """Ranks in rows and columns, a label for each, and the text of each rank; `block` rows stand close together."""

    title: str
    meaning: str
    ranks: list[list[int]]
    rows: list[str]
    columns: list[str]
    texts: dict[int, str]
    block: int

    def size(self) -> tuple[float, float]:
        """Width and height with all labels."""
        gaps = (len(self.rows) - 1) // self.block
        width = ROW_LABEL + max(len(self.columns) * CELL_WIDTH, 3.0)
        return width, HEADING + len(self.rows) * CELL_HEIGHT + gaps * GAP


def places(layout: ParallelLayout) -> dict[str, dict[int, int]]:
    """For each kind of group the place of every rank in its group."""
    kinds = layout.groups().items()
    return {kind: {rank: i for ranks in groups for i, rank in enumerate(ranks)} for kind, groups in kinds}


def chunks_of(layout: ParallelLayout, cp: int, tp: int) -> str:
    """The chunks of a sequence that a rank brings: a zigzag over cp, and equal parts of that over tp."""
    cp_size, tp_size = layout.dense.cp, layout.dense.tp
    if cp_size * tp_size == 1:
        return "all chunks"
    chunks = cp_size * math.lcm(2, tp_size) if cp_size > 1 else tp_size
    own = zigzag_positions((0, chunks), cp_size, cp).chunk(tp_size)[tp].tolist()
    return f"chunk{'s' * (len(own) > 1)} {', '.join(map(str, own))}"


def experts_of(layout: ParallelLayout, ep: int, etp: int) -> str:
    """The experts that a rank holds, and which part of each."""
    names = ", ".join(str(ep * EXPERTS_OF_A_RANK + number) for number in range(EXPERTS_OF_A_RANK))
    parts = {1: "whole", 2: ("left half", "right half")[etp % 2]}
    return f"experts {names}\n{parts.get(layout.expert.tp, f'part {etp} of {layout.expert.tp}')}"


def dense_grid(layout: ParallelLayout) -> Grid:
    """As dense layers see the ranks: a row for each dp and cp, a column for each tp."""
    sizes, place = layout.dense, places(layout)
    tp, cp, dp = place["tp"], place["cp"], place["dp"]
    ranks: list[list[int]] = layout.dense_mesh().reshape(-1, sizes.tp).tolist()
    return Grid(
        f"dense layers: dp {sizes.dp} x cp {sizes.cp} x tp {sizes.tp}",
        "which tokens a rank brings",
        ranks,
        [f"dp {dp[rank]}\ncp {cp[rank]}" for rank, *_ in ranks],
        [f"tp {tp[rank]}" for rank in ranks[0]],
        {rank: f"batch {dp[rank]}\n{chunks_of(layout, cp[rank], tp[rank])}" for row in ranks for rank in row},
        block=sizes.cp,
    )


def expert_grid(layout: ParallelLayout) -> Grid:
    """As experts see the same ranks: a row for each edp, a column for each ep and etp."""
    sizes, place = layout.expert, places(layout)
    etp, ep, edp = place["expt_tp"], place["ep"], place["expt_dp"]
    ranks: list[list[int]] = layout.expert_mesh().reshape(-1, sizes.ep * sizes.tp).tolist()
    return Grid(
        f"experts: edp {sizes.dp} x ep {sizes.ep} x etp {sizes.tp}",
        "which experts it holds",
        ranks,
        [f"edp {edp[rank]}" for rank, *_ in ranks],
        [f"ep {ep[rank]}\netp {etp[rank]}" for rank in ranks[0]],
        {rank: experts_of(layout, ep[rank], etp[rank]) for row in ranks for rank in row},
        block=1,
    )


def styles_of(groups: RankLists) -> dict[int, tuple[str, str]]:
    """Colour and hatch of each rank: one for each group."""
    count = len(COLOURS)
    return {rank: (COLOURS[i % count], HATCHES[i // count]) for i, ranks in enumerate(groups) for rank in ranks}


def draw_grid(axes: Axes, grid: Grid, x: float, y: float, styles: dict[int, tuple[str, str]]) -> dict[int, Rectangle]:
    """Draw a grid whose upper left corner is (x, y); returns the cell of each rank."""
    x += ROW_LABEL
    axes.text(x, y + 0.14, grid.title, fontsize=12, weight="bold", va="center")
    axes.text(x, y + 0.40, grid.meaning, va="center")
    cells = {}
    for j, label in enumerate(grid.columns):
        axes.text(x + (j + 0.5) * CELL_WIDTH, y + HEADING - 0.1, label, ha="center", va="bottom")
    for i, (label, ranks) in enumerate(zip(grid.rows, grid.ranks, strict=True)):
        top = y + HEADING + i * CELL_HEIGHT + i // grid.block * GAP
        axes.text(x - 0.12, top + CELL_HEIGHT / 2, label, ha="right", va="center")
        for j, rank in enumerate(ranks):
            colour, hatch = styles[rank]
            corner = (x + j * CELL_WIDTH, top)
            cells[rank] = Rectangle(corner, CELL_WIDTH, CELL_HEIGHT, fc=colour, hatch=hatch, ec="white", lw=2)
            axes.add_patch(cells[rank])
            middle = corner[0] + CELL_WIDTH / 2
            axes.text(middle, top + 0.17, f"rank {rank}", ha="center", va="center", weight="bold")
            axes.text(middle, top + 0.49, grid.texts[rank], ha="center", va="center", fontsize=9)
    return cells


def draw_frames(axes: Axes, cells: dict[int, Rectangle], groups: RankLists) -> None:
    """A frame round the cells of each group."""
    for ranks in groups:
        corners = [cells[rank].get_xy() for rank in ranks]
        left, top = min(x for x, _ in corners), min(y for _, y in corners)
        width = max(x for x, _ in corners) + CELL_WIDTH - left
        height = max(y for _, y in corners) + CELL_HEIGHT - top
        box = (left + 0.05, top + 0.05), width - 0.1, height - 0.1
        axes.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=0.08", fc="none", ec="#333333", lw=1.5))


def draw_legend(axes: Axes, x: float, y: float, framed: bool) -> None:
    """What colours and frames mean."""
    exchange = "same colour: they exchange tokens (one tp_ep group holds one set of all experts)"
    copies = "one frame: copies of the same experts, whose gradients are added (one expt_dp group)"
    axes.add_patch(Rectangle((x, y), 0.3, 0.2, fc=COLOURS[0], ec="white"))
    axes.text(x + 0.42, y + 0.1, exchange, va="center")
    if framed:
        axes.add_patch(Rectangle((x, y + LEGEND_LINE), 0.3, 0.2, fc="none", ec="#333333", lw=1.5))
    axes.text(x + 0.42, y + LEGEND_LINE + 0.1, copies if framed else "each expert is there once (edp 1)", va="center")


def draw(layout: ParallelLayout) -> Figure:
    """Both grids, side by side where a page is wide enough, else one above the other."""
    dense, expert = dense_grid(layout), expert_grid(layout)
    (width, height), (expert_width, expert_height) = dense.size(), expert.size()
    if width + BETWEEN + expert_width + 2 * MARGIN <= PAGE_WIDTH:
        place = (MARGIN + width + BETWEEN, MARGIN)
        width, height = width + BETWEEN + expert_width, max(height, expert_height)
    else:
        place = (MARGIN, MARGIN + height + BETWEEN)
        width, height = max(width, expert_width, 7.0), height + BETWEEN + expert_height
    total = width + 2 * MARGIN, height + 2 * MARGIN + BETWEEN / 2 + 2 * LEGEND_LINE
    figure = Figure(figsize=total, dpi=120)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, total[0]), ylim=(total[1], 0))
    axes.set_axis_off()
    styles = styles_of(layout.groups()["tp_ep"])
    draw_grid(axes, dense, MARGIN, MARGIN, styles)
    cells = draw_grid(axes, expert, *place, styles)
    copies = [ranks for ranks in layout.groups()["expt_dp"] if len(ranks) > 1]
    draw_frames(axes, cells, copies)
    draw_legend(axes, MARGIN + ROW_LABEL, total[1] - MARGIN - 2 * LEGEND_LINE, framed=bool(copies))
    return figure


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world-size", type=int, default=8, help="ranks (default: 8)")
    parser.add_argument("--tp", type=int, default=2, help="tensor parallel size (default: 2)")
    parser.add_argument("--cp", type=int, default=2, help="context parallel size (default: 2)")
    parser.add_argument("--ep", type=int, default=4, help="expert parallel size (default: 4)")
    parser.add_argument("--etp", type=int, default=1, help="expert tensor parallel size (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("experts.png"), help="the picture (default: experts.png)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw the picture of one layout."""
    given = build_parser().parse_args(argv)
    try:
        if not 1 <= given.world_size <= MOST_RANKS:
            raise ConfigError(f"world_size is {given.world_size}, but a picture has room for 1 to {MOST_RANKS} ranks.")
        layout = ParallelLayout.from_sizes(given.world_size, tp=given.tp, cp=given.cp, ep=given.ep, etp=given.etp)
        figure = draw(layout)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(given.output)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
