"""Checkpoints between layouts: every number arrives where it belongs, runs continue, and failures are everybody's.

Mutations that each make a test here fail (tried by hand): moments saved without their parameter's placements; gate and
up rows not interleaved; the dropout streams not restored; a failure of one rank not told to the others; the comparison
of replicas dropped, or made over the wrong group.
"""

import contextlib
import io
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.checkpoint import (
    CheckpointError,
    checkpointing,
    folders,
    load_checkpoint,
    read_tracker,
    save_checkpoint,
    verify_replicas,
)
from megatron_lite.distributed import DistributedDataParallelConfig
from megatron_lite.inference.generate import generate
from megatron_lite.inference.load_model import load_model
from megatron_lite.inference.sampling import SamplingConfig
from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron_lite.tensor_parallel.parameters import local
from megatron_lite.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron_lite.tokenizers import TokenizerConfig
from megatron_lite.training.setup import build_model
from megatron_lite.training.step import train_step
from tests.parallel.layouts import SEED, SEQUENCE, VOCABULARY, Layout, gpt_config, micro_batches, transformer_config
from tests.parallel.pool import WorkerPool

MODEL: dict[str, Any] = {"tied": False, "swiglu": True, "query_groups": 4}
LAYOUTS = [
    Layout(**MODEL),
    Layout(tp=2, **MODEL),
    Layout(tp=4, **MODEL),
    Layout(dp=4, strategy="optim", **MODEL),
    Layout(dp=3, strategy="optim_grads_params", **MODEL),
    Layout(tp=2, sp=True, dp=2, strategy="optim", **MODEL),
    Layout(tp=2, dp=3, strategy="optim_grads_params", **MODEL),
    Layout(tp=2, sp=True, dp=2, strategy="no_shard", **MODEL),
    Layout(tp=2, dp=4, strategy="optim", replicas=2, **MODEL),
]
# Each reads what each has saved; the others too with --full-matrix, and in test_resharding.py.
BY_DEFAULT = (LAYOUTS[0], LAYOUTS[4], LAYOUTS[5])


def build(layout: Layout, dropout: float = 0.0) -> tuple[nn.Module, MegatronOptimizer]:
    """The model of `layout` with Adam, in this world."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        num_distributed_optimizer_instances=layout.dp if layout.strategy == "no_shard" else layout.replicas,
    )
    random.seed(SEED)
    np.random.seed(SEED)
    model_parallel_cuda_manual_seed(SEED)
    config = transformer_config(layout)
    config.hidden_dropout = config.attention_dropout = dropout
    (model,) = build_model(
        config,
        gpt_config(layout),
        DistributedDataParallelConfig(
            data_parallel_sharding_strategy=layout.strategy, num_distributed_optimizer_instances=layout.replicas
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        device=torch.device("cpu"),
        seed=SEED,
    )
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.01, clip_grad=1.0), model)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return model, optimizer


def labels(name: str, number: int, shape: torch.Size) -> Tensor:
    """A whole tensor whose every element is unique in the checkpoint."""
    return torch.arange(shape.numel(), dtype=torch.float64).view(shape) + 1_000_000 * number


def labelled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: labels(name, number, tensor.shape) for number, (name, tensor) in enumerate(sorted(tensors.items()))}


def my_part(whole: Tensor, tensor: Tensor, layout: Layout) -> Tensor:
    """What this rank should hold of `whole`, from the layout alone: first the slice of TP, then FSDP's chunk."""
    local_shape = local(tensor).shape
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for dim, (size, mine) in enumerate(zip(whole.shape, local_shape, strict=True)):
        sharded_over_tp = (dim == 1 and mine != size) or (dim == 0 and _is_split_by_rows(tensor))
        if layout.tp > 1 and sharded_over_tp:
            whole = whole.chunk(layout.tp, dim)[tp_rank]
    shards = 1 if layout.strategy == "no_shard" else layout.dp // layout.replicas
    if shards > 1 and whole.dim() > 0:
        chunks = whole.chunk(shards, 0)
        rank = parallel_state.get_data_parallel_rank() % shards
        whole = chunks[rank] if rank < len(chunks) else whole[:0]
    return whole


