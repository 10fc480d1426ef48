"""The training step on a GPU: no host waits, the CPU's numbers, and the speed of compiled layers' graphs.

pytest -m gpu
"""

from typing import Any

import pytest
import torch

from megatron_lite import parallel_state
from megatron_lite.distributed import DistributedDataParallelConfig
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_lite.training.setup import build_model
from megatron_lite.training.step import train_step
from megatron_lite.transformer.transformer_config import TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
SEQUENCE, VOCABULARY = 128, 1000


@pytest.fixture
def groups():
    """A world of one process on NCCL."""
    parallel_state.initialize_model_parallel()
    yield {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    parallel_state.shutdown()


def small_model(
    device: torch.device, compile_layers: bool = False, optimizer: dict[str, Any] | None = None, **settings: bool | str
):
    """Two layers and an optimizer."""
    config = TransformerConfig(
        num_layers=2, hidden_size=256, num_attention_heads=4, normalization="RMSNorm", swiglu=True, **settings
    )
    gpt = GPTModelConfig(position_embedding_type="rope")
    (model,) = build_model(
        config,
        gpt,
        DistributedDataParallelConfig(),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        device=device,
        seed=7,
        compile_layers=compile_layers,
    )
    chosen = OptimizerConfig(lr=1e-3, fp16=settings.get("fp16", False), **(optimizer or {}))
    return model, get_megatron_optimizer(chosen, model)


def batch(step: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Four sequences with a loss mask that is not full."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, VOCABULARY, (4, SEQUENCE + 1), generator=generator)
    mask = (torch.rand(4, SEQUENCE, generator=generator) < 0.7).float()
    positions = torch.arange(SEQUENCE).repeat(4, 1)
    whole = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in whole.items()}


MUON = {"optimizer": "muon", "muon_extra_scale_factor": 0.2, "muon_nesterov": True}
LOW_MOMENTS = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize(
    ("precision", "compile_layers", "chosen"),
    [(precision, compiled, {}) for precision in ("fp32", "bf16", "fp16") for compiled in (False, True)]
    + [("bf16", False, MUON), ("fp16", False, MUON), ("bf16", False, LOW_MOMENTS)],
    ids=str,
)
def test_no_host_wait(groups, precision, compile_layers, chosen):
    """With torch's synchronization check on "error", a step between log lines passes.

    Mutation: `.item()` on any scalar of the step, or a boolean index, raises.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    flags = {} if precision == "fp32" else {precision: True}
    model, optimizer = small_model(device, compile_layers, chosen, **flags)
    batches = [batch(1, device), batch(2, device)]
    for _ in range(3):
        train_step(model, optimizer, batches, **groups)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = train_step(model, optimizer, batches, **groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(output.loss).item()


@pytest.mark.parametrize(
    ("chosen", "bound"), [({}, 1e-4), (MUON, 1e-3), (LOW_MOMENTS, 1e-3)], ids=["adam", "muon", "low"]
)
def test_losses_equal_the_cpu(chosen, bound):
    """Five steps in float32 from the same weights (drawn on the CPU): the GPU's losses are the CPU's to rounding.

    Muon's products are rounded to bfloat16, the low moments after each step.
    """
    torch.backends.cuda.matmul.allow_tf32 = False

    def losses(backend: str, device: torch.device) -> list[float]:
        parallel_state.initialize_torch_distributed(backend=backend)
        parallel_state.initialize_model_parallel()
        try:
            model, optimizer = small_model(device, False, chosen, use_cpu_initialization=True)
            groups = {
                "tp_group": parallel_state.get_tensor_model_parallel_group(),
                "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
            }
            return [train_step(model, optimizer, [batch(0, device)], **groups).loss.item() for _ in range(5)]
        finally:
            parallel_state.shutdown()

    on_gpu = losses("nccl", torch.device("cuda", torch.cuda.current_device()))
    on_cpu = losses("gloo", torch.device("cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=bound)
    assert on_gpu[-1] < on_gpu[0]


@pytest.mark.parametrize("backend", ["auto", "flash", "fused", "unfused"])
def test_attention_backends_agree(groups, backend):
    """Each attention backend gives the loss of plain math in bfloat16, to bfloat16's rounding."""
    device = torch.device("cuda", torch.cuda.current_device())

    def loss(name: str) -> float:
        config = TransformerConfig(
            num_layers=2, hidden_size=256, num_attention_heads=4, bf16=True, attention_backend=name
        )
        (model,) = build_model(
            config,
            GPTModelConfig(position_embedding_type="rope"),
            DistributedDataParallelConfig(),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            device=device,
            seed=7,
        )
        optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3), model)
        return train_step(model, optimizer, [batch(0, device)], **groups).loss.item()

    assert loss(backend) == pytest.approx(loss("unfused"), rel=2e-3)
