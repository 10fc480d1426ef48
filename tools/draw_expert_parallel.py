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
# Inches, y downwards. A cell with its share of the space around it is WIDTH x HEIGHT. A page is wide enough for titles
# and legend, and no wider than can be read on a screen unless a grid is.
WIDTH, HEIGHT, PAD, ROW_LABEL, HEADING, TITLE = 1.2, 0.84, 0.05, 0.6, 1.05, 2.4
MARGIN, BETWEEN, LEGEND, NARROWEST, WIDEST = 0.12, 0.4, 0.85, 7.6, 10.0


class Grid(NamedTuple):
    """Ranks in rows and columns, a label for each, and the text of each rank; `block` rows stand close together."""

    title: str
    meaning: str
    ranks: list[list[int]]
    rows: list[str]
    columns: list[str]
    texts: dict[int, str]
    block: int

    def top(self, row: int) -> float:
        """Where a row begins; the first after the last is the height of the grid."""
        return HEADING + row * HEIGHT + (row // self.block) * 2 * PAD


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
        "which tokens each rank brings",
        ranks,
        [f"dp {dp[row[0]]}\ncp {cp[row[0]]}" for row in ranks],
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
        "the same ranks: which experts each holds",
        ranks,
        [f"edp {edp[row[0]]}" for row in ranks],
        [f"ep {ep[rank]}\netp {etp[rank]}" for rank in ranks[0]],
        {rank: experts_of(layout, ep[rank], etp[rank]) for row in ranks for rank in row},
        block=1,
    )


def draw_grid(axes: Axes, grid: Grid, x: float, y: float, groups: RankLists) -> dict[int, tuple[float, float]]:
    """Draw a grid whose upper left corner is (x, y), a colour (and hatch) a group; returns the corner of each cell."""
    style = {rank: divmod(number, len(COLOURS)) for number, ranks in enumerate(groups) for rank in ranks}
    x, corners = x + ROW_LABEL, {}
    axes.text(x + PAD, y + 0.14, grid.title, fontsize=11, weight="bold", va="center")
    axes.text(x + PAD, y + 0.38, grid.meaning, va="center")
    for j, label in enumerate(grid.columns):
        axes.text(x + (j + 0.5) * WIDTH, y + HEADING - 0.06, label, ha="center", va="bottom")
    for i, row in enumerate(grid.ranks):
        axes.text(x - 0.08, y + grid.top(i) + HEIGHT / 2, grid.rows[i], ha="right", va="center")
        for j, rank in enumerate(row):
            left, top = corners[rank] = x + j * WIDTH, y + grid.top(i)
            lap, colour = style[rank]
            box = (left + PAD, top + PAD), WIDTH - 2 * PAD, HEIGHT - 2 * PAD
            axes.add_patch(Rectangle(*box, fc=COLOURS[colour], hatch=HATCHES[lap], ec="white", lw=0))
            middle = left + WIDTH / 2
            axes.text(middle, top + 0.2, f"rank {rank}", ha="center", va="center", weight="bold")
            axes.text(middle, top + 0.52, grid.texts[rank], ha="center", va="center", fontsize=9)
    return corners


def draw_frame(axes: Axes, corners: list[tuple[float, float]]) -> None:
    """A frame round the cells with these corners."""
    (left, right), (top, bottom) = ((min(ends), max(ends)) for ends in zip(*corners, strict=True))
    box = (left + PAD / 3, top + PAD / 3), right - left + WIDTH - 2 * PAD / 3, bottom - top + HEIGHT - 2 * PAD / 3
    axes.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=0.08", fc="none", ec="#333333", lw=1.5))


def draw_legend(axes: Axes, x: float, y: float, framed: bool) -> None:
    """What colours and frames mean."""
    exchange = "one colour: ranks that exchange tokens; together they hold all experts (a tp_ep group)"
    copies = "one frame: copies of the same experts, which add their gradients (an expt_dp group)"
    axes.add_patch(Rectangle((x, y), 0.34, 0.22, fc=COLOURS[0]))
    axes.text(x + 0.48, y + 0.11, exchange, va="center")
    if framed:
        axes.add_patch(Rectangle((x, y + 0.36), 0.34, 0.22, fc="none", ec="#333333", lw=1.5))
    axes.text(x + 0.48, y + 0.47, copies if framed else "no frames: every expert is there once", va="center")


def draw(layout: ParallelLayout) -> Figure:
    """Both grids, side by side if a page is wide enough, else one above the other."""
    grids, groups = (dense_grid(layout), expert_grid(layout)), layout.groups()
    widths = [ROW_LABEL + max(len(grid.columns) * WIDTH, TITLE) for grid in grids]
    heights = [grid.top(len(grid.rows)) for grid in grids]
    width, height = max(sum(widths) + BETWEEN, NARROWEST), max(heights)
    second = MARGIN + widths[0] + BETWEEN, MARGIN
    if width + 2 * MARGIN > WIDEST:
        width, height = max(*widths, NARROWEST), sum(heights) + BETWEEN
        second = MARGIN, MARGIN + heights[0] + BETWEEN
    total = width + 2 * MARGIN, height + LEGEND + 2 * MARGIN
    figure = Figure(figsize=total, dpi=120)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, total[0]), ylim=(total[1], 0))
    axes.set_axis_off()
    draw_grid(axes, grids[0], MARGIN, MARGIN, groups["tp_ep"])
    corners = draw_grid(axes, grids[1], *second, groups["tp_ep"])
    copies = [ranks for ranks in groups["expt_dp"] if len(ranks) > 1]
    for ranks in copies:
        draw_frame(axes, [corners[rank] for rank in ranks])
    draw_legend(axes, MARGIN + ROW_LABEL + PAD, MARGIN + height + 0.2, framed=bool(copies))
    return figure


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=8, help="number of ranks (default: 8)")
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
        if given.output.suffix[1:].lower() not in (known := figure.canvas.get_supported_filetypes()):
            raise ConfigError(f"--output {given.output} is no kind of picture; end it in one of {', '.join(known)}.")
        given.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(given.output)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
