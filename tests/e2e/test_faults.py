"""Runs in which a rank dies, hangs or is told to stop: they end with a report or a save, and go on by themselves."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, TINY, environment, pretrain, training_metrics

pytestmark = pytest.mark.e2e
NUMBERS = ("lm_loss", "grad_norm", "learning_rate", "consumed_samples")

# pretrain_gpt.py, in which `fault(run, iteration, rank)` happens before each iteration. `once(name)` is true at its
# first call in all attempts of all ranks.
BROKEN = """
import multiprocessing, os, runpy, signal, sys, time
from pathlib import Path
from megatron_lite.training import train

os.environ["LOCAL_WORLD_SIZE"] = "2"  # two nodes of one rank share this machine's cores too
original = train.one_iteration

def once(name):
    try:
        return Path({folder!r}, name).touch(exist_ok=False) is None
    except FileExistsError:
        return False

def fault(run, iteration, rank):
    {fault}

def one_iteration(run):
    fault(run, run.progress.iteration + 1, int(os.environ["RANK"]))
    original(run)

train.one_iteration = one_iteration
sys.argv[0] = "pretrain_gpt.py"
runpy.run_path("pretrain_gpt.py", run_name="__main__")
"""


def broken_script(folder: Path, fault: str) -> Path:
    """Write pretrain_gpt.py with a fault."""
    script = folder / "broken.py"
    script.write_text(BROKEN.format(fault=fault, folder=str(folder)))
    return script


def answers(host: str, port: int) -> bool:
    """Return True if something listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


class Nodes:
    """Two nodes of one run on this machine: a torchrun with one rank each."""

    def __init__(self, folder: Path, script: Path, *arguments: str, restarts: int, **variables: str) -> None:
        self._environment = environment(**variables)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            host, port = free.getsockname()
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}", "--rdzv-id=nodes", f"--max-restarts={restarts}"),
            # Seconds until a node that died is given up.
            "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=2",
            *(str(script), *arguments),
        ]
        self.outputs = [folder / f"node{node}.log" for node in range(2)]
        self.agents: list[subprocess.Popen[bytes]] = []
        self.start(0)
        self.wait_until(lambda: answers(host, port))  # the first node keeps the store
        self.start(1)

    def start(self, node: int) -> None:
        """Start a node's torchrun, for the first time or again."""
        with self.outputs[node].open("ab") as output:
            agent = subprocess.Popen(
                self._command,
                cwd=REPOSITORY,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.agents[node:] = [agent, *self.agents[node + 1 :]]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 240.0) -> None:
        """Wait while the nodes run."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)

    def printed(self) -> str:
        """The last of what both printed."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-5000:]}" for path in self.outputs)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait(timeout=60)


