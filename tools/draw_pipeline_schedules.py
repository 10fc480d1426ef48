#!/usr/bin/env python3
"""Draw when each rank of a pipeline works on what, from the package's own schedules: an SVG, one picture a schedule.

tools/draw_pipeline_schedules.py --output docs/pipeline.svg
tools/draw_pipeline_schedules.py --ranks 8 --num-microbatches 32 --schedules interleaved-zero-bubble dualpipev
"""

import argparse
import sys
from pathlib import Path

from megatron_lite.errors import ConfigError
from megatron_lite.pipeline_layout import V_SHAPED, even_layout
from megatron_lite.pipeline_parallel.drawing import pipeline_svg
from megatron_lite.pipeline_parallel.timeline import Timeline, pipeline_timeline
from megatron_lite.pipeline_parallel_config import SCHEDULES


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks (default: 4)")
    parser.add_argument("--num-microbatches", type=int, default=8, help="micro-batches of a step (default: 8)")
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        default=["1f1b", "interleaved", "zbv"],
        help="pictures from top to bottom (default: 1f1b interleaved zbv); gpipe and 1f1b have one model chunk a rank, "
        "the others two",
    )
    parser.add_argument("--output", type=Path, default=Path("pipeline.svg"), help="the SVG (default: pipeline.svg)")
    return parser


def picture_of(schedule: str, ranks: int, num_microbatches: int) -> tuple[str, Timeline]:
    """A schedule over equal stages, as pipeline_svg takes it."""
    chunks = 1 if schedule in ("gpipe", "1f1b") else 2
    layout = even_layout(ranks * chunks, ranks, chunks, v_shaped=schedule in V_SHAPED)
    title = f"{schedule}, {ranks} ranks{' x 2 chunks' if chunks == 2 else ''}, {num_microbatches} micro-batches"
    return title, pipeline_timeline(schedule, layout, num_microbatches)


def main(argv: list[str] | None = None) -> int:
    """Draw the schedules one below the other."""
    given = build_parser().parse_args(argv)
    try:
        if min(given.ranks, given.num_microbatches) < 1:
            raise ConfigError(
                f"ranks is {given.ranks} and num_microbatches {given.num_microbatches}, but both must be at least 1."
            )
        pictures = [picture_of(schedule, given.ranks, given.num_microbatches) for schedule in given.schedules]
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(pipeline_svg(pictures), encoding="utf-8")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
