#!/usr/bin/env python3
"""Pretrain a GPT. `pretrain_gpt.py --help` lists the flags; README.md shows complete commands.

torchrun --nproc-per-node 2 pretrain_gpt.py --config configs/quickstart.yaml --tensor-model-parallel-size 2 --mock-data
"""

from megatron_lite.arguments import RunConfig, parse_args
from megatron_lite.checkpoint import CheckpointError
from megatron_lite.errors import ConfigError, exit_with
from megatron_lite.slurm import take_slurm_environment


def main() -> None:
    """Flags to config, config to run."""
    try:
        take_slurm_environment()
        config = parse_args()
        if config.dry_run:
            from megatron_lite.dry_run import dry_run

            dry_run(config)
        else:
            pretrain(config)
    except (ConfigError, CheckpointError, FloatingPointError) as error:
        exit_with("pretrain_gpt.py", error)


def pretrain(config: RunConfig) -> None:
    """One rank's run from start to end."""
    # Imported here, so that --help and --print-config answer at once.
    from megatron_lite.optimizer import get_megatron_optimizer
    from megatron_lite.tokenizers import build_tokenizer
    from megatron_lite.training import setup
    from megatron_lite.training.checkpointing import load
    from megatron_lite.training.initialize import announce, distributed_environment, keep_freed_memory
    from megatron_lite.training.rerun import config_to_rerun, rerun
    from megatron_lite.training.train import evaluate_at_end, finish, train
    from megatron_lite.training.watchdog import watch

    with distributed_environment(config) as device:
        keep_freed_memory(device)
        watchdog = watch(config)
        folder = config.checkpoint.save or "."
        if config.training.rerun_iteration is not None:
            config = config_to_rerun(config)
        announce(config, device)
        tokenizer = build_tokenizer(config.tokenizer)
        model_chunks = setup.model_of(config, tokenizer, device)
        optimizer = get_megatron_optimizer(config.optimizer, model_chunks)
        scheduler = setup.scheduler_of(config, optimizer)
        progress = load(config, model_chunks, optimizer, scheduler)
        run = setup.assemble(config, device, tokenizer, model_chunks, optimizer, scheduler, progress, watchdog)
        try:
            if config.training.rerun_iteration is not None:
                rerun(run, folder)
                return
            stopped_early = not config.validation.skip_train and train(run)
            if not stopped_early:
                evaluate_at_end(run)
        finally:
            finish(run)


if __name__ == "__main__":
    main()
