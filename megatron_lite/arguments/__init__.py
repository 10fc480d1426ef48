"""From a command line and a YAML file to one validated RunConfig.

The fields of the configuration dataclasses are the flags (`options`), `command_line` reads them, `validation` checks
the rules between them, `show` prints them.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, get_type_hints

from megatron_lite.arguments.command_line import COMMAND_LINE, Settings, build_parser, read_settings
from megatron_lite.arguments.compilation import settle_compilation
from megatron_lite.arguments.huggingface_settings import huggingface_notices
from megatron_lite.arguments.notices import (
    default_notices,
    expert_notices,
    fp8_notices,
    pipeline_notices,
    recomputation_notices,
)
from megatron_lite.arguments.options import all_options
from megatron_lite.arguments.run_config import GROUPS, RunConfig
from megatron_lite.arguments.show import config_as_yaml
from megatron_lite.arguments.validation import all_violations, validate
from megatron_lite.arguments.without_effect import flags_without_effect
from megatron_lite.errors import ConfigError

__all__ = ["RunConfig", "build_parser", "build_run_config", "config_as_yaml", "parse_args", "read_settings", "validate"]


def parse_args(argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None) -> RunConfig:
    """The validated, read-only configuration of this run.

    Args:
        argv: the words of the command line; default: those of this process.
        defaults: field -> value, weaker than the command line and the `--config` file.

    Raises:
        ConfigError: with everything that is wrong at once.
        SystemExit: after `--help` or `--print-config`.
    """
    settings = read_settings(argv, defaults)
    run = build_run_config(settings)
    problems = settings.problems + all_violations(run)
    if problems:
        raise ConfigError.from_violations(problems)
    run.notices += tuple(huggingface_notices(run))
    if settings.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(config_as_yaml(run, settings), end="")
        raise SystemExit(0)
    run.freeze()
    return run


def build_run_config(settings: Settings) -> RunConfig:
    """The settings as dataclasses, with the values that depend on each other filled in; not validated yet."""
    types = get_type_hints(RunConfig)
    groups = {}
    for name in GROUPS:
        own = {field.name for field in dataclasses.fields(types[name]) if field.init}
        groups[name] = types[name](**{key: value for key, (value, _) in settings.values.items() if key in own})
    run = RunConfig(**groups, dry_run=settings.dry_run)
    run.world_size = _world_size(settings)
    given = {
        option.field: option.shown[0]
        for option in all_options()
        if settings.values.get(option.field, ("", ""))[1] == COMMAND_LINE
    }
    notices = settings.notices + _settle(run) + list(flags_without_effect(run, given))
    notices += fp8_notices(run, "fp8_recipe" in settings.values)
    notices += default_notices(run, settings.values)
    run.notices = tuple(notices)
    return run


def _world_size(settings: Settings) -> int:
    launched = _launched_ranks(settings)
    if settings.world_size is None:
        return launched
    if not settings.dry_run and settings.world_size != launched:
        settings.problems.append(
            f"--world-size is {settings.world_size}, but {launched} ranks were started: start them with torchrun "
            "--nproc-per-node, or add --dry-run to describe a cluster that is not there."
        )
    if settings.world_size < 1:
        settings.problems.append(f"--world-size is {settings.world_size}, but there must be at least 1 rank.")
    return settings.world_size


def _launched_ranks(settings: Settings) -> int:
    """Ranks that torchrun, or whoever stands in for it, says there are; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if text.isdecimal() and int(text) > 0:
        return int(text)
    settings.problems.append(
        f"The environment variable WORLD_SIZE is {text!r}, but must be the number of ranks: unset it, or start with "
        "torchrun, which sets it."
    )
    return 1


def _settle(run: RunConfig) -> list[str]:
    """Fill in what follows from other groups; says what it switched off."""
    notices = []
    if run.transformer.sequence_parallel and run.transformer.tensor_model_parallel_size == 1:
        run.transformer.sequence_parallel = False
        overlap = "" if not run.transformer.tp_comm_overlap else " and --tp-comm-overlap"
        run.transformer.tp_comm_overlap = False
        notices.append(f"--sequence-parallel{overlap}: switched off, because tensor_model_parallel_size is 1.")
    if run.transformer.tp_comm_overlap and run.transformer.transformer_impl == "transformer_engine":
        run.transformer.tp_comm_overlap = False
        notices.append(
            "--tp-comm-overlap: switched off, because the layers of Transformer Engine communicate by themselves; "
            "--transformer-impl local has it."
        )
    notices += [*settle_compilation(run), *expert_notices(run), *pipeline_notices(run), *recomputation_notices(run)]
    if run.transformer.apply_query_key_layer_scaling:
        notices.append("--apply-query-key-layer-scaling: accepted without effect (scores are accumulated in float32).")
    if run.gpt.max_position_embeddings is None:
        run.gpt.max_position_embeddings = run.data.seq_length
    return notices
