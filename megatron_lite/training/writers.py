"""Where metrics go: the console line, a JSON-lines file, TensorBoard, wandb.

Only one rank writes: the last one, which under pipeline parallelism is the one that has the loss.
"""

import datetime
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_lite.errors import ConfigError
from megatron_lite.training.metrics import IterationRecord
from megatron_lite.training.throughput import Throughput
from megatron_lite.training_config import LoggerConfig


def console_line(records: Sequence[IterationRecord], total_iterations: int, throughput: Throughput | None) -> str:
    """Megatron's log line for the interval that ends with the last record; losses are means over the interval.

    Iterations whose update was skipped count in "number of skipped iterations" and not in the mean of the loss.
    `throughput`, when asked for, adds TFLOP/s per GPU, tokens per second and MFU. The line closes with the time left,
    except after the first iteration, most of whose time went to what is done once.
    """
    last = records[-1]
    elapsed_ms = sum(record.elapsed_ms for record in records) / len(records)
    trained = [record for record in records if math.isfinite(record.values["lm_loss"])] or list(records)

    def mean(name: str) -> float:
        return sum(record.values[name] for record in trained) / len(trained)

    skipped = sum(int(record.values["skipped"]) for record in records)
    not_a_number = sum(int(record.values["nan"]) for record in records)

    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
    parts = [
        f" [{now}] iteration {last.iteration:8d}/{total_iterations:8d}",
        f"consumed samples: {last.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {elapsed_ms:.1f}",
    ]
    if throughput is not None:
        parts += throughput.describe(last.global_batch_size, elapsed_ms / 1000.0)
    parts += [
        f"learning rate: {last.values['learning_rate']:.6E}",
        f"global batch size: {last.global_batch_size:5d}",
        f"lm loss: {mean('lm_loss'):.6E}",
        *(f"{tag}: {mean(name):.6E}" for name, tag in mtp_losses(last).items()),
        *describe_experts(last.experts),
        f"loss scale: {last.values['loss_scale']:.1f}",
        f"grad norm: {last.values['grad_norm']:.3f}",
    ]
    if "num_zeros" in last.values:
        parts.append(f"num zeros: {int(last.values['num_zeros'])}")
    if "params_norm" in last.values:
        parts.append(f"params norm: {last.values['params_norm']:.3f}")
    parts += [
        f"number of skipped iterations: {skipped:3d}",
        f"number of nan iterations: {not_a_number:3d}",
    ]
    if last.iteration > 1:
        parts.append(f"time left: {duration((total_iterations - last.iteration) * elapsed_ms / 1000.0)}")
    return " | ".join(parts) + " |"


def mtp_losses(record: IterationRecord) -> dict[str, str]:
    """The names of the losses of multi-token prediction among a record's values, and Megatron's for them."""
    return {name: name.replace("_loss", " loss") for name in record.values if name.startswith("mtp_")}


def describe_experts(experts: dict[str, float]) -> list[str]:
    """Parts of the log line: Megatron's balance losses, mean over layers, and in one part how the load is spread."""
    parts = [f"{name}: {value:.6E}" for name, value in experts.items() if not name.startswith("moe")]
    if "moe_balance" in experts:
        dropped = f", {100 * experts['moe_dropped']:.2f}% dropped" if experts["moe_dropped"] else ""
        parts.append(
            f"experts: fullest / mean {experts['moe_balance']:.2f}, entropy {experts['moe_entropy']:.2f}{dropped}"
        )
    return parts


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(max(seconds, 0.0))))


