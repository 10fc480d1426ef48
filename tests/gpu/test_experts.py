"""Experts on a GPU: no host waits on one rank, the CPU's numbers, and backends of grouped products that agree.

pytest -m gpu
"""

from typing import Any

import pytest
import torch

from megatron_lite import parallel_state
from megatron_lite.distributed import DistributedDataParallelConfig
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.ops.grouped_linear import available_backends, grouped_linear
from megatron_lite.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_lite.training.setup import build_model
from megatron_lite.training.step import train_step
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.gpu.test_training_step import SEQUENCE, VOCABULARY, batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]

MIXTURES: dict[str, dict[str, Any]] = {
    "aux": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [1e-2, 1e-3]},
    "bias, shared experts": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 128,
        "moe_shared_expert_overlap": True,
        "moe_token_dispatcher_type": "alltoall",
    },
    "capacity": {"moe_expert_capacity_factor": 1.0, "moe_z_loss_coeff": 1e-3},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def model_with_experts(device: torch.device, **settings: Any):
    """Two layers of eight experts, and an optimizer."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        num_moe_experts=8,
        moe_ffn_hidden_size=256,
        moe_grouped_gemm=True,
        **settings,
    )
    config.validate()
    (model,) = build_model(
        config,
        GPTModelConfig(position_embedding_type="rope"),
        DistributedDataParallelConfig(),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        device=device,
        seed=7,
    )
    return model, get_megatron_optimizer(OptimizerConfig(lr=1e-3), model)


def groups() -> dict[str, Any]:
    return {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="torch's grouped product reads the counts on GPUs before Hopper",
)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_no_host_wait(mixture: str) -> None:
    """With torch's synchronization check on "error", a step of one rank passes.

    Mutations: `.item()` or `.tolist()` of the counts, or a boolean index, raises.
    """
    parallel_state.initialize_model_parallel()
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        model, optimizer = model_with_experts(device, bf16=True, **MIXTURES[mixture])
        batches = [batch(1, device), batch(2, device)]
        for _ in range(3):
            train_step(model, optimizer, batches, **groups())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = train_step(model, optimizer, batches, **groups())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(output.loss).item()
    finally:
        parallel_state.shutdown()


@pytest.mark.parametrize("mixture", MIXTURES)
def test_losses_equal_the_cpu(mixture: str) -> None:
    """Three steps in float32 from the same weights (drawn on the CPU): the GPU's losses are the CPU's to rounding."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def losses(backend: str, device: torch.device) -> list[float]:
        parallel_state.initialize_torch_distributed(backend=backend)
        parallel_state.initialize_model_parallel()
        try:
            model, optimizer = model_with_experts(device, use_cpu_initialization=True, **MIXTURES[mixture])
            return [train_step(model, optimizer, [batch(0, device)], **groups()).loss.item() for _ in range(3)]
        finally:
            parallel_state.shutdown()

    on_gpu = losses("nccl", torch.device("cuda", torch.cuda.current_device()))
    assert on_gpu == pytest.approx(losses("gloo", torch.device("cpu")), rel=1e-4)
    assert on_gpu[-1] < on_gpu[0]


@pytest.mark.parametrize("counts", [[300, 0, 20, 700], [0, 0, 0, 5], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "torch", "transformer_engine", "grouped_gemm"])
def test_backends_of_grouped_products_agree(backend: str, dtype: torch.dtype, counts: list[int]) -> None:
    """Output and gradients equal those of the loop in float64, to the rounding of the dtype."""
    if backend != "auto" and backend not in available_backends():
        pytest.skip(f"{backend} is not installed")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1)
    x, weight = torch.randn(sum(counts), 256, device="cuda"), torch.randn(len(counts), 128, 256, device="cuda")
    factor, tokens = torch.randn(sum(counts), 128, device="cuda"), torch.tensor(counts, device="cuda")

    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        output = grouped_linear(*inputs, tokens, backend)
        return [output, *torch.autograd.grad((output * factor.to(dtype)).sum(), inputs)]

    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for found, wanted in zip(run(dtype, backend), run(torch.float64, "loop"), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * 16)
