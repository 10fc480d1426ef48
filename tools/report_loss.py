#!/usr/bin/env python3
"""Draw the loss of a run and say how it compares with guessing by token frequency alone.

tools/report_loss.py --metrics metrics.jsonl --data-path corpus_text_document --output loss.png
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from megatron_lite.datasets.indexed_dataset import IndexedDataset


def read_metrics(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The training and the validation entries of a metrics file, in order; null, what was not finite, becomes NaN."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    entries = [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
    training = [entry for entry in entries if "lm_loss" in entry]
    validation = [entry for entry in entries if "validation_loss" in entry]
    return training, validation


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


def draw(
    training: list[dict[str, float]], validation: list[dict[str, float]], entropy: float | None, output: Path
) -> None:
    """Training and held-out loss over iterations, and the unigram entropy as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    axes.plot([e["iteration"] for e in training], [e["lm_loss"] for e in training], lw=1, label="training")
    if validation:
        held_out = {e["iteration"]: e["validation_loss"] for e in validation}
        axes.plot(list(held_out), list(held_out.values()), "o-", ms=4, label="held out")
    if entropy is not None:
        axes.axhline(entropy, ls="--", lw=1, color="gray", label=f"unigram entropy {entropy:.2f}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(output)


def main() -> None:
    """Print the comparison and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, required=True, help="the file given to --metrics-jsonl")
    parser.add_argument("--data-path", help="prefix of the .bin/.idx files, for the unigram entropy")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="the picture to write")
    arguments = parser.parse_args()

    training, validation = read_metrics(arguments.metrics)
    if not training:
        raise SystemExit(f"{arguments.metrics} holds no training iterations yet.")
    entropy = unigram_entropy(arguments.data_path) if arguments.data_path else None
    draw(training, validation, entropy, arguments.output)

    print(f"training loss: {training[0]['lm_loss']:.3f} at iteration 1, {training[-1]['lm_loss']:.3f} at the end")
    if validation:
        held_out = validation[-1]["validation_loss"]
        print(f"held-out loss: {held_out:.3f} (perplexity {math.exp(held_out):.1f})")
        if entropy is not None:
            print(
                f"unigram entropy of the corpus: {entropy:.3f} (perplexity {math.exp(entropy):.1f}); "
                f"the model is {entropy - held_out:.2f} nats better than guessing by frequency"
            )
    print(f"picture: {arguments.output}")


if __name__ == "__main__":
    main()