class JsonLines:
    """One JSON object a line, null for a value that is not finite.

    On resume, lines of iterations that will be run again are dropped first.
    """

    def __init__(self, path: str, first_iteration: int) -> None:
        """Open `path` for appending; keep only what was written before `first_iteration`."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        kept = []
        if first_iteration > 1 and os.path.exists(path):
            with open(path, encoding="utf-8") as old:
                kept = [line for line in old if _iteration_of(line) < first_iteration]
        temporary = f"{path}.tmp"
        with open(temporary, "w", encoding="utf-8") as new:
            new.writelines(kept)
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held until close)

    def write(self, objects: Sequence[dict[str, Any]]) -> None:
        """Append and hand over to the operating system, so that a killed process loses nothing written."""
        self._file.writelines(json.dumps(_finite(item), allow_nan=False) + "\n" for item in objects)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with None, JSON's null, for what is not a number or infinite, which JSON has no words for."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }


def _iteration_of(line: str) -> float:
    """The iteration a line belongs to; a closing evaluation, or a line cut short by a kill, comes after all of them."""
    try:
        entry = json.loads(line)
        return math.inf if entry.get("final") else float(entry["iteration"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return math.inf


class Writers:
    """All destinations of one run. On ranks that do not write, every method does nothing."""

    def __init__(self, config: LoggerConfig, active: bool, first_iteration: int, run_config: dict[str, Any]) -> None:
        """Open what `config` asks for; `first_iteration` is the one about to be trained."""
        self.config = config
        self.active = active
        self._json: JsonLines | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if active and config.metrics_jsonl:
            with _writable("metrics_jsonl", config.metrics_jsonl):
                self._json = JsonLines(config.metrics_jsonl, first_iteration)
        if active and config.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            # No purge_step on resume: it drops points of every tag, and those "vs samples" do not count in iterations.
            with _writable("tensorboard_dir", config.tensorboard_dir):
                self._tensorboard = SummaryWriter(
                    log_dir=config.tensorboard_dir, max_queue=config.tensorboard_queue_size
                )
        if active and config.wandb_project:
            self._wandb = _start_wandb(config, run_config)

    def iterations(self, records: Sequence[IterationRecord], world_size: int) -> None:
        """Write training iterations."""
        if self._json:
            self._json.write([record.as_json() for record in records])
        for record in records:
            if record.iteration % self.config.tensorboard_log_interval == 0:
                self._scalars(self._tags(record, world_size), record.iteration, record.consumed_samples)
            if record.experts:
                self._scalars(record.experts, record.iteration, record.consumed_samples)

    def rewind(self, first_iteration: int) -> None:
        """Forget what the metrics file holds of `first_iteration` and later ones, which are trained again."""
        if self._json and self.config.metrics_jsonl:
            self._json.close()
            self._json = JsonLines(self.config.metrics_jsonl, first_iteration)

    def validation(
        self, iteration: int, consumed_samples: int, loss: float, split: str = "validation", final: bool = False
    ) -> None:
        """Write one evaluation: the mean loss per token over the held-out batches; `final` closes the run."""
        perplexity = math.exp(min(loss, 20.0))  # in this order NaN stays NaN
        if self._json:
            entry = {"iteration": iteration, "consumed_samples": consumed_samples, f"{split}_loss": loss}
            self._json.write([{**entry, f"{split}_ppl": perplexity, **({"final": True} if final else {})}])
        tags = {f"lm loss {split}": loss}
        if self.config.log_validation_ppl_to_tensorboard:
            tags[f"lm loss {split} ppl"] = perplexity
        self._scalars(tags, iteration, consumed_samples)

    def _tags(self, record: IterationRecord, world_size: int) -> dict[str, float]:
        values, config = record.values, self.config
        tags = {
            "learning-rate": values["learning_rate"],
            "batch-size": record.global_batch_size,
            "lm loss": values["lm_loss"],
            **{tag: values[name] for name, tag in mtp_losses(record).items()},
            "grad-norm": values["grad_norm"],
            "iteration-time": record.elapsed_ms / 1000.0,
        }
        if config.log_loss_scale_to_tensorboard:
            tags["loss-scale"] = values["loss_scale"]
        if config.log_world_size_to_tensorboard:
            tags["world-size"] = world_size
        for key in ("num_zeros", "params_norm", "throughput", "mem-allocated-bytes", "mem-reserved-bytes"):
            if key in values:
                tags[key.replace("_", "-")] = values[key]
        return tags

    def _scalars(self, tags: dict[str, float], iteration: int, samples: int) -> None:
        if self._tensorboard:
            for tag, value in tags.items():
                self._tensorboard.add_scalar(tag, value, iteration)
                if ("loss" in tag and not tag.startswith("moe/")) or tag in ("learning-rate", "grad-norm"):
                    self._tensorboard.add_scalar(f"{tag} vs samples", value, samples)
        if self._wandb:
            self._wandb.log(tags, step=iteration)

    def flush(self) -> None:
        """Make what was written visible to readers."""
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self) -> None:
        """Close every destination."""
        if self._json:
            self._json.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


@contextmanager
def _writable(name: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{name} is {path!r}, which cannot be written ({error}): name another place.") from error


def _start_wandb(config: LoggerConfig, run_config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb_project is {config.wandb_project!r}, but the wandb package is not installed: "
            "pip install 'megatron-lite[wandb]', or leave out --wandb-project."
        ) from error
    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_exp_name,
        entity=config.wandb_entity,
        dir=config.wandb_save_dir,
        config=run_config,
    )
