#!/usr/bin/env python3
"""Self-attention from parallel layers: each tensor parallel rank has some of the heads.

torchrun --nproc-per-node 2 scripts/examples/attention_block.py
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.transformer_config import TransformerConfig


class AttentionBlock(MegatronModule):
    """Causal multi-head attention, [s, b, h] -> [s, b, h].

    The rows of `qkv` are ordered head by head, [query, key, value] each, so that any contiguous part of them is a
    set of whole heads: that is what makes the split over ranks meaningful.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        heads = config.num_attention_heads * config.kv_channels
        self.head_size = config.kv_channels
        self.qkv = ColumnParallelLinear(config.hidden_size, 3 * heads, config=config, bias=False)
        self.attention = DotProductAttention(config, layer_number=1)
        self.proj = RowParallelLinear(heads, config.hidden_size, config=config, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Under sequence parallelism [s/tp, b, h] -> [s/tp, b, h]; the layers gather and scatter the sequence."""
        mixed = self.qkv(x)
        by_head = mixed.view(*mixed.shape[:2], -1, 3, self.head_size)  # [s, b, this rank's heads, 3, d]
        query, key, value = by_head.unbind(dim=3)
        return self.proj(self.attention(query, key, value))


def in_one_piece(x: Tensor, qkv: Tensor, proj: Tensor, head_size: int) -> Tensor:
    """The same attention without splitting anything."""
    query, key, value = F.linear(x, qkv).unflatten(-1, (-1, 3, head_size)).permute(3, 1, 2, 0, 4)
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [b, n, s, d]
    return F.linear(context.permute(2, 0, 1, 3).flatten(2), proj)


def main(argv: list[str] | None = None) -> None:
    """Build, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=16)
    parser.add_argument("--sequence-parallel", action="store_true", help="split the input and output along s")
    arguments = parser.parse_args(argv)

    parallel_state.initialize_torch_distributed()
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    rank = parallel_state.get_tensor_model_parallel_rank()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    config = TransformerConfig(
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.num_attention_heads,
        tensor_model_parallel_size=size,
        sequence_parallel=arguments.sequence_parallel,
    )
    config.validate()
    model = AttentionBlock(config)
    whole_input = torch.randn(arguments.sequence, arguments.batch, arguments.hidden_size)
    split = arguments.sequence_parallel and size > 1
    x = whole_input.chunk(size, dim=0)[rank] if split else whole_input
    output = model(x)
    lines: list[str] = [""] * size
    line = (
        f"tensor parallel rank {rank} of {size}: {arguments.num_attention_heads // size} of "
        f"{arguments.num_attention_heads} heads, input {list(x.shape)} -> output {list(output.shape)}"
    )
    torch.distributed.all_gather_object(lines, line)

    qkv, proj = model.qkv.weight.full_tensor(), model.proj.weight.full_tensor()
    expected = in_one_piece(whole_input, qkv, proj, config.kv_channels)
    mine = expected.chunk(size, dim=0)[rank] if split else expected
    torch.testing.assert_close(output, mine, rtol=1e-4, atol=1e-6)
    if rank == 0:
        print("\n".join([*lines, "equal to the attention in one piece"]), flush=True)
    torch.set_default_device(None)
    parallel_state.shutdown()


if __name__ == "__main__":
    main()
