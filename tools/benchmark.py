"""Measure training speed against other training loops, or against a second configuration, in turns.

python tools/benchmark.py --config benchmarks/configs/gpt_cpu.yaml --dtype fp32 bf16 --compile off on
python tools/benchmark.py --config benchmarks/configs/llama_1b.yaml --against plain huggingface --output results/1b
python tools/benchmark.py --config benchmarks/configs/gpt_cpu.yaml --against "--swiglu --ffn-hidden-size 688"
python tools/benchmark.py --against "--nproc-per-node 2 --tensor-model-parallel-size 2"

All flags of pretrain_gpt.py work here too, and describe the model, batch and optimizer. benchmarks/README.md explains
what the numbers mean.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks/, which is not part of the installed package

from benchmarks import contenders, report  # noqa: E402
from benchmarks.measure import Measured, Side, configuration, measure  # noqa: E402
from megatron_lite.errors import ConfigError  # noqa: E402
from megatron_lite.training.initialize import training_device  # noqa: E402

# Relative, because results repeat it and are read on other machines.
DEFAULT_CONFIG = os.path.relpath(ROOT / "benchmarks" / "configs" / "gpt_cpu.yaml")


def build_parser() -> argparse.ArgumentParser:
    """The flags of the measurement; the rest belongs to pretrain_gpt.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", nargs="+", default=[DEFAULT_CONFIG], metavar="FILE", help="Presets; default %(default)s."
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=["plain"],
        metavar="plain|huggingface|FLAGS|nothing",
        help="What to take turns with: the plain torch loop, the package transformers, this framework with further "
        "flags (in one word), or nothing.",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        default=1,
        metavar="N",
        help="Processes of this framework, as torchrun has it; among the FLAGS of --against also of that side.",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), metavar="fp32|bf16", help="Default as configured."
    )
    parser.add_argument(
        "--compile", nargs="*", choices=("off", "on"), default=["off"], metavar="off|on", help="Default off."
    )
    parser.add_argument("--steps", type=int, default=10, help="Optimizer steps of a window; default %(default)s.")
    parser.add_argument("--warmup", type=int, default=3, help="Steps before the first window; default %(default)s.")
    parser.add_argument("--rounds", type=int, default=5, help="Windows of each side; default %(default)s.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side; default %(default)s.")
    parser.add_argument("--breakdown", action="store_true", help="Also say where the time of a step goes.")
    parser.add_argument("--output", metavar="PATH", help="Write PATH.json and PATH.md too.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; user mistakes end in a message and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, flags = build_parser().parse_known_args(words)
    try:
        for name in ("steps", "rounds", "threads", "nproc_per_node"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"{name} is {getattr(arguments, name)}, but it must be at least 1.")
        result = run(arguments, flags)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result["command"] = shlex.join(["python", "tools/benchmark.py", *words])
    page = report.markdown(result)
    print(page, end="")
    if arguments.output is not None:
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(output.name + ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        output.with_name(output.name + ".md").write_text(page, encoding="utf-8")
    return 0


def run(arguments: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Measure each combination of model, dtype and compilation; the environment is that of the beginning."""
    device = training_device()
    cases = [
        (Path(config).stem, ["--config", config, *flags, *dtype, *compiled])
        for config in arguments.config
        for dtype in _dtype_flags(arguments.dtype, ["--config", config, *flags], arguments.nproc_per_node)
        for compiled in ([["--compile"] if mode == "on" else ["--no-compile"] for mode in arguments.compile or ["on"]])
    ]
    all_sides = [(name, sides_of(case, arguments.against, arguments.nproc_per_node)) for name, case in cases]
    result: dict[str, Any] = {
        "environment": report.environment(device, arguments.threads),
        "settings": {name: getattr(arguments, name) for name in ("steps", "warmup", "rounds", "threads")},
        "compared": "tokens per CPU-second" if device.type == "cpu" else "tokens/s",
        "flops": report.FLOPS_FORMULA,
        "mfu": report.MFU_MEANING[device.type],
        "cases": [],
    }
    for number, (name, sides) in enumerate(all_sides, 1):
        said = f"{number} of {len(all_sides)}: {name}, {' against '.join(side.name for side in sides)} ..."
        print(said, file=sys.stderr, flush=True)
        measured: list[Measured] = measure(
            sides,
            steps=arguments.steps,
            warmup=arguments.warmup,
            rounds=arguments.rounds,
            threads=arguments.threads,
            break_down=arguments.breakdown,
        )
        result["cases"].append(report.summarize(report.Case(sides[0].config, measured, name), device))
        print("\n".join(report.rows(result["cases"][-1])), file=sys.stderr, flush=True)
    return result


def _dtype_flags(dtypes: Sequence[str] | None, flags: list[str], ranks: int) -> list[list[str]]:
    if dtypes is None:
        return [[]]
    if configuration(flags, ranks).transformer.params_dtype.itemsize != 4:
        raise ConfigError("--dtype is given, but the configuration sets a dtype too; keep one of them.")
    return [["--bf16"] if dtype == "bf16" else [] for dtype in dtypes]


def sides_of(flags: list[str], against: Sequence[str], ranks: int = 1) -> list[Side]:
    """This framework, and what it is compared with.

    Raises:
        ConfigError: flags that do not make a run, a model that the peers cannot build, or a peer that is not there.
    """
    sides = [Side("megatron_lite", "megatron_lite", tuple(flags), ranks)]
    config = sides[0].config
    for other in against:
        if other == "nothing":
            continue
        if other in contenders.PEERS:
            if ranks > 1:
                raise ConfigError(
                    f"nproc_per_node is {ranks}, but {other} runs on one rank: write --nproc-per-node among the FLAGS "
                    "of a further --against instead."
                )
            contenders.check_peer(other, config)
            sides.append(Side(contenders.PEERS[other], other, tuple(flags)))
            continue
        side = _second_configuration(flags, other)
        second = side.config
        if (second.global_batch_size, second.sequence_length) != (config.global_batch_size, config.sequence_length):
            raise ConfigError("--against changes the tokens of a step, so rates could not be compared; keep the batch.")
        sides.append(side)
    return sides


def _second_configuration(flags: list[str], further: str) -> Side:
    """This framework with further flags, of which --nproc-per-node says on how many ranks."""
    words = shlex.split(further)
    ranks = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ranks.add_argument("--nproc-per-node", type=int, default=1)
    given, words = ranks.parse_known_args(words)
    return Side(f"with {further}", "megatron_lite", (*flags, *words), given.nproc_per_node)


if __name__ == "__main__":
    sys.exit(main())
