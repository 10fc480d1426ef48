"""What a run puts into its checkpoints and takes out of them."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import (
    BackgroundSaver,
    CheckpointError,
    load_checkpoint,
    read_common,
    read_tracker,
    save_checkpoint,
)
from megatron_lite.checkpoint.huggingface import Architecture, disagreements, load_huggingface
from megatron_lite.checkpoint.model_settings import MEANING
from megatron_lite.distributed import reshard_parameters
from megatron_lite.errors import ConfigError
from megatron_lite.optimizer import MegatronOptimizer, OptimizerParamScheduler
from megatron_lite.training.initialize import print_rank_0
from megatron_lite.training.progress import Progress
from megatron_lite.training.upcycling import dense_checkpoint, upcycle


def save(
    config: RunConfig,
    model_chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: Progress,
    background: BackgroundSaver | None = None,
) -> None:
    """Write a checkpoint of everything that the rest of the run depends on. A collective over all ranks.

    With `background` it is written while training goes on.
    """
    checkpoint = config.checkpoint
    assert checkpoint.save is not None, "nobody asked for checkpoints"
    for chunk in model_chunks:
        reshard_parameters(chunk)
    save_checkpoint(
        checkpoint.save,
        progress.iteration,
        model_chunks,
        optimizer if checkpoint.save_optim else None,
        {"progress": asdict(progress), "scheduler": scheduler.state_dict()},
        config_dict=config.to_dict(),
        keep_last=checkpoint.keep_last,
        retain_interval=checkpoint.save_retain_interval,
        save_rng=checkpoint.save_rng,
        background=background,
    )


def settle(background: BackgroundSaver | None, wait: bool = False) -> None:
    """Hear how a save in the background ended, if it has; with `wait`, when it has. If it failed, training goes on."""
    if background is None or not background.is_busy:
        return
    try:
        background.finish() if wait else background.poll()
    except CheckpointError as error:
        print_rank_0(f"WARNING: {error}\nTraining goes on, and the next checkpoint is written when it is due.")


def finish_save(background: BackgroundSaver | None) -> None:
    """Wait for a save in the background before the run ends.

    Raises:
        CheckpointError: it failed, and no other will follow.
    """
    if background is not None:
        background.finish()


def make_save_folder(folder: str | None) -> None:
    """Find out before training, not at the first save, that checkpoints can be written; the first rank tries.

    Raises:
        ConfigError: nothing can be written there.
    """
    if folder is None or dist.get_rank() != 0:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"save is {folder!r}, where nothing can be written ({error}): write --save with another folder."
        ) from error


def load(
    config: RunConfig,
    model_chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler | None,
) -> Progress:
    """Continue from --load, else start from the weights of --pretrained-checkpoint or --load-hf, or from initial ones.

    With --moe-use-upcycling a checkpoint without experts is made one with experts (`upcycling`), and the run begins.
    A run that does not train has no scheduler. Settings that change what the weights or the position in the data mean
    are reported where they differ from the checkpoint's.

    Returns:
        Where the run continues.
    """
    checkpoint = config.checkpoint
    root, finetune = checkpoint.load, checkpoint.finetune
    if checkpoint.pretrained_checkpoint and (root is None or read_tracker(root) is None):
        root, finetune = checkpoint.pretrained_checkpoint, True
        if read_tracker(root) is None and checkpoint.ckpt_step is None:
            raise ConfigError(
                f"pretrained_checkpoint is {root!r}, but there is no checkpoint: name a folder that --save wrote to, "
                "or leave it out to start from initial weights."
            )
    if checkpoint.load_hf and (root is None or read_tracker(root) is None):
        _load_huggingface(config, checkpoint.load_hf, model_chunks)
        return Progress()
    if root is None:
        return Progress()
    if config.transformer.moe_use_upcycling:
        dense = dense_checkpoint(root, checkpoint.ckpt_step)
        if dense is not None:
            _refuse_to_start_over(config, root)
            for line in changed_settings(config, read_common(dense)["config"], finetune=True):
                print_rank_0(f"WARNING: {line}")
            upcycle(dense, model_chunks, config.transformer)
            return Progress()
    state = load_checkpoint(
        root,
        model_chunks,
        optimizer,
        load_optimizer=checkpoint.load_optim,
        load_rng=checkpoint.load_rng,
        finetune=finetune,
        ckpt_step=checkpoint.ckpt_step,
        exit_on_missing_checkpoint=checkpoint.exit_on_missing_checkpoint,
        verify=checkpoint.verify_checkpoint,
        fallback=checkpoint.fallback,
    )
    if state is not None:
        for line in changed_settings(config, state.config, finetune):
            print_rank_0(f"WARNING: {line}")
    # A checkpoint that was imported holds weights alone, and no position.
    if state is None or finetune or "progress" not in state.extra:
        return Progress()
    if scheduler is not None:
        scheduler.load_state_dict(state.extra["scheduler"])
    return Progress(**state.extra["progress"])


def _load_huggingface(config: RunConfig, folder: str, model_chunks: list[nn.Module]) -> None:
    """Fill the model from a Hugging Face folder, if they agree; now the size of the tokenizer's vocabulary is known."""
    vocab_size = model_chunks[0].vocab_size
    assert isinstance(vocab_size, int)
    found = list(disagreements(folder, Architecture(config.transformer, config.gpt, vocab_size)))
    if found:
        raise ConfigError.from_violations(found)
    load_huggingface(folder, model_chunks)
    print_rank_0(f" loaded the weights of the Hugging Face model in {folder}")


def _refuse_to_start_over(config: RunConfig, dense: str) -> None:
    """A run that was upcycled before continues from its own checkpoints, not from the dense one again."""
    save = config.checkpoint.save
    if save is not None and os.path.abspath(save) != os.path.abspath(dense) and read_tracker(save) is not None:
        raise ConfigError(
            f"moe_use_upcycling is set with a dense checkpoint in {dense!r}, but save is {save!r}, where there are "
            f"checkpoints already: write --load {save} --pretrained-checkpoint {dense} to continue, or choose another "
            "--save."
        )


# The position of a run counts samples in an order that these decide.
OF_THE_DATA = {
    "rng": ("seed",),
    "data": ("seq_length", "data_path", "train_data_path", "split", "mock_data", "dataloader_type"),
}


def changed_settings(config: RunConfig, stored: Mapping[str, Any], finetune: bool) -> Iterator[str]:
    """One line for each setting whose change makes something else of the checkpoint's weights or position."""
    groups = MEANING if finetune else MEANING | OF_THE_DATA
    # By way of JSON, as the stored settings came: tuples are lists.
    current = json.loads(json.dumps(config.to_dict()))
    for group, names in groups.items():
        before = stored.get(group, {})
        for name in names:
            if name in before and before[name] != current[group][name]:
                what = "the weights were trained" if group in MEANING else "the samples so far were drawn"
                yield f"{name} is {current[group][name]}, but {what} with {before[name]}."
    kinds = [one.get("transformer", {}).get("moe_router_load_balancing_type") for one in (current, stored)]
    if None not in kinds and ("sinkhorn" in kinds[0]) != ("sinkhorn" in kinds[1]):
        # Sinkhorn weighs experts in its own way; the other types weigh them alike.
        yield f"moe_router_load_balancing_type is {kinds[0]}, but the weights were trained with {kinds[1]}."
