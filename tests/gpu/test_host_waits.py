"""The steps of tests/unit/training/test_host_waits.py on a GPU, with torch's synchronization check on "error".

pytest -m gpu
"""

from collections.abc import Iterator

import pytest
import torch

from megatron_lite import parallel_state
from megatron_lite.arguments import parse_args
from megatron_lite.optimizer import get_megatron_optimizer
from megatron_lite.training import setup
from megatron_lite.training.batches import MicroBatchStream
from megatron_lite.training.initialize import distributed_environment
from megatron_lite.training.step import train_step
from megatron_lite.transformer import activation_offload
from tests.unit.training.test_host_waits import BASE, SEQUENCE, STEPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
CASES = STEPS | {
    "sgd": "--optimizer sgd --bf16",
    "momentum on the host": "--optimizer sgd --optimizer-cpu-offload",
    "compiled": "--compile --bf16",
    "documents, compiled": "--compile --bf16 --dataloader-inter-document-masking",
    "activations on the host": "--bf16 --cpu-offloading-num-layers 1 --hidden-dropout 0.1",
}


def samples(documents: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Random batches in pageable memory, in each of which the documents begin elsewhere."""
    generator = torch.Generator().manual_seed(5)
    while True:
        batch = {name: torch.randint(0, 64, (2, SEQUENCE), generator=generator) for name in ("tokens", "labels")}
        batch |= {"loss_mask": torch.ones(2, SEQUENCE), "position_ids": torch.arange(SEQUENCE).repeat(2, 1)}
        if documents:
            begin = int(torch.randint(1, SEQUENCE, (), generator=generator))
            batch["document_starts"] = torch.tensor([[0] * begin + [begin] * (SEQUENCE - begin), [0] * SEQUENCE])
        yield batch


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_no_host_wait(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From batches in the host's memory to the updated weights, twice.

    Mutations: `.item()` on any scalar of the step; a batch, or the documents' mask, copied out of pageable memory.
    """
    if "--moe-grouped-gemm" in words and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product reads the counts on GPUs before Hopper")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", 1)
    config = parse_args([*BASE, *words.split()])
    with distributed_environment(config) as device:
        chunks = setup.build_model(
            config.transformer,
            config.gpt,
            config.ddp,
            vocab_size=64,
            max_sequence_length=config.sequence_length,
            device=device,
            seed=1,
            compile_layers=bool(config.training.compile),
        )
        optimizer = get_megatron_optimizer(config.optimizer, chunks)
        depths = config.transformer.mtp_num_layers or 0
        stream = MicroBatchStream(samples(config.data.dataloader_inter_document_masking), device, depths=depths)

        def step() -> torch.Tensor:
            return train_step(
                chunks,
                optimizer,
                stream.next_global_batch(2),
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                per_token_loss=config.transformer.calculate_per_token_loss,
                mtp_loss_weights=config.transformer.mtp_loss_weights,
            ).loss

        losses = [step() for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses += [step() for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(torch.stack(losses)).all().item()
