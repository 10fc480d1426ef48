"""The memory of a training step against what --dry-run estimates, on this machine.

OMP_NUM_THREADS=1 python -m benchmarks.memory --output benchmarks/results/memory

Each row is a run of one process: building the model, two steps, and the most that was allocated at one time meanwhile,
by torch's profiler on a CPU and by its allocator on a GPU. All flags of pretrain_gpt.py change all rows.
"""

import argparse
import dataclasses
import gc
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.contenders import build_megatron_lite
from benchmarks.instruments import peak_allocated
from benchmarks.measure import configuration, synthetic_batches
from megatron_lite.arguments import RunConfig
from megatron_lite.dry_run import estimated_memory
from megatron_lite.dry_run_memory import Memory
from megatron_lite.training.initialize import distributed_environment, training_device

SHAPE = (
    *("--num-layers", "8", "--hidden-size", "256", "--num-attention-heads", "8", "--seq-length", "512"),
    *("--swiglu", "--ffn-hidden-size", "768", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--vocab-size", "8192", "--micro-batch-size", "8"),
)
EXPERTS = ("--num-experts", "8", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "384", "--moe-grouped-gemm")
MODELS = {"dense": ((), "mlp"), "8 experts, 2 active": (EXPERTS, "moe_act")}
"""Flags of each, and what of a layer is worth recomputing."""
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
OFFLOADED = ("--cpu-offloading-num-layers", "6")
HOST_MOMENTS = ("--optimizer-cpu-offload",)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model: a key of MODELS.
        dtype: of the computation.
        way: a key of ways().
        estimate: of the dry run.
        peak_bytes: what was measured.
    """

    model: str
    dtype: str
    way: str
    estimate: Memory
    peak_bytes: int


def ways(module: str, on_gpu: bool) -> dict[str, tuple[str, ...]]:
    """What can be done with activations, and moments; on a CPU the host is where they are."""
    found = {"kept": (), f"{module} recomputed": (*SELECTIVE, module), "layers recomputed": FULL}
    on_host = {"6 of 8 layers on the host": OFFLOADED, "kept, moments on the host": HOST_MOMENTS}
    return found | on_host if on_gpu else found


def measured_peak(config: RunConfig) -> int:
    """Most bytes allocated on the device at one time while a run of two steps is built and trains."""
    with distributed_environment(config) as device:
        batches = synthetic_batches(config, device)

        def run() -> None:
            step = build_megatron_lite(config, device)
            for batch in batches[:2]:
                step(batch)

        gc.collect()
        if device.type != "cuda":
            return peak_allocated(run)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before


def table(rows: Sequence[Row]) -> str:
    """Markdown, in MiB."""
    mib = 1 << 20
    lines = [
        "| model | dtype | activations | weights, gradients, state | and activations | estimate | measured | ratio |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        total, kept = row.estimate.total, row.estimate.activations
        lines.append(
            f"| {row.model} | {row.dtype} | {row.way} | {(total - kept) / mib:.1f} | {kept / mib:.1f} "
            f"| {total / mib:.1f} | {row.peak_bytes / mib:.1f} | {row.peak_bytes / total:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="PATH", help="Write PATH.json and PATH.md too.")
    options, flags = parser.parse_known_args(argv)
    device = training_device()
    rows = []
    for model, (shape, module) in MODELS.items():
        for dtype, precision in {"float32": (), "bfloat16": ("--bf16",)}.items():
            for way, how in ways(module, device.type == "cuda").items():
                print(f"{model}, {dtype}, {way}", file=sys.stderr, flush=True)
                config = configuration([*SHAPE, *shape, *precision, *how, *flags])
                rows.append(Row(model, dtype, way, estimated_memory(config), measured_peak(config)))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    text = (
        f"One process, {where}, torch {torch.__version__}; `{' '.join((*SHAPE, *flags))}`, experts "
        f"`{' '.join(EXPERTS)}`. Most memory allocated at one time while the model is built and trained for two steps, "
        f"beside the estimate of `--dry-run`, in MiB.\n\n{table(rows)}\n"
    )
    print(text)
    if options.output:
        Path(f"{options.output}.md").write_text(text)
        Path(f"{options.output}.json").write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
