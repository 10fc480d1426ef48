"""The knobs of saving and loading checkpoints."""

from dataclasses import dataclass

from megatron_lite.config_field import Validated, knob


@dataclass
class CheckpointConfig(Validated):
    """Where checkpoints are, how often they are written, and what is in them."""

    save: str | None = knob(None, "Folder that checkpoints are written to.", metavar="FOLDER")
    save_interval: int | None = knob(
        None, "Iterations between checkpoints.", flag=("--save-interval", "--persistent-save-interval")
    )
    save_retain_interval: int | None = knob(
        None,
        "Keep checkpoints whose iteration is a multiple of this, and delete older others.",
        flag=("--save-retain-interval", "--keep-every"),
    )
    keep_last: int | None = knob(
        None,
        "Keep this many newest checkpoints and delete older ones.",
        flag=("--keep-last-checkpoints", "--keep-last"),
    )
    async_save: bool = knob(
        False, "Write checkpoints while training goes on, which waits only for a copy of the state in host memory."
    )
    save_optim: bool = knob(True, "Save the optimizer's state.")
    save_rng: bool = knob(True, "Save the random number generators' states.")
    load: str | None = knob(None, "Folder to resume from; starts anew if it holds no checkpoint.", metavar="FOLDER")
    ckpt_step: int | None = knob(None, "Load this iteration instead of the latest one.")
    load_optim: bool = knob(True, "Load the optimizer's state.")
    load_rng: bool = knob(True, "Load the random number generators' states.")
    finetune: bool = knob(False, "Load weights only and start from iteration 0.")
    pretrained_checkpoint: str | None = knob(
        None, "Folder whose weights start the run when --load holds no checkpoint yet.", metavar="FOLDER"
    )
    load_hf: str | None = knob(
        None,
        "Folder of a Hugging Face model whose weights start the run when --load holds no checkpoint yet; settings of "
        "model and tokenizer that are not given are the folder's.",
        metavar="FOLDER",
    )
    use_checkpoint_args: bool = knob(
        False,
        "Take what is not given of the settings of model and tokenizer from the checkpoint of --load, or else of "
        "--pretrained-checkpoint.",
    )
    verify_checkpoint: bool = knob(
        False,
        "Compare every file of a checkpoint with its checksum before loading it.",
        flag=("--verify-checkpoint", "--verify-integrity"),
    )
    fallback: bool = knob(True, "Where the latest checkpoint is damaged, load the one before it.")
    exit_on_missing_checkpoint: bool = knob(False, "Stop if --load holds no checkpoint, instead of starting anew.")

    def violations(self) -> list[str]:
        """Every broken rule of this group, one sentence each."""
        found = super().violations()
        for name in ("save_interval", "save_retain_interval", "keep_last"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"{name} is {value}, but must be positive: write 1 or more, or leave it out.")
        if self.save is not None and self.save_interval is None:
            found.append(
                f"save is {self.save!r} without an interval, but the run must know when to save: "
                "write --save-interval N."
            )
        if self.save_retain_interval and self.save_interval and self.save_retain_interval % self.save_interval:
            nearest = max(1, round(self.save_retain_interval / self.save_interval)) * self.save_interval
            found.append(
                f"save_retain_interval is {self.save_retain_interval}, but must be a multiple of save_interval "
                f"({self.save_interval}): write --save-retain-interval {nearest}."
            )
        if self.load_hf is not None and self.pretrained_checkpoint is not None:
            found.append(
                f"load_hf is {self.load_hf!r} and pretrained_checkpoint {self.pretrained_checkpoint!r}, but a run "
                "starts from one of them: leave out the other."
            )
        if self.exit_on_missing_checkpoint and self.load is None:
            found.append("exit_on_missing_checkpoint is set, but no checkpoint is asked for: write --load FOLDER.")
        return found
