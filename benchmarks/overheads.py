"""What parallelism costs where there is nothing to share: FSDP around one rank, and the dispatch of tokens to experts.

OMP_NUM_THREADS=1 python -m benchmarks.overheads

Each is measured in turns with the bare computation, on one process; on a CPU in processor time. Tensor parallelism is
measured by tools/benchmark.py --against "--nproc-per-node 2 --tensor-model-parallel-size 2". Further flags are
pretrain_gpt.py's and change the models.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.contenders import Step, model_chunks, step_of
from benchmarks.measure import configuration, synthetic_batches
from benchmarks.pipeline import write
from benchmarks.report import environment
from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.errors import ConfigError, exit_with
from megatron_lite.optimizer import get_megatron_optimizer
from megatron_lite.pipeline_parallel import get_forward_backward_func
from megatron_lite.training.initialize import distributed_environment, keep_freed_memory
from megatron_lite.transformer.moe.moe_layer import MoELayer

CONFIGS = Path(__file__).parent / "configs"
DENSE, EXPERTS = str(CONFIGS / "gpt_cpu.yaml"), str(CONFIGS / "moe_cpu.yaml")
Part = Callable[[], object]


def wrapped_step(config: RunConfig, device: torch.device, wrap: bool) -> Step:
    """A training step, its layers and its root each a unit of FSDP2 over one rank, or as they are."""
    (model,) = model_chunks(config, device)
    if wrap:
        mesh = parallel_state.get_dense_mesh()["dp_shard"]
        policy = MixedPrecisionPolicy(
            param_dtype=config.transformer.params_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for layer in (module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = get_megatron_optimizer(config.optimizer, model)
    return step_of(config, [model], optimizer, get_forward_backward_func(config.transformer))


def parts_of_fsdp(flags: Sequence[str]) -> tuple[RunConfig, dict[str, Callable[[torch.device], Part]]]:
    """A step with and without FSDP2."""
    config = configuration(["--config", DENSE, *flags])

    def step(device: torch.device, wrap: bool) -> Part:
        batches, run = synthetic_batches(config, device), wrapped_step(config, device, wrap)
        return lambda: run(batches[0])

    return config, {
        "step": lambda device: step(device, wrap=False),
        "step, each layer and the rest wrapped by fully_shard": lambda device: step(device, wrap=True),
    }


def parts_of_experts(flags: Sequence[str]) -> tuple[RunConfig, dict[str, Callable[[torch.device], Part]]]:
    """Forward and backward of one layer of experts, and of what it is made of."""
    config = configuration(["--config", EXPERTS, *flags])

    def inputs(device: torch.device) -> tuple[MoELayer, Tensor]:
        (model,) = model_chunks(config, device)
        layer = next(module for module in model.modules() if isinstance(module, MoELayer))
        size = (config.sequence_length, config.training.micro_batch_size or 1, config.transformer.hidden_size)
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(size, generator=generator).to(device, config.transformer.params_dtype)
        return layer, hidden.requires_grad_()

    def whole(device: torch.device) -> Part:
        layer, hidden = inputs(device)
        grad = torch.ones_like(hidden)
        return lambda: layer(hidden).backward(grad)

    def dispatched(layer: MoELayer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        probs, indices = layer.router(hidden)
        flat = (hidden.flatten(0, 1), probs.flatten(0, 1), indices.flatten(0, 1))
        return layer.token_dispatcher.dispatch(*flat)

    def experts(device: torch.device) -> Part:
        layer, hidden = inputs(device)
        rows, probs, counts, _ = dispatched(layer, hidden)
        rows, probs = rows.detach().requires_grad_(), probs.detach().requires_grad_()
        grad = torch.ones_like(rows)
        return lambda: layer.experts.forward_dispatched(rows, probs, counts).backward(grad)

    def router(device: torch.device) -> Part:
        layer, hidden = inputs(device)
        return lambda: layer.router(hidden)[0].sum().backward()

    def dispatch(device: torch.device) -> Part:
        layer, hidden = inputs(device)
        probs, indices = layer.router(hidden)
        probs, indices = probs.detach().flatten(0, 1).requires_grad_(), indices.flatten(0, 1)

        def there_and_back() -> None:
            rows, row_probs, _, state = layer.token_dispatcher.dispatch(hidden.flatten(0, 1), probs, indices)
            (layer.token_dispatcher.combine(rows, state).sum() + row_probs.sum()).backward()

        return there_and_back

    return config, {
        "layer of experts": whole,
        "its experts on rows in their order": experts,
        "its router": router,
        "its dispatch and combination": dispatch,
    }


def in_turns(parts: dict[str, Part], rounds: int, repetitions: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each part in each round, after one that does not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, part in parts.items():
            part()
            _finish(device)
            started = clock()
            for _ in range(repetitions):
                part()
            _finish(device)
            if number:
                found[name].append(1e3 * (clock() - started) / repetitions)
    return found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(flags: Sequence[str], rounds: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """dtype -> part -> milliseconds of each round."""
    found: dict[str, dict[str, list[float]]] = {}
    for dtype, words in (("float32", []), ("bfloat16", ["--bf16"])):
        found[dtype] = {}
        for parts_of in (parts_of_fsdp, parts_of_experts):
            config, builders = parts_of([*words, *flags])
            with distributed_environment(config) as device:
                keep_freed_memory(device)
                parts = {name: build(device) for name, build in builders.items()}
                found[dtype] |= in_turns(parts, rounds, repetitions, device)
                parts.clear()
    return found


def page(result: dict[str, Any]) -> str:
    """Medians over rounds, with the range, and the share of the whole that each part belongs to."""
    lines = [f"# Overheads, {result['environment']['date']}", ""]
    lines += [
        f"- {key.replace('_', ' ')}: {value}" for key, value in result["environment"].items() if value is not None
    ]
    lines += [f"- command: `{result['command']}`", "", "| dtype | what | ms | lowest to highest round | share |"]
    lines += ["|---|---|---:|---:|---:|"]
    for dtype, parts in result["milliseconds"].items():
        whole = 1.0
        for name, values in parts.items():
            whole = median(values) if name in ("step", "layer of experts") else whole
            spread = f"{min(values):.1f} to {max(values):.1f}"
            lines.append(f"| {dtype} | {name} | {median(values):.1f} | {spread} | {median(values) / whole:.3f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=7, help="Default %(default)s.")
    parser.add_argument("--repetitions", type=int, default=3, help="Of each part in a round; default %(default)s.")
    parser.add_argument("--output", metavar="PATH", help="Write PATH.json and PATH.md too.")
    words = list(sys.argv[1:] if argv is None else argv)
    options, flags = parser.parse_known_args(words)
    try:
        milliseconds = measure(flags, options.rounds, options.repetitions)
    except ConfigError as error:
        exit_with("benchmarks.overheads", error)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "environment": environment(device, torch.get_num_threads()),
        "command": f"OMP_NUM_THREADS=1 python -m benchmarks.overheads {shlex.join(words)}".rstrip(),
        "milliseconds": milliseconds,
    }
    text = page(result)
    print(text, end="")
    if options.output is not None:
        write(result, text, options.output)


if __name__ == "__main__":
    main()
