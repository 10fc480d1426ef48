"""Rates and ratios from measured windows, and how they are written down: JSON with every window, Markdown to read."""

import dataclasses
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.breakdown import KINDS, REST
from benchmarks.measure import Measured, Window
from megatron_lite.arguments import RunConfig
from megatron_lite.models.gpt.flops import num_floating_point_operations
from megatron_lite.models.gpt.vocab import padded_vocab_size
from megatron_lite.training.throughput import peak_tflops

FLOPS_FORMULA = (
    "tokens x 6 x (layers x (hidden x (queries + 2 keys) + queries x hidden + 2 or 3 x hidden x ffn + queries x "
    "sequence) + hidden x padded vocabulary)"
)
MFU_MEANING = {
    "cpu": "FLOP per CPU-second / FLOP per CPU-second of a 1024^3 matrix product in the same dtype, best of the run",
    "cuda": "FLOP per second / the bf16 datasheet peak (in float32, or for a device not in throughput.py: / FLOP per "
    "second of an 8192^3 matrix product in the same dtype, the best of the run)",
}
HEADER = (
    "| dtype | mode | loop | tokens per CPU-second | CPU ms a step | tokens/s | MFU | peak MiB | start-up s "
    "| last loss | ratio (lowest to highest round) |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Case:
    """One comparison: the sides measured together, and what a step of theirs is."""

    config: RunConfig
    sides: list[Measured]
    name: str = ""

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.config.global_batch_size * self.config.sequence_length

    @property
    def flops_per_step(self) -> float:
        """Forward and backward of the global batch, by Megatron-LM's convention (models/gpt/flops.py)."""
        gpt, length = self.config.gpt, self.config.sequence_length
        assert gpt.vocab_size is not None, "checked in configuration()"
        padded = gpt.padded_vocab_size or padded_vocab_size(gpt.vocab_size, gpt.make_vocab_size_divisible_by)
        return num_floating_point_operations(self.config.transformer, padded, self.config.global_batch_size, length)

    def rate(self, window: Window, device: str) -> float:
        """What the ratio compares: tokens per CPU-second on a CPU, tokens per second on a GPU."""
        return self.tokens_per_step * window.steps / (window.cpu_seconds if device == "cpu" else window.wall_seconds)


def summarize(case: Case, device: torch.device) -> dict[str, Any]:
    """All numbers of a case as plain values; `ratios` are the first side's rate over each other side's, per round."""
    dtype = case.config.transformer.params_dtype
    peak = _peak([window for measured in case.sides for window in measured.windows], dtype, device)
    sides = []
    for measured in case.sides:
        windows = measured.windows
        rates = [case.rate(window, device.type) for window in windows]
        achieved = median(rates) * case.flops_per_step / case.tokens_per_step
        sides.append(
            {
                **dataclasses.asdict(measured.side),
                "startup_seconds": measured.startup_seconds,
                "tokens_per_cpu_second": median(case.rate(window, "cpu") for window in windows),
                "tokens_per_second": median(case.rate(window, "cuda") for window in windows),
                "cpu_ms_per_step": median(1e3 * window.cpu_seconds / window.steps for window in windows),
                "mfu": achieved / peak,
                "peak_memory_bytes": max(window.peak_memory for window in windows),
                "last_loss": windows[-1].loss,
                "rates": rates,
                "windows": [dataclasses.asdict(window) for window in windows],
                "breakdown_ms": measured.breakdown,
            }
        )
    first = sides[0]["rates"]
    ratios = {
        side["name"]: [ours / theirs for ours, theirs in zip(first, side["rates"], strict=True)] for side in sides[1:]
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "model": case.name,
        "compiled": bool(case.config.training.compile),
        "shape": _shape(case.config),
        "tokens_per_step": case.tokens_per_step,
        "flops_per_step": case.flops_per_step,
        "peak_flops_per_second": peak,
        "sides": sides,
        "ratios": ratios,
    }


def _peak(windows: list[Window], dtype: torch.dtype, device: torch.device) -> float:
    """What a case's rates of operations are divided by: one number for all its sides."""
    datasheet = peak_tflops(device) if dtype == torch.bfloat16 else None
    return max(window.matmul_flops for window in windows) if datasheet is None else datasheet * 1e12


def _shape(config: RunConfig) -> dict[str, Any]:
    layers = config.transformer
    return {
        "num_layers": layers.num_layers,
        "hidden_size": layers.hidden_size,
        "num_attention_heads": layers.num_attention_heads,
        "ffn_hidden_size": layers.ffn_hidden_size,
        "seq_length": config.sequence_length,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.global_batch_size,
        "vocab_size": config.gpt.vocab_size,
        "num_experts": layers.num_moe_experts,
        "moe_router_topk": None if layers.num_moe_experts is None else layers.moe_router_topk,
    }


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "omp_wait_policy": "PASSIVE",
        "load_average": list(os.getloadavg()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _commit() -> str:
    """The commit of the checkout, marked if the code that was measured differs from it."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "megatron_lite", "benchmarks/*.py", "benchmarks/peers")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        values = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        stripped = {key.strip(): value.strip() for key, value in values.items()}
        if "model name" in stripped:
            family = [f"{key} {stripped[key]}" for key in ("cpu family", "model") if key in stripped]
            return f"{stripped['model name']} ({', '.join(family)})"
    return platform.processor() or platform.machine()


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: environment, what was measured, and one table of all cases."""
    about, settings = report["environment"], report["settings"]
    lines = [f"# Training speed, {about['date']}", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in about.items() if value is not None]
    lines += [
        f"- command: `{report['command']}`",
        f"- {settings['rounds']} rounds of {settings['steps']} steps a side, in turns, after {settings['warmup']} "
        "steps of warm-up; medians over rounds",
        f"- ratio: the first loop's {report['compared']} over this loop's, in each round",
        f"- FLOP of a step: {FLOPS_FORMULA}",
        f"- MFU: {report['mfu']}",
    ]
    shape = None
    for case in report["cases"]:
        if case["shape"] != shape:
            shape = case["shape"]
            described = ", ".join(f"{key} {value}" for key, value in shape.items() if value is not None)
            lines += [
                "",
                f"**{case['model']}**: {described}; {case['flops_per_step'] / 1e9:.1f} GFLOP a step",
                "",
                HEADER,
            ]
        lines += rows(case)
    broken_down = [(case, side) for case in report["cases"] for side in case["sides"] if side["breakdown_ms"]]
    if broken_down:
        lines += ["", *_breakdown_table(broken_down)]
    return "\n".join(lines) + "\n"


def _breakdown_table(broken_down: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Milliseconds of one profiled step by kind of operation, largest first."""
    kinds = [*KINDS, REST]
    lines = [
        "Milliseconds of one step under torch's profiler, by kind of operation (which adds to the time of small ones):",
        "",
        f"| model | dtype | mode | loop | {' | '.join(kinds)} |",
        f"|---|---|---|---|{'---:|' * len(kinds)}",
    ]
    for case, side in broken_down:
        cells = " | ".join(f"{side['breakdown_ms'][kind]:,.0f}" for kind in kinds)
        mode = "compiled" if case["compiled"] else "eager"
        lines.append(f"| {case['model']} | {case['dtype']} | {mode} | {side['name']} | {cells} |")
    return lines


def rows(case: dict[str, Any]) -> list[str]:
    """The lines of the table for one comparison."""
    return [_row(case, side) for side in case["sides"]]


def _row(case: dict[str, Any], side: dict[str, Any]) -> str:
    ratios = case["ratios"].get(side["name"])
    spread = f"**{median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else ""
    return (
        f"| {case['dtype']} | {'compiled' if case['compiled'] else 'eager'} | {side['name']} "
        f"| {side['tokens_per_cpu_second']:,.0f} | {side['cpu_ms_per_step']:,.0f} | {side['tokens_per_second']:,.0f} "
        f"| {100 * side['mfu']:.1f}% | {side['peak_memory_bytes'] / 2**20:,.0f} | {side['startup_seconds']:.1f} "
        f"| {side['last_loss']:.4f} | {spread} |"
    )