def torchrun(folder: Path, fault: str, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two ranks of pretrain_gpt.py with a fault, under torchrun."""
    script = broken_script(folder, fault)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += ["--signals-to-handle=SIGTERM,SIGUSR1"]  # which torchrun hands on to its ranks
    return subprocess.run(
        [*launcher, f"--max-restarts={restarts}", str(script), *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_rank_that_hangs_is_found_and_the_run_ends(tmp_path):
    """Rank 1 stands still before iteration 3, and rank 0 waits for it in the forward pass.

    Mutation: only the first rank ends.
    """
    fault = """
    if iteration == 3:
        run.hooks[-1].timeout_s = 3  # of the watchdog; from the start, that would be short for a busy machine
        time.sleep(1000 * rank)
"""
    done = torchrun(tmp_path, fault, *TINY, "--train-iters", "6", "--tensor-model-parallel-size", "2")
    assert done.returncode != 0
    assert "THE RUN HANGS: a rank has not moved for 3 s. Where the ranks are:" in done.stdout, done.stdout[-5000:]
    waiting = re.search(r"^  rank 0: (.*)$", done.stdout, re.MULTILINE)
    assert waiting is not None
    place = r"iteration 3, forward and backward, at tensor_parallel/\S+:\d+ \(\w+\)"
    assert re.fullmatch(place + ", waiting for the group tp of ranks 0, 1", waiting[1]), waiting[1]
    assert re.search(r"^  rank 1: iteration 2, between steps, at training/train.py:\d+ \(train\)$", done.stdout, re.M)
    assert "exitcode  : 3" in done.stdout


@pytest.mark.parametrize("sent", ["TERM", pytest.param("USR1", marks=pytest.mark.full)])
def test_signals_save_and_exit(tmp_path, sent):
    """To one rank of two, or to torchrun, which hands it on: both ranks finish their step, save, and leave.

    Mutation: a vote without its all-reduce leaves the other rank in a collective of the next step.
    """
    to_torchrun = sent == "USR1"
    target = "os.getppid()" if to_torchrun else "os.getpid()"
    fault = f"(iteration, rank) == (4, 0) and os.kill({target}, signal.SIG{sent})"
    arguments = [*TINY, "--train-iters", "100000", "--tensor-model-parallel-size", "2", "--exit-signal-handler"]
    done = torchrun(tmp_path, fault, *arguments, "--save", str(tmp_path / "ckpt"), "--save-interval", "100000")
    assert (done.returncode == 0) != to_torchrun, done.stdout[-3000:]
    assert f"exiting program after receiving SIG{sent}" in done.stdout
    tracker = int((tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= tracker < 100000


@pytest.mark.full  # two nodes do the same, and more
def test_a_killed_rank_is_started_again_by_torchrun(tmp_path):
    """Rank 1 is killed at iteration 6; the run goes on from iteration 4 by itself, with the numbers of one unbroken.

    Mutation: --load that does not find what the attempt before has saved.
    """
    arguments = [*TINY, "--train-iters", "8", "--tensor-model-parallel-size", "2", "--hidden-dropout", "0.1"]
    pretrain(2, *arguments, "--metrics-jsonl", str(tmp_path / "whole.jsonl"))
    folder = str(tmp_path / "ckpt")
    fault = "(iteration, rank) == (6, 1) and once('killed') and os.kill(os.getpid(), signal.SIGKILL)"
    saving = ["--save", folder, "--load", folder, "--save-interval", "4"]
    saving += ["--metrics-jsonl", str(tmp_path / "killed.jsonl")]
    done = torchrun(tmp_path, fault, *arguments, *saving, restarts=1)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"successfully loaded checkpoint from {folder} at iteration 4" in done.stdout
    whole, killed = (training_metrics(tmp_path / name, *NUMBERS) for name in ("whole.jsonl", "killed.jsonl"))
    assert killed == whole


KILLED = "rank == {rank} and iteration == {at} and once('killed {at}') and os.kill(os.getpid(), signal.SIGKILL)"
RAISED = "if rank == {rank} and iteration == {at} and once('raised {at}'): raise RuntimeError('on purpose')"
WORKER = "rank == {rank} and iteration == {at} and once('worker {at}') and multiprocessing.active_children()[0].kill()"


@pytest.mark.parametrize(
    "deaths",
    [
        pytest.param([(KILLED, 1), (WORKER, 0)], id="rank-and-worker"),
        pytest.param([(RAISED, 1), (KILLED, 0), (RAISED, 0), (WORKER, 1)], id="others", marks=pytest.mark.full),
    ],
)
def test_two_nodes_start_again_after_deaths_on_either(tmp_path, deaths):
    """Each death is counted by the torchrun of its node only, so the two never agree on the number of restarts.

    Data workers leave the exit signals to their rank, which must end all the same when it raises.

    Mutations: the store's prefix is TORCHELASTIC_RESTART_COUNT; the data workers are not killed at exit.
    """
    arguments = [*TINY, "--train-iters", "6", "--data-parallel-sharding-strategy", "no_shard"]
    arguments += ["--num-workers", "1", "--exit-signal-handler"]
    pretrain(2, *arguments, "--metrics-jsonl", str(tmp_path / "whole.jsonl"))
    fault = "\n    ".join(death.format(rank=rank, at=2 + number) for number, (death, rank) in enumerate(deaths))
    saving = ["--save", str(tmp_path / "ckpt"), "--load", str(tmp_path / "ckpt"), "--save-interval", "1"]
    saving += ["--metrics-jsonl", str(tmp_path / "broken.jsonl")]
    script = broken_script(tmp_path, fault)
    with Nodes(tmp_path, script, *arguments, *saving, restarts=len(deaths)) as nodes:
        nodes.wait_until(lambda: all(agent.poll() is not None for agent in nodes.agents))
        assert [agent.returncode for agent in nodes.agents] == [0, 0], nodes.printed()
    whole, broken = (training_metrics(tmp_path / name, *NUMBERS) for name in ("whole.jsonl", "broken.jsonl"))
    assert broken == whole


@pytest.mark.full
def test_ranks_do_not_outlive_their_torchrun(tmp_path):
    """The second node's torchrun is killed: its rank ends, and the run goes on when the node is started again.

    Mutation: the watchdog does not look for its parent.
    """
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    arguments = [*TINY, "--train-iters", "6", "--data-parallel-sharding-strategy", "no_shard"]
    pretrain(2, *arguments, "--metrics-jsonl", str(whole))
    saving = ["--save", str(tmp_path / "ckpt"), "--load", str(tmp_path / "ckpt"), "--save-interval", "1"]
    # Rank 1 stands still, and rank 0 waits for it, until the second torchrun is dead.
    fault = """
    if (iteration, rank) == (3, 1) and once("stood still"):
        time.sleep(1000)
"""
    script = broken_script(tmp_path, fault)
    # torchrun hands a node that is started again no address of the store that it shares with its ranks by default.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    saving += ["--metrics-jsonl", str(broken)]
    with Nodes(tmp_path, script, *arguments, *saving, restarts=1, **variables) as nodes:
        nodes.wait_until(lambda: (tmp_path / "stood still").exists())
        nodes.agents[1].kill()
        nodes.agents[1].wait()
        nodes.wait_until(lambda: "torchrun, which started this rank, is gone" in nodes.outputs[1].read_text())
        nodes.start(1)
        nodes.wait_until(lambda: all(agent.poll() is not None for agent in nodes.agents))
        assert [agent.returncode for agent in nodes.agents] == [0, 0], nodes.printed()
    assert training_metrics(broken, *NUMBERS) == training_metrics(whole, *NUMBERS)
