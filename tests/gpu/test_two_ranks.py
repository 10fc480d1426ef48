"""Two ranks that share one GPU and communicate by gloo train what one rank trains.

So the code for GPUs meets collectives where there is one GPU only: NCCL wants one for each rank. With --tp-comm-overlap
that is the ring; torch's operators want a GPU for each rank too (tests/gpu/test_overlap.py calls them). pytest -m gpu
"""

from pathlib import Path

import pytest
import torch

from tests.e2e.commands import TINY, pretrain_command, run, training_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
BACKEND = "cuda:gloo"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall --swiglu"
LAYOUTS = {
    "tp": "--tensor-model-parallel-size 2",
    "tp sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "tp sp overlap": "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap",
    "tp sp overlap compiled": "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap --compile",
    "tp sp compiled": "--tensor-model-parallel-size 2 --sequence-parallel --compile",
    "cp": "--context-parallel-size 2",
    "dp optim": "--data-parallel-sharding-strategy optim",
    "dp optim_grads_params": "--data-parallel-sharding-strategy optim_grads_params",
}


def losses(tmp_path: Path, processes: int, *words: str) -> list[tuple[float, ...]]:
    metrics = tmp_path / f"{processes}.jsonl"
    further = ["--train-iters", "4", "--eval-iters", "0", "--position-embedding-type", "rope", "--no-compile"]
    further += ["--hidden-dropout", "0", "--attention-dropout", "0", "--distributed-backend", BACKEND]
    run(pretrain_command(processes, [*TINY, *further, "--metrics-jsonl", str(metrics), *words]))
    return training_metrics(metrics, "lm_loss", "grad_norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense(layout: str, tmp_path: Path) -> None:
    """Mutations: any of a layout's collectives left out, as in tests/parallel/test_mutations.py."""
    one, two = losses(tmp_path, 1), losses(tmp_path, 2, *LAYOUTS[layout].split())
    assert len(one) == 4
    for wanted, found in zip(one, two, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "layout", ["--expert-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"]
)
def test_experts(layout: str, tmp_path: Path) -> None:
    """Tokens travel by all-to-all between the two."""
    one, two = losses(tmp_path, 1, *EXPERTS.split()), losses(tmp_path, 2, *EXPERTS.split(), *layout.split())
    for wanted, found in zip(one, two, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
