#!/usr/bin/env python3
"""Draw which tokens context parallel ranks hold, and which scores they compute, from the package's own plan.

tools/draw_context_parallel.py --output-dir docs
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.context_parallel import SequenceLayout, zigzag_positions
from megatron_lite.context_parallel.blocks import attention_blocks

# Told apart by the colour-blind too (Okabe and Ito).
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
HIDDEN, PADDING = "#FFFFFF", "#D9D9D9"

# Documents of 19, 12 and 27 tokens: in one sequence of 60, and each padded to what two ranks can split.
IN_A_SEQUENCE = SequenceLayout((0, 60), ((0, 19), (19, 31), (31, 58)))
ONE_BY_ONE = SequenceLayout((0, 20, 32, 60), ((0, 19), (20, 32), (32, 59)))


def score_matrix(layout: SequenceLayout, cp_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rank computes a pair of tokens, and in which step of the ring: [t, t] each, -1 where none does."""
    length = layout.stretches[-1]
    ranks, steps = (np.full((length, length), -1) for _ in range(2))
    positions = [zigzag_positions(layout.stretches, cp_size, rank).numpy() for rank in range(cp_size)]
    for rank in range(cp_size):
        for block in attention_blocks(layout, cp_size, rank):
            queries = positions[rank][block.q_start : block.q_end]
            keys = positions[(rank - block.step) % cp_size][block.k_start : block.k_end]
            for i, query in enumerate(queries):
                seen = keys[: i + 1] if block.causal else keys
                ranks[query, seen], steps[query, seen] = rank, block.step
    return ranks, steps


def pairs_of_ranks(layout: SequenceLayout, cp_size: int) -> list[int]:
    """Query-key pairs that each rank computes."""
    return [sum(block.scores for block in attention_blocks(layout, cp_size, rank)) for rank in range(cp_size)]


def draw_ranks(axes: Any, layout: SequenceLayout, cp_size: int) -> None:
    """The sequence on top and below it each rank's part, where it belongs in the sequence."""
    from matplotlib.patches import Rectangle

    length = layout.stretches[-1]
    chunk = length // (2 * cp_size)
    for rank in range(cp_size):
        early, late = zigzag_positions(layout.stretches, cp_size, rank).split(chunk)
        for place in (int(early[0]), int(late[0])):
            for line in (0.0, rank + 1.3):
                axes.add_patch(Rectangle((place, line), chunk, 0.8, facecolor=COLOURS[rank], edgecolor="white"))
                axes.text(place + chunk / 2, line + 0.4, str(place // chunk), ha="center", va="center")
    axes.set_yticks(
        [0.4] + [rank + 1.7 for rank in range(cp_size)], ["sequence"] + [f"rank {r}" for r in range(cp_size)]
    )
    axes.set_xlim(0, length)
    axes.set_ylim(cp_size + 1.3, -0.2)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"{2 * cp_size} chunks of the sequence, two a rank", fontsize=11)


def draw_scores(axes: Any, layout: SequenceLayout, cp_size: int, title: str) -> None:
    """The score matrix in the colours of the ranks, padding in grey."""
    from matplotlib.colors import to_rgb

    ranks, _ = score_matrix(layout, cp_size)
    image = np.empty((*ranks.shape, 3))
    image[:] = to_rgb(HIDDEN)
    padding = (layout.document_of_token() < 0).numpy()
    image[padding, :] = image[:, padding] = to_rgb(PADDING)
    for rank in range(cp_size):
        image[ranks == rank] = to_rgb(COLOURS[rank])
    length = layout.stretches[-1]
    axes.imshow(image, extent=(0, length, length, 0), interpolation="nearest")
    for start, end in pairwise(layout.stretches):
        chunk = (end - start) / (2 * cp_size)
        for number in range(2 * cp_size):
            width = 1.4 if number == 0 and start > 0 else 0.4
            for line in (axes.axhline, axes.axvline):
                line(start + number * chunk, color="#555555", linewidth=width)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_xticks([])
    axes.set_yticks([])
    counts = ", ".join(f"{count:,}" for count in pairs_of_ranks(layout, cp_size))
    axes.set_title(f"{title}\nquery-key pairs by rank: {counts}", fontsize=11)


def number_steps(axes: Any, layout: SequenceLayout, cp_size: int) -> None:
    """The step of the ring in the middle of each chunk of the score matrix; on the diagonal in its lower half."""
    _, steps = score_matrix(layout, cp_size)
    chunk = layout.stretches[-1] // (2 * cp_size)
    for row in range(2 * cp_size):
        for column in range(row + 1):
            step = steps[row * chunk + chunk - 1, column * chunk]
            shift = chunk / 5 if row == column else 0.0
            place = (column + 0.5) * chunk - shift, (row + 0.5) * chunk + shift
            axes.text(*place, str(step), ha="center", va="center")


def draw_zigzag(path: Path) -> None:
    """One causal sequence over four ranks."""
    import matplotlib.pyplot as plt

    cp_size, layout = 4, SequenceLayout.whole(64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.6), dpi=120, width_ratios=(1, 1.1))
    draw_ranks(left, layout, cp_size)
    draw_scores(right, layout, cp_size, "scores: colour is the rank, number the step of the ring")
    number_steps(right, layout, cp_size)
    figure.tight_layout()
    figure.savefig(path)


def draw_packed(path: Path) -> None:
    """Documents over two ranks, split as one sequence and one by one."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 5.5), dpi=120)
    draw_scores(left, IN_A_SEQUENCE, 2, "the sequence is split, documents as they fall")
    draw_scores(right, ONE_BY_ONE, 2, "each document is padded and split")
    names = {"rank 0": COLOURS[0], "rank 1": COLOURS[1], "padding": PADDING}
    patches = [Patch(facecolor=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("."), help="where zigzag.png and packed.png are written"
    )
    return parser


def main() -> None:
    """Draw both pictures."""
    import matplotlib

    matplotlib.use("Agg")
    folder = build_parser().parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in {"zigzag": draw_zigzag, "packed": draw_packed}.items():
        draw(folder / f"{name}.png")
        print(f"picture: {folder / f'{name}.png'}")


if __name__ == "__main__":
    main()
