"""Ranks started by srun alone."""

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.slurm import first_host, take_slurm_environment

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
}


def test_srun_stands_for_torchrun() -> None:
    """Mutations: a variable left out, as LOCAL_RANK was, without which all ranks of a node take the first GPU."""
    environment = dict(STEP)
    take_slurm_environment(environment)
    assert {name: value for name, value in environment.items() if name not in STEP} == {
        "RANK": "9",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "24711",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        STEP | {"RANK": "2", "LOCAL_RANK": "2"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
    ],
    ids=["no SLURM", "torchrun in srun", "one task", "in a batch script"],
)
def test_nothing_is_set_elsewhere(environment: dict[str, str]) -> None:
    """Mutation: take SLURM_NTASKS, which a batch script, itself one process, sees too."""
    before = dict(environment)
    take_slurm_environment(environment)
    assert environment == before


def test_what_is_set_wins_and_what_is_missing_is_told() -> None:
    environment = {name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"}
    with pytest.raises(ConfigError, match=r"20 tasks.*SLURM_JOB_NODELIST.*set MASTER_ADDR"):
        take_slurm_environment(environment)
    environment |= {"MASTER_ADDR": "here", "MASTER_PORT": "1"}
    take_slurm_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("here", "1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu03,gpu04", "gpu03"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("r[1-2]n[08-10]-ib,r9", "r1n08-ib"),
        ("a,gpu[03-05]", "a"),
    ],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
