"""Convert folders of Hugging Face's transformers, and Megatron-LM's, to checkpoints of megatron_lite and back.

python tools/convert_checkpoint.py --from hf --to megatron_lite --load FOLDER --save checkpoints
python tools/convert_checkpoint.py --from megatron --to megatron_lite --load FOLDER --save checkpoints
python tools/convert_checkpoint.py --from megatron_lite --to hf --load checkpoints --save FOLDER

What is imported continues with --pretrained-checkpoint, or is read by tools/generate.py. What is exported is read by
transformers.AutoModelForCausalLM.from_pretrained.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import CheckpointError, find_checkpoint, read_common, read_tracker
from megatron_lite.checkpoint.huggingface import Architecture, architecture_of
from megatron_lite.checkpoint.huggingface.exporting import LARGEST_FILE, export_checkpoint
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.importing import import_checkpoint, settings_to_import
from megatron_lite.checkpoint.huggingface.tokenizer_files import copy_tokenizer, special_tokens, tokenizer_in
from megatron_lite.checkpoint.megatron import (
    MegatronCheckpoint,
    architecture_of_run,
    can_continue,
    find_megatron,
    import_megatron,
    tokenizer_of,
)
from megatron_lite.errors import ConfigError
from megatron_lite.inference.load_model import rebuild_config
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.tokenizers import TokenizerConfig, build_tokenizer
from megatron_lite.transformer.transformer_config import TransformerConfig

SOURCES = ("hf", "megatron", "megatron_lite")
TARGETS = ("hf", "megatron_lite")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES, help="What --load holds.")
    parser.add_argument("--to", dest="target", required=True, choices=TARGETS, help="What to write to --save.")
    parser.add_argument("--load", required=True, metavar="FOLDER", help="Folder to read.")
    parser.add_argument("--save", required=True, metavar="FOLDER", help="Folder to write.")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="Iteration to read instead of the latest one.")
    group = parser.add_argument_group("to hf")
    group.add_argument("--dtype", choices=DTYPES, help="Of the weights; default what the model computes with.")
    group.add_argument("--model-type", choices=FAMILIES, help="Default the first type that can express the model.")
    group.add_argument("--tokenizer-model", metavar="FOLDER", help="Where the tokenizer is now, if it has moved.")
    group.add_argument(
        "--max-shard-size", type=int, default=LARGEST_FILE, metavar="BYTES", help="Larger weights become several files."
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; user mistakes end in a message and exit status 2."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.source == arguments.target:
            raise ConfigError(f"--from and --to are both {arguments.source}, but must differ: write the other in one.")
        if arguments.target == "megatron_lite" and read_tracker(arguments.save) is not None:
            raise ConfigError(
                f"--save is {arguments.save!r}, where there is a checkpoint already: name another folder."
            )
        if arguments.source == "hf":
            from_huggingface(arguments.load, arguments.save)
        elif arguments.target == "megatron_lite":
            from_megatron(arguments.load, arguments.save, arguments.ckpt_step)
        elif arguments.source == "megatron_lite":
            to_huggingface(arguments)
        else:
            raise ConfigError("--from is megatron and --to is hf: convert to megatron_lite first, then that to hf.")
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def from_huggingface(folder: str, root: str) -> None:
    """Import a folder of Hugging Face's, with its tokenizer."""
    settings = settings_to_import(folder)
    model = architecture_of(settings)
    tokenizer = Path(root) / "tokenizer"
    if copy_tokenizer(folder, tokenizer):
        shutil.copyfile(Path(folder) / "config.json", tokenizer / "config.json")  # can decide the tokenizer's class
    found = tokenizer_in(tokenizer.resolve())
    if found is not None:
        named = TokenizerConfig(tokenizer_type=found[0], tokenizer_model=found[1])
    else:
        named = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=model.vocab_size)
    with tqdm(unit=" tensors", desc="importing") as bar:
        written = import_checkpoint(folder, root, model, settings_to_store(model, named), lambda name: _show(bar, name))
    print(f"wrote {written}")


def from_megatron(root: str, save: str, step: int | None) -> None:
    """Import a checkpoint of Megatron-LM's; its tokenizer stays where it is."""
    theirs = MegatronCheckpoint(find_megatron(root, step))
    model = architecture_of_run(theirs)
    assert model.vocab_size is not None, "checkpoints have embeddings"
    stored = settings_to_store(model, tokenizer_of(theirs, model.vocab_size))
    with tqdm(unit=" tensors", desc="importing") as bar:
        written = import_megatron(theirs, save, model, stored, lambda name: _show(bar, name))
    what = "the run at" if can_continue(theirs) else "the weights of"
    print(f"wrote {written}, {what} iteration {theirs.iteration}, with a vocabulary of {model.vocab_size}")


def settings_to_store(model: Architecture, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What an imported checkpoint says of its model and tokenizer."""
    groups = RunConfig(transformer=model.transformer, gpt=model.gpt, tokenizer=tokenizer).to_dict()
    return {name: groups[name] for name in ("transformer", "gpt", "tokenizer")}


def to_huggingface(arguments: argparse.Namespace) -> None:
    """Export a checkpoint, with the tokenizer it names."""
    iteration = read_tracker(arguments.load) if arguments.ckpt_step is None else arguments.ckpt_step
    if iteration is None:
        raise CheckpointError(f"There is no checkpoint in {arguments.load}: give the folder that --save wrote to.")
    folder = find_checkpoint(arguments.load, iteration)
    settings = read_common(folder)["config"]
    moved: dict[str, Any] = {"trust_remote_code": False}
    if arguments.tokenizer_model is not None:
        moved["tokenizer_model"] = arguments.tokenizer_model
    tokenizer = rebuild_config(TokenizerConfig, settings, "tokenizer", folder, moved)
    model = architecture_to_export(settings, folder, tokenizer)
    place = tokenizer.tokenizer_model
    with tqdm(unit=" tensors", desc="exporting") as bar:
        model_type = export_checkpoint(
            folder,
            arguments.save,
            model,
            model_type=arguments.model_type,
            dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
            largest_file=arguments.max_shard_size,
            more_config=special_tokens(place or ""),
            announce=lambda name: _show(bar, name),
        )
    has_tokenizer = place is not None and copy_tokenizer(place, arguments.save)
    print(f"wrote {arguments.save}, of type {model_type}{'' if has_tokenizer else ', without a tokenizer'}")


def architecture_to_export(settings: dict[str, Any], folder: Path, tokenizer: TokenizerConfig) -> Architecture:
    """What a checkpoint's settings say of its model, in one process."""
    one_process = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "sequence_parallel": False,
        "tp_comm_overlap": False,
        "transformer_impl": "auto",
        "norm_impl": "torch",
        "cp_comm_type": None,
        "hierarchical_context_parallel_sizes": None,
    }
    transformer = rebuild_config(TransformerConfig, settings, "transformer", folder, one_process)
    gpt = rebuild_config(GPTModelConfig, settings, "gpt", folder, {})
    return Architecture(transformer, gpt, gpt.vocab_size or build_tokenizer(tokenizer).vocab_size)


def _show(bar: "tqdm[Any]", name: str) -> None:
    bar.set_postfix_str(name, refresh=False)
    bar.update()


if __name__ == "__main__":
    sys.exit(main())
