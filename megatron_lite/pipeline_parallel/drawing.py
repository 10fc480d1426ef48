"""Timelines of pipelines as SVG pictures, written by hand so that nothing needs to be installed."""

from collections.abc import Iterator, Sequence
from html import escape

from megatron_lite.pipeline_parallel.timeline import KINDS, Span, Timeline

# Light enough for black text and told apart by the colour-blind too (Okabe and Ito).
COLOURS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#2BB58C"}
IDLE, INK = "#EEEEEE", "#222222"
UNIT = "number: micro-batch; time: in forward passes of a micro-batch through all layers of a rank"
# Pixels. A row of a rank is ROW high and its boxes BOX; the shortest action is SHORTEST wide where that makes the
# picture no wider than WIDEST.
ROW, BOX, FONT, DIGIT = 24, 20, 11, 6.6
MARGIN, LABEL, TITLE, AXIS, LINE = 16, 56, 28, 40, 18
SHORTEST, NARROWEST, WIDEST = 17.0, 720.0, 2400.0


def pipeline_svg(pictures: Sequence[tuple[str, Timeline]]) -> str:
    """An SVG of timelines one below the other, on one scale of time.

    Args:
        pictures: for each what its title begins with (its bubble is added), and the timeline.
    """
    timelines = [timeline for _, timeline in pictures]
    scale = _pixels_per_time(timelines)
    width = 2 * MARGIN + LABEL + scale * max(timeline.makespan for timeline in timelines)
    body: list[str] = []
    y = float(MARGIN)
    for title, timeline in pictures:
        body += _picture(title, timeline, y, scale)
        y += TITLE + ROW * timeline.ranks + AXIS
    drawn = {span.kind for timeline in timelines for span in timeline.spans}
    kinds = [kind for kind in KINDS if kind in drawn]
    chunks = max(span.stage // timeline.ranks + 1 for timeline in timelines for span in timeline.spans)
    body += _legend(kinds, chunks, y)
    height = y + LINE * (len(kinds) + 1) + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="{FONT}" fill="{INK}">'
    )
    background = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#FFFFFF"/>'
    return "\n".join([head, background, *body, "</svg>"]) + "\n"


def _pixels_per_time(timelines: Sequence[Timeline]) -> float:
    """So that the shortest action is wide enough for its number if the page is."""
    lengths = [span.end - span.start for timeline in timelines for span in timeline.spans if span.end > span.start]
    longest = max(timeline.makespan for timeline in timelines)
    return min(max(SHORTEST / min(lengths), NARROWEST / longest), WIDEST / longest)


def _picture(title: str, timeline: Timeline, y: float, scale: float) -> Iterator[str]:
    """Title, a row for each rank, and the axis of time."""
    left, rows = MARGIN + LABEL, y + TITLE
    heading = escape(f"{title}: {100 * timeline.bubble_fraction:.1f}% bubble")
    yield f'<text x="{MARGIN}" y="{y + 14}" font-size="{FONT + 3}" font-weight="bold">{heading}</text>'
    for rank in range(timeline.ranks):
        middle = rows + rank * ROW + ROW / 2
        yield f'<text x="{left - 8}" y="{middle + 4:g}" text-anchor="end">rank {rank}</text>'
        yield (
            f'<rect x="{left}" y="{middle - BOX / 2:g}" width="{scale * timeline.makespan:.1f}" height="{BOX}" '
            f'fill="{IDLE}"/>'
        )
    digits = len(str(max(span.microbatch for span in timeline.spans)))
    for span in timeline.spans:
        chunk, top = span.stage // timeline.ranks, rows + span.rank * ROW + (ROW - BOX) / 2
        yield from _action(span, chunk, digits, left, top, scale)
    yield from _axis(timeline.makespan, left, rows + timeline.ranks * ROW + 4, scale)


def _action(span: Span, chunk: int, digits: int, left: float, y: float, scale: float) -> Iterator[str]:
    """A box, with the number of its micro-batch if as many digits fit; pointing at it shows the rest."""
    x, width = left + scale * span.start, scale * (span.end - span.start)
    what = f"{KINDS[span.kind]} of stage {span.stage}, micro-batch {span.microbatch}: {span.start:g} to {span.end:g}"
    border = ' stroke="#FFFFFF"' if width > 4 else ""
    yield (
        f'<rect class="action" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{BOX}" '
        f'fill="{_shade(COLOURS[span.kind], chunk)}"{border}><title>{what}</title></rect>'
    )
    if DIGIT * digits + 2 <= width:
        yield f'<text x="{x + width / 2:.2f}" y="{y + BOX / 2 + 4:g}" text-anchor="middle">{span.microbatch}</text>'


def _shade(colour: str, chunk: int) -> str:
    """The colour of the first model chunk of a rank, lighter for each later one."""
    kept = max(0.55**chunk, 0.15)
    parts = [round(255 - kept * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02X}" for part in parts)


def _axis(makespan: float, left: float, y: float, scale: float) -> Iterator[str]:
    """Ticks at round times, at least some 50 pixels apart."""
    step = next(s for power in range(-9, 99) for s in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if s * scale > 50)
    yield f'<path d="M{left} {y:g}H{left + scale * makespan:.1f}" stroke="{INK}"/>'
    for tick in range(int(makespan / step + 1e-9) + 1):
        x = left + scale * tick * step
        yield f'<path d="M{x:.1f} {y:g}v4" stroke="{INK}"/>'
        yield f'<text x="{x:.1f}" y="{y + 16:g}" text-anchor="middle">{tick * step:g}</text>'


def _legend(kinds: Sequence[str], chunks: int, y: float) -> Iterator[str]:
    """A line for each kind of action, in the shades of the model chunks, and one for numbers and time."""
    after = f"; from left to right the {chunks} model chunks of a rank" if chunks > 1 else ""
    for kind in kinds:
        for chunk in range(chunks):
            fill = _shade(COLOURS[kind], chunk)
            yield f'<rect x="{MARGIN + 15 * chunk}" y="{y:g}" width="14" height="14" fill="{fill}"/>'
        yield f'<text x="{MARGIN + 15 * chunks + 5}" y="{y + 11:g}">{KINDS[kind]}{after}</text>'
        y, after = y + LINE, ""
    yield f'<text x="{MARGIN}" y="{y + 11:g}">{UNIT}</text>'
