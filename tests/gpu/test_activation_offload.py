"""Activations on the host, from a GPU: the same bits, and less memory.

pytest -m gpu
"""

import pytest
import torch

from megatron_lite import parallel_state
from megatron_lite.distributed import DistributedDataParallelConfig
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.training.setup import build_model
from megatron_lite.transformer.transformer_config import TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
LAYERS, HIDDEN, SEQUENCE, BATCH = 8, 512, 1024, 4


def gradients(number: int, compile_layers: bool, steps: int) -> tuple[list[torch.Tensor], int]:
    """Of several micro-batches one after another; and the most memory allocated beside the weights."""
    device = torch.device("cuda", torch.cuda.current_device())
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        swiglu=True,
        bf16=True,
        hidden_dropout=0.1,
        cpu_offloading_num_layers=number,
    )
    (model,) = build_model(
        config,
        GPTModelConfig(position_embedding_type="rope"),
        DistributedDataParallelConfig(),
        vocab_size=1000,
        max_sequence_length=SEQUENCE,
        device=device,
        seed=7,
        compile_layers=compile_layers,
    )
    model.train()
    torch.manual_seed(3)
    tokens = torch.randint(0, 1000, (BATCH, SEQUENCE), device=device)
    positions = torch.arange(SEQUENCE, device=device).repeat(BATCH, 1)
    for step in range(steps):
        if step == steps - 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(tokens, positions, None, labels=tokens).mean().backward()
    torch.cuda.synchronize()
    return [parameter.grad.clone() for parameter in model.parameters()], torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("compile_layers", [False, True])
def test_the_same_gradients_with_less_memory(compile_layers: bool) -> None:
    """Seven of eight layers travel. A race of the copies with the computation shows as other bits.

    Mutations: leave out a wait (of the side stream for the main one, or the other way round), or free().
    """
    parallel_state.initialize_model_parallel()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected, without = gradients(0, compile_layers, steps=4)
        found, peak = gradients(LAYERS - 1, compile_layers, steps=4)
    finally:
        torch.use_deterministic_algorithms(False)
        parallel_state.shutdown()
    for one, two in zip(found, expected, strict=True):
        one, two = (x.to_local() if hasattr(x, "to_local") else x for x in (one, two))
        assert torch.equal(one, two)
    assert peak < 0.6 * without
