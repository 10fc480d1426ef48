"""Speed in the units the field compares: TFLOP/s per device, tokens per second, MFU."""

from dataclasses import dataclass

import torch

# Dense bf16 tensor-core peaks by datasheet, TFLOP/s. The first name that is part of the device's name counts.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("V100", 125.0),
)


def peak_tflops(device: torch.device) -> float | None:
    """The device's bf16 peak in TFLOP/s, in fp8 runs too, or None where it is not known (a CPU, say)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


@dataclass(frozen=True)
class Throughput:
    """Turns the time of a step into rates.

    Attributes:
        flops_per_sample: floating-point operations of forward and backward for one sequence (models/gpt/flops.py).
        tokens_per_sample: sequence length.
        world_size: devices that share the work.
        peak: TFLOP/s of one device, or None if unknown.
    """

    flops_per_sample: float
    tokens_per_sample: int
    world_size: int
    peak: float | None

    def tflops(self, samples: int, seconds: float) -> float:
        """TFLOP/s per device for a step over `samples` sequences."""
        return samples * self.flops_per_sample / seconds / self.world_size / 1e12

    def describe(self, samples: int, seconds: float) -> list[str]:
        """The parts of the log line: TFLOP/s, tokens per second and, where the peak is known, MFU."""
        tflops = self.tflops(samples, seconds)
        parts = [
            f"throughput per GPU (TFLOP/s/GPU): {tflops:.1f}"
            if tflops >= 1
            else f"throughput per GPU (TFLOP/s/GPU): {tflops:.4f}",
            f"tokens per second: {samples * self.tokens_per_sample / seconds:.0f}",
        ]
        if self.peak is not None:
            parts.append(f"MFU: {100 * tflops / self.peak:.1f}%")
        return parts
