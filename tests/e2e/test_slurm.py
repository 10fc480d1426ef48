"""The batch script without SLURM: what it starts, and how a job ends. tests/slurm/run.sh has a real cluster."""

from pathlib import Path

import pytest

from tests.e2e.batch_script import submit

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("ranks", "variables"),
    [
        pytest.param("8", {"SLURM_GPUS_PER_NODE": "8"}, id="GPUs"),
        pytest.param("4", {"SLURM_GPUS_PER_NODE": "h100:4"}, id="GPUs of a kind"),
        pytest.param("6", {"SLURM_GPUS_PER_NODE": "h100:4,a100:2"}, id="GPUs of two kinds"),
        pytest.param("4", {"SLURM_GPUS_ON_NODE": "4"}, id="GPUs asked for in another way"),
        pytest.param("1", {}, id="no GPUs in the cluster"),
        pytest.param(
            "1", {"SLURM_GPUS_PER_NODE": "0", "SLURM_GPUS_ON_NODE": "2"}, id="no GPUs on nodes that have some"
        ),
        pytest.param("3", {"SLURM_GPUS_PER_NODE": "0", "NPROC_PER_NODE": "3"}, id="number of ranks"),
        pytest.param("2", {"SLURM_GPUS_PER_NODE": "h100:8", "NPROC_PER_NODE": "2"}, id="fewer ranks than GPUs"),
    ],
)
def test_ranks_on_a_node(tmp_path, ranks, variables):
    """Mutations: the GPUs of a node before those asked for; only the first of two kinds."""
    job = submit(tmp_path, **variables)
    assert job.status == 0, job.output
    assert job.option("--nproc-per-node") == ranks
    assert job.option("--nnodes") == "2"


def test_jobs_that_share_a_node_meet_at_ports_of_their_own(tmp_path):
    """Within 10000 to 29999, whatever the number; a given port is taken as it is."""
    ports = [submit(tmp_path, SLURM_JOB_ID=job).option("--rdzv-endpoint") for job in ("7", "8", "67000019")]
    assert ports == ["node7:10007", "node7:10008", "node7:10019"]
    assert submit(tmp_path, MASTER_PORT="29500").option("--rdzv-endpoint") == "node7:29500"


def test_arguments_go_where_they_belong(tmp_path):
    """The preset, arguments of pretrain_gpt.py with blanks in them, and further ones of torchrun."""
    job = submit(tmp_path, "configs/llama3_70b.yaml", "--wandb-exp-name", "a b", TORCHRUN_ARGS="--max-restarts 3")
    assert job.option("--max-restarts") == "3"
    assert job.torchrun.index("--max-restarts") < job.torchrun.index("pretrain_gpt.py")
    assert job.pretraining[:2] == ["--config", "configs/llama3_70b.yaml"]
    assert job.pretraining[-2:] == ["--wandb-exp-name", "a b"]
    assert submit(tmp_path, "--train-iters", "3").pretraining[:2] == ["--config", "configs/llama3_8b.yaml"]


def test_the_environment_is_activated(tmp_path):
    """By a file that reads an unset variable, as those of conda do."""
    (tmp_path / "activate").write_text('[ -z "$NEVER_SET" ] && export NPROC_PER_NODE=5')
    assert submit(tmp_path, ACTIVATE=str(tmp_path / "activate")).option("--nproc-per-node") == "5"


@pytest.mark.parametrize(
    ("variables", "says"),
    [({"DATA_PATH": ""}, "DATA_PATH=/data/"), ({"TOKENIZER_MODEL": ""}, "TOKENIZER_MODEL=/data/")],
)
def test_what_is_missing_is_named(tmp_path, variables, says):
    job = submit(tmp_path, **variables)
    assert job.status != 0
    assert says in job.output
    assert job.torchrun == []


def test_another_folder_is_refused(tmp_path: Path):
    job = submit(tmp_path, start=tmp_path)
    assert job.status == 2
    assert f"There is no pretrain_gpt.py in {tmp_path}." in job.output


@pytest.mark.parametrize(
    ("requeued", "case"),
    [
        pytest.param(False, {"time_limit": True}, id="saved before the time limit: COMPLETED, for afterok"),
        pytest.param(True, {"time_limit": True, "REQUEUE": "1"}, id="saved before the time limit, and goes on"),
        pytest.param(False, {"REQUEUE": "1"}, id="training done"),
        pytest.param(True, {"PREEMPT_TIME": "2026-01-31T12:00:00"}, id="saved within GraceTime"),
        pytest.param(False, {"PREEMPT_TIME": "2026-01-31T12:00:00", "JOB_STATE": "PENDING"}, id="requeued by SLURM"),
    ],
)
def test_a_job_that_saved_as_asked_is_completed_or_goes_on(tmp_path, requeued, case):
    """Mutations: SIGUSR1 not handed on; requeued whether asked or not; a torchrun that SIGTERM or SIGUSR1 ends."""
    job = submit(tmp_path, **case)
    assert job.status == 0, job.output
    assert ("srun got USR1" in job.output) == case.get("time_limit", False)
    assert ("requeued 1234" in job.output) == requeued


@pytest.mark.parametrize("time_limit", [False, True])
def test_a_job_that_failed_is_not_requeued(tmp_path, time_limit):
    job = submit(tmp_path, time_limit=time_limit, REQUEUE="1", SRUN_STATUS="3", PREEMPT_TIME="2026-01-31T12:00:00")
    assert job.status == 3
    assert "requeued" not in job.output
