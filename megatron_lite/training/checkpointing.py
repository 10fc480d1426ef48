"""What a run puts into its checkpoints and takes out of them."""

from dataclasses import asdict

from torch import nn

from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import load_checkpoint, read_tracker, save_checkpoint
from megatron_lite.distributed import reshard_parameters
from megatron_lite.optimizer import MegatronOptimizer, OptimizerParamScheduler
from megatron_lite.training.progress import Progress


def save(
    config: RunConfig,
    model: nn.Module,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: Progress,
) -> None:
    """Write a checkpoint of everything that the rest of the run depends on. A collective over all ranks."""
    checkpoint = config.checkpoint
    assert checkpoint.save is not None, "nobody asked for checkpoints"
    reshard_parameters(model)
    save_checkpoint(
        checkpoint.save,
        progress.iteration,
        model,
        optimizer if checkpoint.save_optim else None,
        {"progress": asdict(progress), "scheduler": scheduler.state_dict()},
        config_dict=config.to_dict(),
        keep_last=checkpoint.keep_last,
        retain_interval=checkpoint.save_retain_interval,
        save_rng=checkpoint.save_rng,
    )


def load(
    config: RunConfig, model: nn.Module, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler | None
) -> Progress:
    """Continue from --load, else start from the weights of --pretrained-checkpoint, else from the initial weights.

    A run that does not train has no scheduler.

    Returns:
        Where the run continues.
    """
    checkpoint = config.checkpoint
    root, finetune = checkpoint.load, checkpoint.finetune
    if checkpoint.pretrained_checkpoint and (root is None or read_tracker(root) is None):
        root, finetune = checkpoint.pretrained_checkpoint, True
    if root is None:
        return Progress()
    state = load_checkpoint(
        root,
        model,
        optimizer,
        load_optimizer=checkpoint.load_optim,
        load_rng=checkpoint.load_rng,
        finetune=finetune,
        ckpt_step=checkpoint.ckpt_step,
        exit_on_missing_checkpoint=checkpoint.exit_on_missing_checkpoint,
    )
    if state is None or finetune:
        return Progress()
    if scheduler is not None:
        scheduler.load_state_dict(state.extra["scheduler"])
    return Progress(**state.extra["progress"])
