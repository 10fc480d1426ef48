#!/usr/bin/env python3
"""A mixture of experts from MoERouter and GroupedMLP, under tensor, expert and expert tensor parallelism.

torchrun --nproc-per-node 4 scripts/examples/moe_block.py
torchrun --nproc-per-node 4 scripts/examples/moe_block.py --tp 1 --ep 4 --etp 1 --dispatcher allgather
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite import parallel_state
from megatron_lite.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.moe.router import MoERouter
from megatron_lite.transformer.transformer_config import TransformerConfig

# A thousand times what one would train with, so that the comparison below notices a wrong gradient of that loss.
BALANCE_COEFFICIENT = 10.0


class MoEBlock(MegatronModule):
    """Each token goes to k of E experts, and their outputs are added: [b, s, h] -> [b, s, h], and the balance loss.

    In a model `MoELayer` does this, and adds its balance losses to the gradients by itself.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        assert config.num_moe_experts is not None
        self.router = MoERouter(config)
        self.experts = GroupedMLP(config.num_moe_experts // config.expert_model_parallel_size, config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x is the same on all tensor parallel ranks; each routes its own part of the sequence, so that none is twice.

        That part is what travels to the experts, wherever they are.
        """
        own = scatter_to_sequence_parallel_region(x.transpose(0, 1))  # [s/tp, b, h]
        scores, indices = self.router(own)  # [s/tp, b, k] each
        output = self.experts(own, scores, indices)
        # All that follows is again the same on all of these ranks, so its gradient is not summed over them.
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
        return output.transpose(0, 1), self.router.compute_aux_loss(scores, indices)


def in_one_piece(x: Tensor, router: Tensor, weight1: Tensor, weight2: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The same without splitting anything: every expert computes every token, and counts where it was chosen."""
    logits = F.linear(x, router)
    best, indices = logits.topk(topk, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, indices, best.softmax(-1))  # [b, s, E]
    gate, up = torch.einsum("bsh,efh->bsef", x, weight1).unflatten(-1, (-1, 2)).unbind(-1)  # rows are interleaved
    output = torch.einsum("bsef,ehf,bse->bsh", F.silu(gate) * up, weight2, weights)
    share = F.one_hot(indices, logits.size(-1)).sum(2).flatten(0, 1).to(x.dtype).mean(0) / topk
    return output, logits.size(-1) * (share * logits.softmax(-1).flatten(0, 1).mean(0)).sum()


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, help="tensor parallel size; default 2 on several ranks, else 1")
    parser.add_argument("--ep", type=int, help="expert parallel size; default all ranks that etp leaves")
    parser.add_argument("--etp", type=int, help="ranks that share each expert; default 2 on four ranks or more, else 1")
    parser.add_argument("--dispatcher", default="alltoall", choices=["alltoall", "allgather"])
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--ffn-hidden-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2, help="sequences of each data parallel rank")
    parser.add_argument("--sequence", type=int, default=16)
    return parser


def configure(arguments: argparse.Namespace) -> TransformerConfig:
    """The groups of all ranks, and the configuration to match."""
    parallel_state.initialize_torch_distributed()
    world = torch.distributed.get_world_size()
    tp = arguments.tp or (2 if world % 2 == 0 else 1)
    etp = arguments.etp or (2 if world % 4 == 0 else 1)
    ep = arguments.ep or world // etp
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    parallel_state.initialize_model_parallel(**sizes)
    config = TransformerConfig(
        hidden_size=arguments.hidden_size,
        ffn_hidden_size=arguments.ffn_hidden_size,
        swiglu=True,
        add_bias_linear=False,
        init_method_std=0.2,
        num_moe_experts=arguments.num_experts,
        moe_router_topk=arguments.topk,
        # No moe_aux_loss_coeff: with one, the router would see to its loss itself, and adding it would count it twice.
        moe_token_dispatcher_type=arguments.dispatcher,
        moe_grouped_gemm=True,
        **sizes,
    )
    config.validate()
    return config


def sum_gradients(model: MoEBlock) -> None:
    """Over the ranks that have the same weights, as data parallelism does it in training.

    Every rank has the router, and has routed tokens of its own. An expert has seen the tokens of all ranks that it
    exchanges tokens with, so only its copies elsewhere have others.
    """
    for name, parameter in model.named_parameters():
        group = parallel_state.get_expert_data_parallel_group() if name.startswith("experts") else None
        gradient = parameter.grad
        torch.distributed.all_reduce(gradient.to_local() if hasattr(gradient, "to_local") else gradient, group=group)


def describe(model: MoEBlock, x: Tensor, output: Tensor, aux_loss: Tensor) -> str:
    """What this rank holds and made, in a line."""
    local = model.experts.num_local_experts
    ep_rank, etp_rank = (
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    etp = parallel_state.get_expert_tensor_parallel_world_size()
    part = "" if etp == 1 else f", part {etp_rank} of {etp} of each"
    return (
        f"rank {torch.distributed.get_rank()}: tensor {parallel_state.get_tensor_model_parallel_rank()} of "
        f"{parallel_state.get_tensor_model_parallel_world_size()}, data {parallel_state.get_data_parallel_rank()} of "
        f"{parallel_state.get_data_parallel_world_size()}, expert {ep_rank} of "
        f"{parallel_state.get_expert_model_parallel_world_size()}: experts {ep_rank * local} to "
        f"{(ep_rank + 1) * local - 1}{part}; x {list(x.shape)} -> output {list(output.shape)}, "
        f"balance loss {aux_loss.item():.4f}"
    )


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a DTensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(argv: list[str] | None = None) -> None:
    """Build, run forward and backward, compare."""
    arguments = build_parser().parse_args(argv)
    config = configure(arguments)
    dp_rank, dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)  # the same on every rank: layers draw all experts and keep their part
    model = MoEBlock(config)
    shape = (dp, arguments.batch, arguments.sequence, arguments.hidden_size)
    batches, directions = torch.randn(shape), torch.randn(shape)

    x = batches[dp_rank].clone().requires_grad_()
    output, aux_loss = model(x)
    ((output * directions[dp_rank]).sum() + BALANCE_COEFFICIENT / dp * aux_loss).backward()
    sum_gradients(model)

    # One process, which sees the batches of all data parallel ranks.
    weights = {name: whole(one).detach().requires_grad_() for name, one in model.named_parameters()}
    batches.requires_grad_()
    expected = [in_one_piece(batch, *weights.values(), topk=arguments.topk) for batch in batches]
    objective = sum((out * direction).sum() for (out, _), direction in zip(expected, directions, strict=True))
    (objective + BALANCE_COEFFICIENT / dp * sum(loss for _, loss in expected)).backward()
    pairs = {"output": (output, expected[dp_rank][0]), "balance loss": (aux_loss, expected[dp_rank][1])}
    pairs["gradient of x"] = (x.grad, batches.grad[dp_rank])
    for name, parameter in model.named_parameters():
        pairs[f"gradient of {name}"] = (whole(parameter.grad), weights[name].grad)
    for name, (actual, right) in pairs.items():
        torch.testing.assert_close(
            actual, right, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name} differs from one process: {text}"
        )

    lines: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lines, describe(model, x, output, aux_loss))
    if torch.distributed.get_rank() == 0:
        print("\n".join(lines))
        print(f"equal to the experts in one piece: output, balance loss and {len(weights) + 1} gradients", flush=True)
    torch.set_default_device(None)
    parallel_state.shutdown()


if __name__ == "__main__":
    main()
