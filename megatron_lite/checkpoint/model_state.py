"""The tensors of a run by global name, and the comparison of what is wanted with what a checkpoint holds."""

import difflib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.model_chunks import ModelChunks, as_chunks

_SHOWN = 10


def model_tensors(model_chunks: ModelChunks) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the model chunks of this rank by their global name, detached.

    The copy of a tied parameter in another pipeline stage has the name of the original; a rank that holds both has
    the original alone here (`fill_copies`).

    Parameters that `fully_shard` manages are the sharded DTensors, also right after an evaluation that left the
    gathered ones in place. A tied parameter appears once, under its first name.

    Raises:
        CheckpointError: two chunks use one name, or a module stores something other than tensors.
    """
    chunks, copies = as_chunks(model_chunks), copies_of(model_chunks)
    tensors: dict[str, Tensor] = {}
    first_names_of_all = {name for chunk in chunks for name, _ in chunk.named_parameters()}
    for chunk in chunks:
        state = chunk.state_dict()
        first_names = {name for name, _ in chunk.named_parameters()}
        aliases = {name for name, _ in chunk.named_parameters(remove_duplicate=False)} - first_names
        for name, value in state.items():
            if name in aliases:
                continue
            if name in copies:
                name = copies[name]
                if name in first_names_of_all:
                    continue
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{name} is a {type(value).__name__}: a checkpoint holds tensors only.")
            if name in tensors:
                raise CheckpointError(f"{name} exists in two chunks of the model: names must be global.")
            tensors[name] = value.detach()
    return tensors


def copies_of(model_chunks: ModelChunks) -> dict[str, str]:
    """The declared copies among the parameters of this rank: name -> name of the original (ParameterSpec.copy_of)."""
    return {
        f"{path}.{name}" if path else name: spec.copy_of
        for chunk in as_chunks(model_chunks)
        for path, module in chunk.named_modules()
        for name, spec in getattr(module, "parameter_specs", {}).items()
        if spec.copy_of
    }


@torch.no_grad()
def fill_copies(model_chunks: ModelChunks) -> None:
    """After loading: give copies whose original this rank holds, too, the original's values."""
    parameters = {name: p for chunk in as_chunks(model_chunks) for name, p in chunk.named_parameters()}
    for name, original in copies_of(model_chunks).items():
        if original in parameters:
            local_tensor(parameters[name]).copy_(local_tensor(parameters[original]))


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that is stored on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compare_names_and_shapes(
    wanted: Mapping[str, Tensor],
    wanted_anywhere: Collection[str],
    stored: Mapping[str, torch.Size],
    folder: object,
) -> None:
    """Check that a checkpoint holds exactly the tensors a run wants, in the same shapes.

    Args:
        wanted: this rank's tensors by name in the checkpoint.
        wanted_anywhere: the names that any rank wants.
        stored: global shapes of the checkpoint's tensors of the same kinds.
        folder: named in the message.

    Raises:
        CheckpointError: lists missing and unexpected names with the closest counterparts, and differing shapes.
    """
    missing = sorted(set(wanted) - set(stored))
    unexpected = sorted(set(stored) - set(wanted_anywhere))
    reshaped = [
        f"{name}: {list(stored[name])} in the checkpoint, {list(tensor.shape)} in this run"
        for name, tensor in wanted.items()
        if name in stored and stored[name] != tensor.shape
    ]
    if not (missing or unexpected or reshaped):
        return
    lines = [f"{folder} does not fit this run: the model or optimizer was configured differently."]
    lines += listed("not in the checkpoint", [with_closest(name, unexpected) for name in missing])
    lines += listed("in the checkpoint only", [with_closest(name, missing) for name in unexpected])
    lines += listed("another shape", reshaped)
    differing = [*missing, *unexpected, *(name.partition(":")[0] for name in reshaped)]
    if all(name.startswith("optimizer.") for name in differing):
        lines.append("The weights fit: load them alone with --no-load-optim, or as a new run with --finetune.")
    else:
        lines.append("Give the model flags of the run that saved it (its common.json lists them), or another --load.")
    raise CheckpointError("\n".join(lines))


def with_closest(name: str, others: list[str]) -> str:
    """A name, with the most similar of the others if one is similar."""
    closest = difflib.get_close_matches(name, others[:2000], n=1, cutoff=0.6)
    return f"{name} (closest counterpart: {closest[0]})" if closest else name


def listed(title: str, entries: list[str]) -> list[str]:
    """Lines of a message: the title with the number of entries, and the first of them."""
    if not entries:
        return []
    more = [f"    ... and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [f"  {title} ({len(entries)}):", *(f"    {entry}" for entry in entries[:_SHOWN]), *more]
