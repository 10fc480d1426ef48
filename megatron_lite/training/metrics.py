"""Numbers of each iteration, kept on the device until somebody wants to read them.

Reading a scalar from a GPU makes the host wait. So the loop hands its device scalars to a `MetricsBuffer`, and the
buffer brings a whole log interval to the host in one copy.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class IterationRecord:
    """Everything known of one iteration, as Python numbers.

    Attributes:
        iteration: 1 for the first.
        consumed_samples: sequences trained on, this iteration included.
        elapsed_ms: wall time of the iteration in milliseconds.
        tokens: tokens in its global batch.
        values: named results: lm_loss, mtp_1_loss, ..., grad_norm, learning_rate, loss_scale, skipped, nan, ...
        experts: statistics of the experts over the log interval that this iteration ends; empty otherwise.
    """

    iteration: int
    consumed_samples: int
    global_batch_size: int
    elapsed_ms: float
    tokens: int
    values: dict[str, float]
    experts: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One flat dictionary, at full precision."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "global_batch_size": self.global_batch_size,
            **self.values,
            **self.experts,
            "elapsed_ms": self.elapsed_ms,
            "tokens_per_second": self.tokens / self.elapsed_ms * 1000.0,
        }


@dataclass
class MetricsBuffer:
    """Collects iterations; `flush` moves them to the host in one copy.

    On a GPU the host runs ahead of the device, so the time of a single iteration cannot be seen without waiting;
    there each record carries the mean of its interval.
    """

    device: torch.device
    _pending: list[tuple[IterationRecord, dict[str, torch.Tensor]]] = field(default_factory=list)
    _last: float = field(default_factory=time.perf_counter)

    def restart_clock(self) -> None:
        """Forget the time since the last iteration: it went to something that is not training."""
        self._last = time.perf_counter()

    def add(self, record: IterationRecord, scalars: dict[str, torch.Tensor]) -> None:
        """Keep one iteration; `scalars` are device tensors of one element, not read here."""
        now = time.perf_counter()
        record.elapsed_ms = (now - self._last) * 1000.0
        self._last = now
        self._pending.append((record, scalars))

    def flush(self) -> list[IterationRecord]:
        """All iterations since the last flush, oldest first. Waits for the device once."""
        if not self._pending:
            return []
        flat = torch.stack([tensor.detach().double() for _, scalars in self._pending for tensor in scalars.values()])
        numbers = iter(flat.tolist())
        records = []
        for record, scalars in self._pending:
            record.values.update({name: next(numbers) for name in scalars})
            records.append(record)
        if self.device.type != "cpu":
            now = time.perf_counter()
            mean = (sum(record.elapsed_ms for record in records) + (now - self._last) * 1000.0) / len(records)
            self._last = now
            for record in records:
                record.elapsed_ms = mean
        self._pending = []
        return records
