#!/usr/bin/env python3
"""Train a GPT whose layers are on several ranks, from Python: it learns to spell this very file.

torchrun --nproc-per-node 2 scripts/examples/pipeline.py
torchrun --nproc-per-node 4 scripts/examples/pipeline.py --pp 2 --schedule zbv
python scripts/examples/pipeline.py

Compare the losses: whatever the schedule, and on one process, they are the same.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_lite import parallel_state
from megatron_lite.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron_lite.models.gpt.gpt_config import GPTModelConfig
from megatron_lite.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_lite.pipeline_parallel import get_forward_backward_func
from megatron_lite.training.setup import build_model
from megatron_lite.transformer.transformer_config import TransformerConfig


def main(argv: list[str] | None = None) -> None:
    """Build the stages, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, help="pipeline ranks; default: all ranks. The others are data parallel")
    parser.add_argument("--schedule", help="as --pipeline-schedule; default 1f1b")
    parser.add_argument("--micro-batches", type=int, default=4, help="of 2 sequences, over all data parallel ranks")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args(argv)

    # 1. Ranks, and which of them holds which layers.
    parallel_state.initialize_torch_distributed()
    pp = arguments.pp or torch.distributed.get_world_size()
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=pp,
        pipeline_schedule=arguments.schedule,
    )
    config.validate()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=pp)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.distributed.get_rank() == 0:
        print("\n".join(config.pipeline_layout.describe()), flush=True)

    # 2. This rank's stages. Initial weights do not depend on the layout.
    ddp, gpt = DistributedDataParallelConfig(data_parallel_sharding_strategy="optim"), GPTModelConfig()
    chunks = build_model(config, gpt, ddp, vocab_size=128, max_sequence_length=64, device=device, seed=1)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, weight_decay=0.1), chunks)
    forward_backward = get_forward_backward_func(config)

    # 3. Steps. One function runs a stage, the other turns the last one's output into the loss.
    def forward_step(chunk: nn.Module, window: dict[str, Tensor], hidden: Tensor | None) -> Tensor:
        tokens, labels = window["text"][:, :-1], window["text"][:, 1:]
        return chunk(tokens, window["position_ids"], labels=labels, decoder_input=hidden)

    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    positions = torch.arange(64, device=device).expand(2, -1)
    draw = torch.Generator().manual_seed(2)
    for step in range(1, arguments.steps + 1):
        total = torch.zeros((), device=device)

        def share_of_mean(number: int, losses: Tensor, total: Tensor = total) -> Tensor:
            share = losses.sum() / (arguments.micro_batches * losses.numel())
            total += share.detach()
            return share

        starts = torch.randint(len(text) - 64, (arguments.micro_batches, 2), generator=draw)
        windows = [
            torch.stack([text[start : start + 65] for start in pair]).to(device) for pair in starts[dp_rank::dp_size]
        ]
        optimizer.zero_grad()
        micro_batches = [{"text": window, "position_ids": positions} for window in windows]
        forward_backward(forward_step, chunks, micro_batches, share_of_mean)
        finalize_model_grads(chunks, parallel_state.get_tensor_model_parallel_group())
        result = optimizer.step()
        if step % 10 == 0 or step == 1:
            torch.distributed.all_reduce(total)  # zero where the last stage is not
            if torch.distributed.get_rank() == 0:
                print(f"step {step:3d}  loss {total:.5f}  gradient norm {result.grad_norm:.4f}", flush=True)
    parallel_state.shutdown()


if __name__ == "__main__":
    main()
