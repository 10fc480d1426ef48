"""Process groups as values: the collection a model is built with, and sizes that also hold for no group at all."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

GLOO_ON_GPU = "cpu:gloo,cuda:gloo"
"""The backend of processes that compute on a GPU and communicate by gloo, several of them on one GPU if need be."""


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks in `group`; 1 when there is none (a single process)."""
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    """This process's rank in `group`; 0 when there is none (a single process)."""
    return 0 if group is None else group.rank()


def device_type_of(group: ProcessGroup | None = None) -> str:
    """ "cuda" where the tensors that a group (default: of all ranks) exchanges are on GPUs, else "cpu"."""
    backend = dist.get_backend(group)
    if backend == "undefined":  # init_process_group without a backend: one for each kind of device that is there
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if "nccl" in backend or "cuda:" in backend else "cpu"


def computes_on_gpu() -> bool:
    """Return True if this process computes on a GPU: where its ranks exchange tensors; without ranks, if there is one.

    What asks for a GPU that the machine has, and the run does not use, makes a context there, some 500 MB a process.
    """
    return device_type_of() == "cuda" if dist.is_initialized() else torch.cuda.is_available()


@dataclass
class ProcessGroupCollection:
    """The process groups a model, its optimizer and its schedule are built with, under Megatron's names.

    A group that is None stands for this process alone. `intra_*` groups hold the shards of one distributed
    optimizer instance, `inter_*` groups the replicas of one shard.
    """

    tp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    mp: ProcessGroup | None = None
    embd: ProcessGroup | None = None
    pos_embd: ProcessGroup | None = None
    cp: ProcessGroup | None = None
    tp_cp: ProcessGroup | None = None
    hcp: list[ProcessGroup] | None = None
    ep: ProcessGroup | None = None
    expt_tp: ProcessGroup | None = None
    tp_ep: ProcessGroup | None = None
    tp_ep_pp: ProcessGroup | None = None
    tp_dp: ProcessGroup | None = None
    tp_dp_cp: ProcessGroup | None = None
    dp: ProcessGroup | None = None
    dp_cp: ProcessGroup | None = None
    expt_dp: ProcessGroup | None = None
    intra_dp_cp: ProcessGroup | None = None
    inter_dp_cp: ProcessGroup | None = None
    intra_expt_dp: ProcessGroup | None = None
    intra_dist_opt: ProcessGroup | None = None
    inter_dist_opt: ProcessGroup | None = None

    @classmethod
    def use_mpu_process_groups(cls, required_pgs: Sequence[str] | None = None) -> "ProcessGroupCollection":
        """The groups `parallel_state.initialize_model_parallel` made; all None before it ran.

        Args:
            required_pgs: names to fill in; all of them when left out.

        Raises:
            ValueError: a name that is not a field of this class.
        """
        from megatron_lite import parallel_state  # parallel_state uses group_size and group_rank from here

        known = [field.name for field in fields(cls)]
        names = known if required_pgs is None else list(required_pgs)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such process group; the names are {', '.join(known)}.")
        if not parallel_state.is_initialized():
            return cls()
        groups: dict[str, Any] = {name: parallel_state.get_group(name) for name in names}
        return cls(**groups)
