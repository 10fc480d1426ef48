#!/usr/bin/env python3
"""Who works with whom: the groups of a rank for any sizes of the parallel axes.

torchrun --nproc-per-node 4 scripts/examples/parallel_groups.py --tp 2 --cp 2
python scripts/examples/parallel_groups.py --tp 8 --cp 4 --ep 2 --pp 2 --world-size 128 --rank 77

With --world-size it needs no torchrun and no cluster: this process plays one rank of an imagined world.
"""

import argparse

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite import parallel_state
from megatron_lite.parallel_state import (
    get_context_parallel_group,
    get_context_parallel_rank,
    get_context_parallel_world_size,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_expert_data_parallel_group,
    get_expert_model_parallel_group,
    get_expert_model_parallel_rank,
    get_expert_model_parallel_world_size,
    get_expert_tensor_parallel_group,
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_rank,
    get_pipeline_model_parallel_world_size,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    initialize_model_parallel,
)


def describe() -> str:
    """Size, own place and members of each group of this rank, one line a group."""
    rows = {
        "tensor": (
            get_tensor_model_parallel_world_size(),
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_group(),
        ),
        "context": (get_context_parallel_world_size(), get_context_parallel_rank(), get_context_parallel_group()),
        "data": (get_data_parallel_world_size(), get_data_parallel_rank(), get_data_parallel_group()),
        "pipeline": (
            get_pipeline_model_parallel_world_size(),
            get_pipeline_model_parallel_rank(),
            get_pipeline_model_parallel_group(),
        ),
        "expert": (
            get_expert_model_parallel_world_size(),
            get_expert_model_parallel_rank(),
            get_expert_model_parallel_group(),
        ),
        "expert tensor": (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
            get_expert_tensor_parallel_group(),
        ),
        "expert data": (
            parallel_state.get_expert_data_parallel_world_size(),
            parallel_state.get_expert_data_parallel_rank(),
            get_expert_data_parallel_group(),
        ),
    }
    lines = [f"rank {dist.get_rank()} of {dist.get_world_size()}"]
    for name, (size, rank, group) in rows.items():
        members = ", ".join(str(member) for member in dist.get_process_group_ranks(group))
        lines.append(f"  {name:<14} place {rank} of {size:<4} with ranks {members}")
    stage = "first" if parallel_state.is_pipeline_first_stage() else "not the first"
    lines.append(
        f"  this is {stage} pipeline stage; in the embedding group: {parallel_state.is_rank_in_embedding_group()}"
    )
    return "\n".join(lines)


def arithmetic(world: int, tp: int, cp: int, pp: int, etp: int, ep: int) -> str:
    """How the world divides: once for dense layers, once for experts, over the same ranks."""
    return (
        f"dense layers: {world} = tp {tp} x cp {cp} x pp {pp} x dp {world // (tp * cp * pp)}\n"
        f"experts:      {world} = etp {etp} x ep {ep} x pp {pp} x edp {world // (etp * ep * pp)}"
    )


def main(argv: list[str] | None = None) -> None:
    """Make the groups and print those of this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--cp", type=int, default=1, help="context parallel size")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size")
    parser.add_argument("--etp", type=int, help="expert tensor parallel size; default: the tensor parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--world-size", type=int, help="imagine this many ranks")
    parser.add_argument("--rank", type=int, default=0, help="the rank to play in the imagined world")
    parser.add_argument("--order", default="tp-cp-ep-dp-pp", help="axes from the fastest varying to the slowest")
    arguments = parser.parse_args(argv)

    if arguments.world_size is not None:
        dist.init_process_group("fake", rank=arguments.rank, world_size=arguments.world_size, store=FakeStore())
    initialize_model_parallel(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        context_parallel_size=arguments.cp,
        expert_model_parallel_size=arguments.ep,
        expert_tensor_parallel_size=arguments.etp,
        order=arguments.order,
    )
    if arguments.world_size is not None or dist.get_rank() == 0:
        etp = arguments.tp if arguments.etp is None else arguments.etp
        print(arithmetic(dist.get_world_size(), arguments.tp, arguments.cp, arguments.pp, etp, arguments.ep))
    print(describe(), flush=True)
    parallel_state.shutdown()
    if arguments.world_size is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
