"""The layout matrix as a Markdown table: docs/layout_matrix.md."""

from collections.abc import Mapping
from pathlib import Path

import torch

from tests.parallel.layouts import Layout, transformer_config

TABLE = Path(__file__).resolve().parents[2] / "docs" / "layout_matrix.md"
COLUMNS = {"loss": "loss", "grad_norm": "norm", "gradients": "gradients", "weights": "weights"}


def row_name(layout: Layout) -> str:
    """How the ranks are used, and what distinguishes the model and the run."""
    return f"`{ranks_of(layout)}` {model_of(layout)}".rstrip()


def ranks_of(layout: Layout) -> str:
    """The axes that are on: "tp2 sp overlap cp2(a2a) pp4x2(interleaved) dp2(optim) ep2 etp1"."""
    words = [f"tp{layout.tp}"] * (layout.tp > 1) + ["sp"] * layout.sp + ["overlap"] * layout.overlap
    if layout.cp > 1:
        comm = layout.comm if isinstance(layout.comm, str) else "/".join(layout.comm)
        words.append(f"cp{layout.cp}({comm})")
    if layout.pp > 1:
        config = transformer_config(layout)
        chunks = f"x{config.chunks_per_rank}" if config.chunks_per_rank > 1 else ""
        words.append(f"pp{layout.pp}{chunks}({config.schedule})")
    replicas = f" x{layout.replicas}" if layout.replicas > 1 else ""
    if layout.dp > 1:
        words.append(f"dp{layout.dp}({layout.strategy}{replicas})")
    elif layout.strategy != "no_shard":
        words.append(f"({layout.strategy})")
    words += [f"ep{layout.ep}"] * (layout.ep > 1) + [f"etp{layout.etp}"] * (layout.etp is not None)
    return " ".join(words) or "one rank"


def model_of(layout: Layout) -> str:
    """What differs from a tied GPT with LayerNorm, learned positions and the mean loss per token."""
    words = [f"{layout.accumulation} micro-batches"] * (layout.accumulation > 1)
    words += ["untied"] * (not layout.tied) + [layout.normalization] * (layout.normalization != "LayerNorm")
    words += ["swiglu"] * layout.swiglu + [f"{layout.query_groups} query groups"] * (layout.query_groups != 8)
    words += [layout.positions] * (layout.positions != "learned_absolute")
    words += [f"recompute {layout.recompute}"] * (layout.recompute is not None)
    words += ["mean of means"] * (not layout.per_token_loss) + ["compiled"] * layout.compiled
    words += ["documents"] * layout.documents + ["empty shards"] * layout.hole
    if layout.stages is not None:
        words.append(f"stages {layout.stages.replace('|', '/')}")
    if layout.variant is not None:
        words.append(layout.variant.replace("_", " "))
    if layout.moe is not None:
        words.append(f"experts: {layout.moe}, {layout.dispatcher}")
    return ", ".join(words)


def layout_table(measured: Mapping[Layout, Mapping[str, float]], steps: int) -> str:
    """The page: what is compared, and a row for each layout in the order of `measured`."""
    largest = {column: max(found[column] for found in measured.values()) for column in COLUMNS}
    lines = [
        "# The layout matrix",
        "",
        f"Each of these {len(measured)} layouts trained a small GPT in float64 and was compared with plain torch on",
        "one process: whole logits, torch's own cross entropy, clipping and SGD. The numbers are the largest relative",
        "deviations: of the loss and of the gradient norm of the first step, of any element of any parameter's",
        f"gradient (relative to the largest of that parameter), and of the weights after {steps} clipped steps with",
        "momentum. Tokens went to the same experts in every step, and tied embeddings were equal bit for bit on both",
        "stages. Correct layouts agree to rounding; the defects that `tests/parallel/test_mutations.py` puts back on",
        "purpose show at 1e-6 and far above. (The largest deviations of gradients, around 1e-10, are those of the bias",
        "of the key norm without rotary positions: that gradient is zero in exact arithmetic.)",
        "",
        "*latent* is multi-latent attention (*latent keys*: queries without a latent, values wider than keys),",
        "*further* multi-token prediction of two tokens more, *deepseek* both, *sinks* learned attention sinks with",
        "clamped gated activations, *windows* sinks and sliding windows by turns, *gates* gated attention with layers",
        "without positions and norm weights stored minus one, *off by one* the softmax of that name. With *overlap*",
        "ranks multiply parts of the sequence while others travel (`--tp-comm-overlap`).",
        "",
        f"Written by `scripts/test.sh tests/parallel/test_layout_matrix.py --full-matrix --layout-table "
        f"docs/layout_matrix.md` with torch {torch.__version__.split('+')[0]}. By default a part of the matrix runs.",
        "",
        f"Largest: {', '.join(f'{name} {largest[column]:.0e}' for column, name in COLUMNS.items())}.",
        "",
        "| layout | ranks | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for layout, found in measured.items():
        numbers = " | ".join(f"{found[column]:.0e}" if found[column] else "0" for column in COLUMNS)
        lines.append(f"| {row_name(layout)} | {layout.world_size} | {numbers} |")
    return "\n".join(lines) + "\n"
