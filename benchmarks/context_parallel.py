"""Memory, communication and time of one transformer layer at several context parallel sizes, measured on this machine.

python -m benchmarks.context_parallel --lengths 8192 16384 --output benchmarks/results/context_parallel

Each row is one world of processes joined by gloo. Memory is the most that was allocated at one time during forward
and backward of the layer, beyond weights and input (torch's profiler sees each allocation); bytes are counted at the
collectives. The seconds are processor seconds of one rank, to compare the kinds with each other.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.instruments import count_sent_bytes, peak_allocated
from megatron_lite import parallel_state
from megatron_lite.tensor_parallel.parameters import initialize_parameters
from megatron_lite.transformer.rope import RotaryEmbedding
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer

HIDDEN, HEADS, GROUPS = 128, 8, 2  # four queries to a key, as in Llama 3
KINDS = {1: ("p2p",), 2: ("p2p", "all_gather", "a2a"), 4: ("p2p", "all_gather", "a2a", "a2a+p2p")}


@dataclass(frozen=True)
class Row:
    """One measurement, of rank 0.

    Attributes:
        cp: context parallel size.
        kind: cp_comm_type.
        length: tokens of the whole sequence; the micro-batch is 1.
        peak_bytes: most memory allocated at one time in forward and backward.
        sent_bytes: bytes sent to other ranks by the layer, forward and backward.
        cpu_seconds: processor time.
    """

    cp: int
    kind: str
    length: int
    peak_bytes: int
    sent_bytes: tuple[int, int]
    cpu_seconds: float


def measure_layer(rank: int, world_size: int, kind: str, length: int, dtype: torch.dtype = torch.bfloat16) -> Row:
    """Forward and backward of one layer on this rank's part of a sequence of `length` tokens."""
    hierarchy = [2, world_size // 2] if kind == "a2a+p2p" else None
    parallel_state.initialize_model_parallel(
        context_parallel_size=world_size, hierarchical_context_parallel_sizes=hierarchy
    )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        bf16=dtype == torch.bfloat16,
        context_parallel_size=world_size,
        hierarchical_context_parallel_sizes=hierarchy,
        cp_comm_type=kind,
    )
    layer = TransformerLayer(config)
    initialize_parameters(layer, seed=1)
    layer.to(dtype)
    positions = torch.arange(length // world_size).unsqueeze(0)  # which ones does not matter here
    tables = RotaryEmbedding(HIDDEN // HEADS)(positions, dtype)
    hidden = torch.randn(length // world_size, 1, HIDDEN, dtype=dtype, requires_grad=True)
    sent: list[int] = []

    def forward_backward() -> None:
        with count_sent_bytes() as forward:
            out = layer(hidden, rotary_pos_emb=tables)
        with count_sent_bytes() as backward:
            out.sum().backward()
        sent.extend((forward.total(), backward.total()))

    start = time.process_time()
    peak = peak_allocated(forward_backward)
    return Row(world_size, kind, length, peak, (sent[0], sent[1]), time.process_time() - start)


def _worker(rank: int, world_size: int, kind: str, length: int, meeting: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    row = measure_layer(rank, world_size, kind, length)
    if rank == 0:
        Path(path).write_text(json.dumps(dataclasses.asdict(row)))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def run_row(world_size: int, kind: str, length: int) -> Row:
    """measure_layer in a world of its own; what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        arguments = (world_size, kind, length, str(Path(folder) / "meeting"), str(path))
        multiprocessing.spawn(_worker, arguments, nprocs=world_size)
        values = json.loads(path.read_text())
    return Row(**{**values, "sent_bytes": tuple(values["sent_bytes"])})


def table(rows: Sequence[Row]) -> str:
    """Markdown, with each row's memory relative to one rank's at the same length."""
    alone = {row.length: row.peak_bytes for row in rows if row.cp == 1}
    lines = [
        "| tokens | cp | cp_comm_type | peak MiB | of cp 1 | MiB sent forward | backward | CPU seconds |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    mib = 1 << 20
    for row in rows:
        share = f"1/{alone[row.length] / row.peak_bytes:.2f}" if row.length in alone else ""
        forward, backward = row.sent_bytes
        lines.append(
            f"| {row.length:,} | {row.cp} | {row.kind if row.cp > 1 else ''} | {row.peak_bytes / mib:.1f} | {share} "
            f"| {forward / mib:.2f} | {backward / mib:.2f} | {row.cpu_seconds:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384, 32768, 65536], help="Tokens.")
    parser.add_argument("--output", metavar="PATH", help="Write PATH.json and PATH.md too.")
    options = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cases = [(length, cp, kind) for length in options.lengths for cp, kinds in KINDS.items() for kind in kinds]
    rows = []
    for number, (length, cp, kind) in enumerate(cases, start=1):
        print(f"{number} of {len(cases)}: {length:,} tokens, cp {cp}, {kind}", file=sys.stderr, flush=True)
        rows.append(run_row(cp, kind, length))
    heading = (
        f"One transformer layer, hidden {HIDDEN}, {HEADS} heads, {GROUPS} query groups, SwiGLU, bf16, micro-batch 1; "
        f"one thread a rank, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo."
    )
    text = f"{heading}\n\n{table(rows)}\n"
    print(text)
    if options.output:
        Path(f"{options.output}.md").write_text(text)
        Path(f"{options.output}.json").write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
