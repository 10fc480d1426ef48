"""Runs a program as Python or torchrun would, with torch imported already: most of a short run is that.

The ranks are forked from a server, get torchrun's environment, and are ended together if one of them fails. What
torchrun itself does is tested where a run is killed, told to stop, or started as the documentation says.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
PRELOADED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "megatron_lite.pipeline_parallel.pipelined",
    "megatron_lite.training.checkpointing",
    "megatron_lite.training.setup",
]


def launch(
    processes: int,
    arguments: list[str],
    output: Path,
    environment: dict[str, str],
    timeout: float,
    program: str = "pretrain_gpt.py",
    folder: Path = REPOSITORY,
) -> int:
    """Run a program in a folder on so many ranks, what they print going to a file; returns the exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[BaseProcess] = []
    for rank in range(processes):
        variables = dict(environment)
        if processes > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            variables |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(context.Process(target=_run, args=(program, arguments, str(folder), str(output), variables)))
    of_server = {name: environment[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH")}
    with mock.patch.dict(os.environ, of_server):  # the first start is the server's too
        for process in ranks:
            process.start()
    return _wait(ranks, timeout)


def _wait(ranks: list[BaseProcess], timeout: float) -> int:
    """The exit status of the first rank that failed, or 0. As under torchrun the others do not outlive it."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks):
        failed = [process.exitcode for process in ranks if process.exitcode]
        if failed or time.monotonic() > deadline:
            for process in ranks:
                process.kill()
                process.join()
            assert failed, f"the run did not end within {timeout:.0f} s"
            return failed[0] or 0
        time.sleep(0.02)
    for process in ranks:
        process.join()
    return next((process.exitcode for process in ranks if process.exitcode), 0)


def _run(program: str, arguments: list[str], folder: str, output: str, environment: dict[str, str]) -> None:
    """One rank, from its first line to its last."""
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")