def _is_split_by_rows(tensor: Tensor) -> bool:
    names = getattr(tensor, "device_mesh", None)
    if names is None or "tp" not in (tensor.device_mesh.mesh_dim_names or ()):  # type: ignore[attr-defined]
        return False
    return tensor.placements[-1].dim == 0  # type: ignore[attr-defined]


def everything(model: nn.Module, optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """Weights and optimizer state by name; step counters are plain scalars."""
    return model.state_dict() | optimizer.state_dict()


def save_labels(rank: int, world_size: int, layout: Layout, root: str) -> None:
    model, optimizer = build(layout)
    tensors = everything(model, optimizer)
    with torch.no_grad():
        for name, whole in labelled(tensors).items():
            local(tensors[name]).copy_(my_part(whole, tensors[name], layout))
    save_checkpoint(root, 5, model, optimizer, {"from": layout.name}, config_dict={})


def load_labels(rank: int, world_size: int, layout: Layout, roots: list[str]) -> list[str]:
    """The tensors that arrived wrong, of any of the checkpoints."""
    model, optimizer = build(layout)
    tensors = everything(model, optimizer)
    expected = {n: my_part(whole, tensors[n], layout) for n, whole in labelled(tensors).items()}
    wrong = []
    for root in roots:
        with torch.no_grad():
            for tensor in tensors.values():
                local(tensor).fill_(-1)
        state = load_checkpoint(root, model, optimizer)
        assert state is not None
        assert state.iteration == 5
        found = everything(model, optimizer)
        for name, part in expected.items():
            tensor = local(found[name])
            if not torch.equal(tensor, part.to(tensor.dtype)):
                wrong.append(f"{name} from {state.extra['from']}")
    return wrong


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One checkpoint of labels from every layout."""
    roots = []
    for layout in LAYOUTS if request.config.getoption("--full-matrix") else BY_DEFAULT:
        root = str(tmp_path_factory.mktemp(layout.name))
        pool.run(save_labels, layout, root, world_size=layout.world_size)
        roots.append(root)
    return roots


@pytest.mark.parametrize(
    "layout",
    [pytest.param(one, id=one.name, marks=() if one in BY_DEFAULT else pytest.mark.full) for one in LAYOUTS],
)
def test_every_number_arrives_from_every_layout(pool: WorkerPool, saved: list[str], layout: Layout) -> None:
    for wrong in pool.run(load_labels, layout, saved, world_size=layout.world_size):
        assert wrong == []


def test_the_stored_values_do_not_depend_on_the_layout(saved: list[str]) -> None:
    """Read by plain DCP tools: whole tensors, under the names of the model, in the order of the whole model."""
    from megatron_lite.checkpoint.safe_reader import SafeFileSystemReader, tensor_shapes
    from megatron_lite.checkpoint.tensor_files import read_tensors

    contents = []
    for root in saved:
        reader = SafeFileSystemReader(folders.checkpoint_folder(root, 5))
        shapes = {n: s for n, s in tensor_shapes(reader.metadata).items() if not n.startswith("rng.")}
        tensors = {name: torch.full(shape, -1.0, dtype=torch.float64) for name, shape in shapes.items()}
        read_tensors(reader, tensors)
        contents.append(tensors)
    for tensors in contents[1:]:
        assert tensors.keys() == contents[0].keys()
        assert all(torch.equal(tensor, contents[0][name]) for name, tensor in tensors.items())
    names = contents[0].keys()
    assert "model.decoder.layers.1.mlp.linear_fc1.weight" in names
    assert "optimizer.state.decoder.layers.0.self_attention.linear_qkv.bias.exp_avg_sq" in names


def train(model: nn.Module, optimizer: MegatronOptimizer, layout: Layout, steps: range) -> list[tuple[float, float]]:
    """(loss, norm) of each step."""
    results = []
    tp_group = parallel_state.get_tensor_model_parallel_group()
    dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    assert tp_group is not None
    assert dp_cp_group is not None
    for step in steps:
        output = train_step(
            model,
            optimizer,
            micro_batches(layout, step, parallel_state.get_data_parallel_rank()),
            tp_group=tp_group,
            dp_cp_group=dp_cp_group,
        )
        results.append((output.loss.item(), output.grad_norm.item()))
    return results


def run_and_save(rank: int, world_size: int, layout: Layout, root: str, dropout: float) -> Any:
    model, optimizer = build(layout, dropout)
    train(model, optimizer, layout, range(3))
    save_checkpoint(root, 3, model, optimizer, {}, config_dict={})
    results = train(model, optimizer, layout, range(3, 6))
    return results, [local(p.detach()).clone() for p in model.parameters()]


def load_and_run(rank: int, world_size: int, layout: Layout, root: str, dropout: float) -> Any:
    model, optimizer = build(layout, dropout)
    assert load_checkpoint(root, model, optimizer) is not None
    results = train(model, optimizer, layout, range(3, 6))
    return results, [local(p.detach()).clone() for p in model.parameters()]


@pytest.mark.full
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[4], LAYOUTS[5], LAYOUTS[8]], ids=lambda x: x.name)
def test_a_resumed_run_is_bit_exact_with_dropout(pool: WorkerPool, tmp_path: Path, layout: Layout) -> None:
    whole = pool.run(run_and_save, layout, str(tmp_path), 0.1, world_size=layout.world_size)
    resumed = pool.run(load_and_run, layout, str(tmp_path), 0.1, world_size=layout.world_size)
    for (expected, weights), (found, found_weights) in zip(whole, resumed, strict=True):
        assert found == expected
        assert all(torch.equal(a, b) for a, b in zip(weights, found_weights, strict=True))


@pytest.mark.parametrize(
    "target",
    [LAYOUTS[2], LAYOUTS[7], *(pytest.param(LAYOUTS[number], marks=pytest.mark.full) for number in (0, 4))],
    ids=lambda layout: layout.name,
)
def test_a_run_moved_to_another_layout_continues_to_rounding(
    pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory, target: Layout
) -> None:
    source = LAYOUTS[5]
    root = str(tmp_path_factory.mktemp("moved"))
    expected, _ = pool.run(run_and_save, source, root, 0.0, world_size=source.world_size)[0]
    found, _ = pool.run(load_and_run, target, root, 0.0, world_size=target.world_size)[0]
    assert found == [pytest.approx(numbers, rel=1e-9) for numbers in expected]


def load_weights_and_step_by_zero(rank: int, world_size: int, layout: Layout, root: str) -> bool:
    """Whether the weights of the file survive a step that should change nothing."""
    model, optimizer = build(layout)
    train(model, optimizer, layout, range(2))
    assert load_checkpoint(root, model, optimizer, finetune=True) is not None
    loaded = [local(p.detach()).clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, layout, range(2, 3))
    return all(torch.equal(local(p.detach()), weight) for p, weight in zip(model.parameters(), loaded, strict=True))


def test_no_stale_master_overwrites_loaded_weights(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(run_and_save, LAYOUTS[1], str(tmp_path), 0.0, world_size=2)
    layout = Layout(dp=2, strategy="optim", **MODEL)
    assert pool.run(load_weights_and_step_by_zero, layout, str(tmp_path), world_size=2) == [True, True]


def save_with_settings(rank: int, world_size: int, root: str) -> None:
    layout = Layout(tp=2, sp=True, dp=2, strategy="optim", swiglu=True, positions="rope")
    model, optimizer = build(layout)
    run = RunConfig(
        transformer=transformer_config(layout),
        gpt=gpt_config(layout),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1),
    )
    save_checkpoint(root, 1, model, optimizer, {}, config_dict=run.to_dict())


def write(rank: int, world_size: int, root: str) -> Tensor:
    """Tokens written by a model split over all ranks."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model = load_model(root, tensor_model_parallel_size=world_size).model
    return generate(model, torch.tensor([[3, 1, 4]]), 10, SamplingConfig(temperature=0.5))


def test_a_run_of_four_ranks_writes_the_same_text_on_one_and_on_two(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_with_settings, str(tmp_path), world_size=4)
    one = generate(load_model(tmp_path).model, torch.tensor([[3, 1, 4]]), 10, SamplingConfig(temperature=0.5))
    assert one.shape == (1, 13)
    for tokens in pool.run(write, str(tmp_path), world_size=2):
        assert torch.equal(tokens, one)


def save_with_a_failure(rank: int, world_size: int, root: str, where: str) -> str:
    model, optimizer = build(Layout(tp=2, dp=2, strategy="optim"))
    save_checkpoint(root, 1, model, optimizer, {}, config_dict={})

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    def die(*arguments: Any, **options: Any) -> Any:
        raise KeyError("lost")

    with pytest.MonkeyPatch.context() as patch:
        if where == "writing" and rank == 3:
            patch.setattr(dcp.FileSystemWriter, "write_data", fail)
        if where == "collecting" and rank == 2:
            patch.setattr(checkpointing, "get_rng_state", die)
        if where == "publishing" and rank == 0:
            patch.setattr(folders, "publish", fail)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(root, 2, model, optimizer, {}, config_dict={})
    # The ranks are still in step: the next save works.
    save_checkpoint(root, 3, model, optimizer, {}, config_dict={})
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("writing", "rank 3: OSError: [Errno 28] No space left on device"),
        ("collecting", "rank 2: KeyError: 'lost'"),
        ("publishing", "rank 0: OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_failure_on_one_rank_fails_the_save_on_all(
    pool: WorkerPool, tmp_path: Path, where: str, complaint: str
) -> None:
    messages = pool.run(save_with_a_failure, str(tmp_path), where, world_size=4)
    assert len(messages) == 4
    for message in messages:
        assert complaint in message
        assert "Earlier checkpoints" in message
        assert "untouched: 1." in message
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", "iter_0000003", folders.TRACKER]
    assert read_tracker(tmp_path) == 3


def load_into_another_model(rank: int, world_size: int, root: str) -> str:
    model, optimizer = build(Layout(tp=2, tied=False))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(root, model, optimizer)
    return str(caught.value)


def test_another_model_is_refused_on_every_rank(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(run_and_save, Layout(tp=2), str(tmp_path), 0.0, world_size=2)
    for message in pool.run(load_into_another_model, str(tmp_path), world_size=2):
        assert "not in the checkpoint (4):" in message
        assert "model.output_layer.weight" in message
        assert "optimizer.state.output_layer.weight.exp_avg_sq" in message
        assert message.endswith("or another --load.")


def drift(rank: int, world_size: int, layout: Layout, name: str, drifting: int, root: str) -> str:
    """What a save says after one element of one rank's copy has changed by one bit."""
    model, optimizer = build(layout)
    groups = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "replicate_group": parallel_state.get_dense_mesh()["dp_replicate"].get_group(),
        "data_parallel_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    verify_replicas(model, **groups)
    first = local({**dict(model.named_parameters()), **dict(model.named_buffers())}[name].detach()).view(-1)[:1]
    if rank == drifting:
        first.copy_(torch.nextafter(first, torch.full_like(first, 9.0)))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        save_checkpoint(root, 1, model, optimizer, {}, config_dict={})
    assert read_tracker(root) == 1
    with pytest.raises(CheckpointError) as caught:
        verify_replicas(model, **groups)
    if rank == 0:
        assert "WARNING" in said.getvalue()
        assert str(caught.value) in said.getvalue()
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "name", "whose"),
    [
        (Layout(tp=2), "decoder.final_layernorm.weight", "tensor parallel ranks"),
        (Layout(tp=2, dp=2, strategy="optim"), "decoder.layers.1.mlp.linear_fc2.bias", "tensor parallel ranks"),
        (Layout(dp=2), "decoder.layers.0.mlp.linear_fc1.weight", "replicas of the model"),
        (Layout(moe="bias", dp=2, strategy="optim"), "decoder.layers.1.mlp.router.expert_bias", "data parallel ranks"),
    ],
    ids=["tp2", "tp2-dp2", "dp2", "buffer"],
)
def test_replicas_that_drifted_apart_are_named(
    pool: WorkerPool, tmp_path: Path, layout: Layout, name: str, whose: str
) -> None:
    """A save says the same. Mutation: `_warn_of_drift` without the data parallel group misses the buffer."""
    for message in pool.run(drift, layout, name, 1, str(tmp_path), world_size=layout.world_size):
        assert f"the {whose} should hold equal copies of {name}, but they differ" in message
