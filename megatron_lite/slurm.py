"""Ranks that srun starts without torchrun: SLURM's variables as torchrun's."""

import os
import re
from collections.abc import MutableMapping

from megatron_lite.errors import ConfigError


def take_slurm_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Under `srun python ...` with several tasks set what torchrun would: RANK, WORLD_SIZE, MASTER_ADDR and others.

    Other variables than RANK and WORLD_SIZE are left as they are where they are set. Does nothing under torchrun, and
    where the step has one task, such as in a batch script itself.

    Raises:
        ConfigError: SLURM says nothing of the nodes, and MASTER_ADDR is not set.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks == "1":
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if not nodes and "MASTER_ADDR" not in environment:
        raise ConfigError(
            f"srun started {tasks} tasks, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST says on which nodes: "
            "set MASTER_ADDR to the host of the first task, or start with torchrun."
        )
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.update({"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": tasks})
    found = {
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(nodes),
        # The same for all tasks of a step, and another for most steps and jobs that share a node.
        "MASTER_PORT": str(20000 + (job + 101 * step) % 10000),
    }
    # For example 8(x3),4: tasks of three nodes and of one more. Their number here decides about CPU threads alone.
    if per_node := re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        found["LOCAL_WORLD_SIZE"] = per_node.group()
    for name, value in found.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name in SLURM's list of nodes: gpu03 of `gpu[03-05,09],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "the pattern matches an empty list too"
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
