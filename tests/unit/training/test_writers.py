"""Metrics files survive kills and resumes; the log line has the fields that parsers look for."""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_lite.training.metrics import IterationRecord, MetricsBuffer
from megatron_lite.training.throughput import Throughput
from megatron_lite.training.writers import JsonLines, Writers, console_line, duration
from megatron_lite.training_config import LoggerConfig


def record(iteration: int, loss: float, **values: float) -> IterationRecord:
    """An iteration with the usual values."""
    usual = {"lm_loss": loss, "learning_rate": 1e-3, "loss_scale": 1.0, "grad_norm": 0.5, "skipped": 0.0, "nan": 0.0}
    return IterationRecord(iteration, iteration * 8, 8, 250.0, 8 * 32, {**usual, **values})


def test_resume_drops_what_will_be_run_again(tmp_path):
    """A run killed at iteration 5 and resumed from the checkpoint of iteration 3 has each iteration once."""
    path = str(tmp_path / "folder" / "metrics.jsonl")
    first = JsonLines(path, 1)
    first.write([record(n, 1.0).as_json() for n in range(1, 6)])
    first.write([{"iteration": 3, "validation_loss": 1.5, "final": True}])  # a shorter run ended here
    first.close()
    with open(path, "a") as file:
        file.write('{"iteration": 6, "lm_lo')  # the kill came in the middle of a line
    second = JsonLines(path, 4)
    second.write([record(n, 2.0).as_json() for n in range(4, 8)])
    second.close()
    entries = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [(e["iteration"], e["lm_loss"]) for e in entries] == [(n, 1.0 if n < 4 else 2.0) for n in range(1, 8)]


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN and no Infinity; such a line survives a restart. Mutation: write it as Python does."""
    path = str(tmp_path / "metrics.jsonl")
    first = JsonLines(path, 1)
    first.write([record(1, 1.0).as_json(), record(2, math.nan, grad_norm=math.inf, num_zeros=-math.inf).as_json()])
    first.close()
    second = JsonLines(path, 3)
    second.write([record(3, 2.0).as_json()])
    second.close()
    text = Path(path).read_text()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [entry["lm_loss"] for entry in entries] == [1.0, None, 2.0]
    assert (entries[1]["grad_norm"], entries[1]["num_zeros"], entries[1]["elapsed_ms"]) == (None, None, 250.0)


def test_an_evaluation_that_gave_no_number(tmp_path):
    """Its perplexity is no number either. Mutation: the smaller of 20 and the loss, in this order, is 20."""
    path = str(tmp_path / "metrics.jsonl")
    writers = Writers(LoggerConfig(metrics_jsonl=path), True, 1, {})
    writers.validation(4, 32, math.nan)
    writers.close()
    (entry,) = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert (entry["validation_loss"], entry["validation_ppl"]) == (None, None)


def test_a_new_run_starts_a_new_file(tmp_path):
    """Metrics of an earlier run in the same file would be mistaken for this one's."""
    path = str(tmp_path / "metrics.jsonl")
    for _ in range(2):
        writer = JsonLines(path, 1)
        writer.write([record(1, 1.0).as_json()])
        writer.close()
    assert len(Path(path).read_text().splitlines()) == 1


def test_console_line_is_the_mean_of_its_interval():
    """Loss and time are means; iterations that were not numbers count apart and do not spoil the mean."""
    records = [record(1, 4.0), record(2, float("nan"), nan=1.0, skipped=1.0), record(3, 2.0)]
    line = console_line(records, 10, Throughput(1e9, 32, 2, peak=None))
    assert " iteration        3/      10 | consumed samples:           24 | " in line
    assert "elapsed time per iteration (ms): 250.0 | throughput per GPU (TFLOP/s/GPU): 0.0160 | " in line
    assert "tokens per second: 1024 | " in line
    assert "learning rate: 1.000000E-03 | global batch size:     8 | lm loss: 3.000000E+00 | loss scale: 1.0 | " in line
    assert "number of skipped iterations:   1 | number of nan iterations:   1 | time left: 0:00:02 |" in line


def test_time_left_is_told_from_the_second_iteration_on():
    """The first one holds what is done once."""
    assert "time left" not in console_line([record(1, 4.0)], 10, None)
    assert "time left: 0:00:02 |" in console_line([record(2, 4.0)], 10, None)


def test_metrics_buffer_reads_all_at_once():
    """Scalars come back in order and under their names, and the buffer is empty afterwards."""
    buffer = MetricsBuffer(torch.device("cpu"))
    for n in (1, 2):
        empty = IterationRecord(n, n, 1, 0.0, 1, {})
        buffer.add(empty, {"lm_loss": torch.tensor(float(n)), "grad_norm": torch.tensor(n * 10.0)})
    records = buffer.flush()
    assert [(r.values["lm_loss"], r.values["grad_norm"]) for r in records] == [(1.0, 10.0), (2.0, 20.0)]
    assert all(r.elapsed_ms > 0 for r in records)
    assert buffer.flush() == []


def test_duration():
    """Seconds as people read them."""
    assert duration(3661.4) == "1:01:01"
    assert duration(-1) == "0:00:00"
