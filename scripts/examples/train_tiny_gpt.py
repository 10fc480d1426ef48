#!/usr/bin/env python3
"""Train a GPT from Python, without the command line: it learns to spell this very file.

torchrun --nproc-per-node 2 scripts/examples/train_tiny_gpt.py
torchrun --nproc-per-node 2 scripts/examples/train_tiny_gpt.py --tensor-parallel 1

Compare the losses: whether two ranks share each layer or the batch, or one process does all, they are the same.
"""

import argparse
from pathlib import Path

import torch

from megatron_lite import parallel_state
from megatron_lite.distributed import (
    DistributedDataParallelConfig,
    finalize_model_grads,
    wrap_data_parallel,
)
from megatron_lite.models.gpt.gpt_model import GPTModel
from megatron_lite.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_lite.transformer.transformer_config import TransformerConfig


def main(argv: list[str] | None = None) -> None:
    """Build, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, help="default: all ranks; the others are data parallel")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, over all ranks")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args(argv)

    # 1. Ranks. torchrun's world, or a world of one.
    parallel_state.initialize_torch_distributed()
    tp = arguments.tensor_parallel or torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # 2. Model, split over tensor parallel ranks as it is built, then over data parallel ranks.
    config = TransformerConfig(
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
    )
    config.validate()
    torch.manual_seed(1)
    with device:
        model = GPTModel(config, vocab_size=128, max_sequence_length=arguments.sequence)
    ddp = DistributedDataParallelConfig(data_parallel_sharding_strategy="optim")
    wrap_data_parallel(model, config, ddp, parallel_state.get_dense_mesh())

    # 3. Optimizer.
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, weight_decay=0.1), model)

    # 4. Steps. Every rank draws the same batch and takes its share of the sequences.
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    positions = torch.arange(arguments.sequence, device=device)
    draw = torch.Generator().manual_seed(2)
    for step in range(1, arguments.steps + 1):
        starts = torch.randint(len(text) - arguments.sequence, (arguments.batch,), generator=draw)
        windows = torch.stack([text[start : start + arguments.sequence + 1] for start in starts]).to(device)
        mine = windows[dp_rank::dp_size]
        optimizer.zero_grad()
        losses = model(mine[:, :-1], positions.expand(len(mine), -1), None, labels=mine[:, 1:])
        # Each rank's share of the mean over the global batch: gradients are then summed, never averaged.
        loss = losses.sum() / (arguments.batch * arguments.sequence)
        loss.backward()
        finalize_model_grads(model, parallel_state.get_tensor_model_parallel_group())
        result = optimizer.step()
        if step % 10 == 0 or step == 1:
            total = loss.detach().clone()
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
            if torch.distributed.get_rank() == 0:
                print(f"step {step:3d}  loss {total:.5f}  gradient norm {result.grad_norm:.4f}", flush=True)
    parallel_state.shutdown()


if __name__ == "__main__":
    main()
