"""Compare two trainings: metrics of every iteration, and all tensors of the last checkpoint, byte for byte.

compare.py RUN RUN
"""

import json
import sys
from pathlib import Path

TIMES = ("elapsed_ms", "throughput", "tokens_per_second")


def metrics(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def last_checkpoint(run: Path) -> dict[str, object]:
    """Its tensors, as the bytes of their files, and its other contents, without the paths in the settings."""
    number = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    folder = run / "checkpoints" / f"iter_{number:07d}"
    common = json.loads((folder / "common.json").read_text())
    del common["config"]
    return {"common.json": common, **{path.name: path.read_bytes() for path in folder.glob("*.distcp")}}


def main() -> None:
    """Exit with a message that names the first difference."""
    one, other = Path(sys.argv[1]), Path(sys.argv[2])
    for first, second in zip(metrics(one), metrics(other), strict=False):
        if first != second:
            sys.exit(f"{first} in {one}, {second} in {other}")
    lengths = [len(metrics(run)) for run in (one, other)]
    if lengths[0] != lengths[1]:
        sys.exit(f"{lengths[0]} lines of metrics in {one}, {lengths[1]} in {other}")
    weights = [last_checkpoint(run) for run in (one, other)]
    names = sorted(weights[0].keys() | weights[1].keys())
    different = [name for name in names if weights[0].get(name) != weights[1].get(name)]
    if different:
        sys.exit(f"last checkpoints of {one} and {other} differ in {', '.join(different)}")


if __name__ == "__main__":
    main()
