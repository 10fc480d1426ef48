"""Weights of Hugging Face folders at many layouts: each rank reads its slices, and the logits are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.checkpoint import CheckpointError
from megatron_lite.checkpoint.huggingface import architecture_of, flags_of, load_huggingface, read_config
from megatron_lite.distributed import DistributedDataParallelConfig
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron_lite.training.setup import build_model
from tests.parallel.pool import WorkerPool

tiny_models = pytest.importorskip("tests.unit.checkpoint.huggingface.tiny_models", reason="needs transformers")

SIZES = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "ep": "expert_model_parallel_size"}
TOLERANCE = 1e-5


def logits(rank: int, world_size: int, folder: str, ids: Tensor, layout: dict[str, int], strategy: str) -> Any:
    """[b, s, V] of a model at a layout, loaded from a folder, on the ranks that have the output layer."""
    sizes = {SIZES[name]: size for name, size in layout.items()}
    copies = world_size // layout.get("tp", 1) // layout.get("pp", 1) if strategy == "no_shard" else 1
    parallel_state.initialize_model_parallel(**sizes, num_distributed_optimizer_instances=copies)
    model_parallel_cuda_manual_seed(1)
    family, config = read_config(folder)
    settings = flags_of(family, config)
    settings["transformer"] |= sizes
    if settings["transformer"].get("num_moe_experts"):
        settings["transformer"]["moe_token_dispatcher_type"] = "alltoall"
    ours = architecture_of(settings)
    (model,) = build_model(
        ours.transformer,
        ours.gpt,
        DistributedDataParallelConfig(data_parallel_sharding_strategy=strategy),
        vocab_size=tiny_models.VOCAB,
        max_sequence_length=tiny_models.LENGTH,
        device=torch.device("cpu"),
        seed=1,
    )
    load_huggingface(folder, model)
    assert isinstance(model, GPTModel)
    return _forward(model.eval(), ids)


@torch.no_grad()
def _forward(model: GPTModel, ids: Tensor) -> Tensor | None:
    """Through all pipeline stages, one rank after the other."""
    positions = torch.arange(ids.size(1)).repeat(ids.size(0), 1)
    hidden = None
    if not model.pre_process:
        hidden = torch.empty(ids.size(1), ids.size(0), model.config.hidden_size)
        dist.recv(hidden, src=dist.get_rank() - 1)
    output = model(ids, positions, decoder_input=hidden)
    if not model.post_process:
        dist.send(output, dst=dist.get_rank() + 1)
        return None
    group, size = model.tp_group, parallel_state.get_tensor_model_parallel_world_size()
    parts = [torch.empty_like(output) for _ in range(size)]
    dist.all_gather(parts, output.contiguous(), group=group)
    return torch.cat(parts, dim=-1)[..., : model.vocab_size]


CASES = [
    *((name, {"tp": 2}, 2, "no_shard") for name in tiny_models.MODELS),
    *((name, {"ep": 2}, 2, "no_shard") for name in tiny_models.WITH_EXPERTS),
    ("qwen3", {"pp": 2}, 2, "no_shard"),  # tied: the last stage has a copy of the embeddings
    ("gpt_oss", {"pp": 2}, 2, "no_shard"),
    ("llama3", {"tp": 4}, 4, "no_shard"),  # fewer query groups than ranks
    ("gpt2", {"tp": 2}, 4, "optim_grads_params"),
    ("llama3", {"tp": 2}, 4, "optim_grads_params"),
    ("mixtral", {"ep": 2}, 4, "optim_grads_params"),
    ("deepseek_v3", {"tp": 2, "ep": 2}, 4, "optim_grads_params"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Of each model a folder, and its logits."""
    found = {}
    for name in tiny_models.MODELS:
        folder = tmp_path_factory.mktemp("hf") / name.replace(" ", "_")
        found[name] = (folder, tiny_models.logits_of(tiny_models.save(name, folder)))
    return found


@pytest.mark.parametrize(
    ("name", "layout", "world_size", "strategy"),
    CASES,
    ids=[f"{name}-{'-'.join(f'{k}{v}' for k, v in layout.items())}-{size}-{how}" for name, layout, size, how in CASES],
)
def test_logits_equal_those_of_transformers(
    pool: WorkerPool,
    saved: dict[str, tuple[Path, Tensor]],
    name: str,
    layout: dict[str, int],
    world_size: int,
    strategy: str,
) -> None:
    """Mutations: keys and values exchanged; gates and ups exchanged; heads instead of query groups counted; a stretch
    of rows read from the beginning of theirs; the index within the rank's part not shifted; experts of the first rank
    on all; FSDP's chunk taken before the tensor parallel one.
    """
    folder, expected = saved[name]
    results = pool.run(logits, str(folder), tiny_models.tokens(), layout, strategy, world_size=world_size)
    found = [one for one in results if one is not None]
    assert found
    assert max(tiny_models.difference(one, expected) for one in found) < TOLERANCE


def refused(rank: int, world_size: int, folder: str, ids: Tensor) -> str:
    """What a rank says of a folder with a fault that one of the two would not see."""
    with pytest.raises(CheckpointError) as caught:
        logits(rank, world_size, folder, ids, {"pp": 2}, "no_shard")
    return str(caught.value)


def test_a_fault_that_one_rank_sees_stops_all(pool: WorkerPool, tmp_path: Path) -> None:
    """A tensor is missing that only the last of two pipeline stages reads; all ranks say so, and none waits.

    Mutations: comparing without agreement of the ranks; the names that other ranks want counted as of no use.
    """
    from safetensors.torch import load_file, save_file

    tiny_models.save("llama2", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    for message in pool.run(refused, str(tmp_path), tiny_models.tokens(), world_size=2):
        assert "not in the folder (1)" in message
        assert "model.layers.1.mlp.up_proj.weight" in message
        assert "of no use" not in message
