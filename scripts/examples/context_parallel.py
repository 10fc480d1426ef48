#!/usr/bin/env python3
"""Attention over a long sequence split between ranks: heads by tensor, tokens by context parallelism.

torchrun --nproc-per-node 4 scripts/examples/context_parallel.py --tp 2 --cp 2
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.context_parallel import (
    PackedSeqParams,
    get_packed_seq_params,
    get_padding,
    split_sequence,
    zigzag_positions,
)
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.transformer_config import TransformerConfig


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, help="tensor parallel size; default 2 on four ranks or more, else 1")
    parser.add_argument("--cp", type=int, help="context parallel size; default all ranks that tp leaves")
    parser.add_argument("--cp-comm-type", default="p2p", choices=["p2p", "all_gather", "a2a", "a2a+p2p"])
    parser.add_argument("--hierarchical-context-parallel-sizes", type=int, nargs=2, help="for a2a+p2p")
    parser.add_argument("--seq-length", type=int, default=2001, help="one that cannot be split as it is")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--num-query-groups", type=int, default=4)
    return parser


def configure(arguments: argparse.Namespace) -> TransformerConfig:
    """The groups of all ranks, and the configuration to match."""
    parallel_state.initialize_torch_distributed()
    world = torch.distributed.get_world_size()
    tp = arguments.tp or (2 if world % 4 == 0 else 1)
    cp = arguments.cp or world // tp
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        hierarchical_context_parallel_sizes=arguments.hierarchical_context_parallel_sizes,
    )
    config = TransformerConfig(
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.num_attention_heads,
        num_query_groups=arguments.num_query_groups,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        hierarchical_context_parallel_sizes=arguments.hierarchical_context_parallel_sizes,
        cp_comm_type=arguments.cp_comm_type,
        sequence_parallel=tp > 1,
    )
    config.validate()
    return config


def in_one_piece(inputs: list[Tensor], weight: Tensor, length: int) -> list[Tensor]:
    """Output and the gradients of query, key and value, of the whole attention: [b, s, heads, d] each.

    Each sequence alone and without its padding, which therefore has zeros everywhere.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    query, key, value = (x[:, :length].transpose(1, 2) for x in inputs)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    out = F.pad(out, (0, 0, 0, 0, 0, weight.size(1) - length))
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def part_of_this_rank(whole: Tensor, packed: PackedSeqParams) -> Tensor:
    """[b, s, heads, d] -> [b s / cp, 1, heads / tp, d]: the sequences as one packed row, of which we hold a part."""
    tp, cp = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_context_parallel_world_size()
    heads = whole.chunk(tp, dim=2)[parallel_state.get_tensor_model_parallel_rank()]
    row = heads.flatten(0, 1).unsqueeze(1)
    return split_sequence(row, 0, cp, parallel_state.get_context_parallel_rank(), packed.layout.stretches)


def describe(config: TransformerConfig, padded: int, query: Tensor, output: Tensor) -> str:
    """What this rank holds, in a line."""
    tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    cp_rank = parallel_state.get_context_parallel_rank()
    heads = config.num_attention_heads // tp
    mine = zigzag_positions((0, padded), cp, cp_rank)
    early, late = mine[: len(mine) // 2], mine[len(mine) // 2 :]
    places = f"{early[0]} to {early[-1]} and {late[0]} to {late[-1]}" if cp > 1 else f"0 to {padded - 1}"
    return (
        f"rank {torch.distributed.get_rank()}: tensor {tp_rank} of {tp}, heads {tp_rank * heads} to "
        f"{(tp_rank + 1) * heads - 1}; context {cp_rank} of {cp}, tokens {places} of each sequence; "
        f"query {list(query.shape)} -> output {list(output.shape)}"
    )


def main(argv: list[str] | None = None) -> None:
    """Pad, pack, split, attend, compare."""
    arguments = build_parser().parse_args(argv)
    config = configure(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)  # so that all ranks draw the same sequences

    padding = get_padding(
        seq_len=arguments.seq_length,
        cp_size=config.context_parallel_size,
        tp_size=config.tensor_model_parallel_size,
        has_sp=config.sequence_parallel,
    )
    padded = arguments.seq_length + padding
    tokens = torch.randint(0, 50000, (arguments.batch, padded), generator=generator)
    # Packed also on one rank, where it would not have to be: then every layout takes the same path here.
    packed = get_packed_seq_params(tokens, 0, padding, config.context_parallel_size, use_packed_sequence=True)

    # A model has these from its query-key-value layer, on each rank for its tokens and heads only.
    counts = (config.num_attention_heads, arguments.num_query_groups, arguments.num_query_groups)
    shapes = [(*tokens.shape, count, config.kv_channels) for count in (*counts, config.num_attention_heads)]
    *whole, weight = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    mine = [part_of_this_rank(x, packed).requires_grad_() for x in whole]

    attention = DotProductAttention(config, layer_number=1)
    output = attention(*mine, packed_seq_params=packed)
    by_head = output.unflatten(2, (-1, config.kv_channels))
    gradients = torch.autograd.grad((by_head * part_of_this_rank(weight, packed)).sum(), mine)

    expected = in_one_piece(whole, weight, arguments.seq_length)
    for actual, right in zip((by_head, *gradients), expected, strict=True):
        torch.testing.assert_close(actual, part_of_this_rank(right, packed), rtol=1e-4, atol=1e-5)
    lines: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lines, describe(config, padded, mine[0], output))
    if torch.distributed.get_rank() == 0:
        print(f"sequence length {arguments.seq_length}, padding {padding}: {padded} tokens, {packed.qkv_format}")
        print(f"sequences in the packed row: {packed.layout.documents}")
        print("\n".join(lines))
        print(f"{arguments.cp_comm_type}: equal to the attention in one piece, output and 3 gradients", flush=True)
    parallel_state.shutdown()


if __name__ == "__main__":
    main()
