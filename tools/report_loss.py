#!/usr/bin/env python3
"""Draw the losses of one run or several, and say how they compare with guessing by token frequency alone.

tools/report_loss.py --metrics metrics.jsonl --data-path corpus_text_document --output loss.png
tools/report_loss.py --metrics a/metrics.jsonl b/metrics.jsonl --labels "lr 1e-4" "lr 1e-5" --output compared.png
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.datasets.indexed_dataset import IndexedDataset

Entry = dict[str, float]


@dataclass
class Losses:
    """The training and the validation entries of a metrics file, in order, under a name."""

    label: str
    training: list[Entry]
    validation: list[Entry]


def read_metrics(path: Path, label: str) -> Losses:
    """The losses in a metrics file; null, which stands for what was not finite, becomes NaN.

    Raises:
        SystemExit: it cannot be read, or holds none yet.
    """
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1] or text  # of a run that is writing, the last line may be there in part
        lines = [json.loads(line) for line in whole.splitlines() if line.strip()]
        entries = [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"{path} cannot be read as a file of --metrics-jsonl: {error}") from error
    training = [entry for entry in entries if "lm_loss" in entry]
    if not training:
        raise SystemExit(f"{path} holds no training iterations yet.")
    return Losses(label, training, [entry for entry in entries if "validation_loss" in entry])


def unigram_entropy(prefix: str) -> float:
    """Entropy in nats of the corpus' token frequencies: the loss of a model that knows them and nothing else."""
    dataset = IndexedDataset(prefix)
    counts = np.zeros(1, dtype=np.int64)
    for index in range(len(dataset.sequence_lengths)):
        document = np.bincount(dataset.get(index))
        if len(document) > len(counts):
            counts = np.concatenate([counts, np.zeros(len(document) - len(counts), dtype=np.int64)])
        counts[: len(document)] += document
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def draw(runs: Sequence[Losses], entropy: float | None, output: Path) -> None:
    """Training and held-out losses over iterations, each of several runs in a colour; the unigram entropy as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    for number, run in enumerate(runs):
        several = len(runs) > 1
        name = f"{run.label}, " if several else ""
        iterations, losses = [e["iteration"] for e in run.training], [e["lm_loss"] for e in run.training]
        faint = 0.5 if several and run.validation else 1.0
        axes.plot(iterations, losses, color=f"C{number}", alpha=faint, lw=1, label=f"{name}training")
        if run.validation:
            held_out = {e["iteration"]: e["validation_loss"] for e in run.validation}
            color = f"C{number if several else number + 1}"
            axes.plot(list(held_out), list(held_out.values()), "o-", color=color, ms=4, label=f"{name}held out")
    if entropy is not None:
        axes.axhline(entropy, ls="--", lw=1, color="gray", label=f"unigram entropy {entropy:.2f}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def perplexity(loss: float) -> float:
    """e to the loss, infinite where that is no float."""
    return math.inf if loss > 700 else math.exp(loss)


def describe(run: Losses, entropy: float | None) -> None:
    """Print where a run began and ended."""
    first, last = run.training[0], run.training[-1]
    print(f"training loss: {first['lm_loss']:.3f} at iteration {first['iteration']}, {last['lm_loss']:.3f} at the end")
    if not run.validation:
        return
    held_out = run.validation[-1]["validation_loss"]
    print(f"held-out loss: {held_out:.3f} (perplexity {perplexity(held_out):.1f})")
    if entropy is not None:
        print(
            f"unigram entropy of the corpus: {entropy:.3f} (perplexity {perplexity(entropy):.1f}); "
            f"the model is {entropy - held_out:.2f} nats better than guessing by frequency"
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--metrics", type=Path, required=True, nargs="+", metavar="FILE", help="Files given to --metrics-jsonl."
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="What to call each of several; default its file and folder."
    )
    parser.add_argument("--data-path", metavar="PREFIX", help="Prefix of the .bin/.idx files, for the unigram entropy.")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), metavar="FILE", help="The picture to write.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison and write the picture."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    labels = arguments.labels or [str(path.with_suffix("")) for path in arguments.metrics]
    if len(labels) != len(arguments.metrics):
        parser.error(f"--labels names {len(labels)}, but there are {len(arguments.metrics)} --metrics: one for each.")
    runs = [read_metrics(path, label) for path, label in zip(arguments.metrics, labels, strict=True)]
    try:
        entropy = unigram_entropy(arguments.data_path) if arguments.data_path else None
        draw(runs, entropy, arguments.output)
    except (OSError, ValueError) as error:  # of the data, or of the picture's format
        raise SystemExit(f"error: {error}") from error
    for run in runs:
        if len(runs) > 1:
            print(f"{run.label}:")
        describe(run, entropy)
    print(f"picture: {arguments.output}")


if __name__ == "__main__":
    main()
