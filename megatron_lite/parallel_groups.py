"""Makes the process groups and device meshes of a layout, sharing those that hold the same ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from megatron_lite.process_groups import device_type_of
from megatron_lite.rank_generator import ParallelLayout, RankLists, hierarchical_ranks

# A DTensor's mesh is found by its group, so these are told apart even where they hold the same ranks.
_UNSHARED_KINDS = ("tp", "expt_tp", "ep")

_GroupKey = tuple[str | None, tuple[tuple[int, ...], ...]]

EmbeddingRanks = Callable[[list[int]], list[int]]


@dataclass
class ParallelGroups:
    """The groups of this rank, the global ranks in them, and the two root meshes.

    Attributes:
        layout: the rank arithmetic they come from.
        timeout: limit of every collective.
        groups: by the names of ProcessGroupCollection; None where this rank is in no group of that kind.
        ranks: global ranks of this rank's groups, in group order.
        hierarchical: levels of the context parallel group, innermost first.
        created: the distinct groups to destroy in the end.
    """

    layout: ParallelLayout
    timeout: timedelta
    groups: dict[str, ProcessGroup | None] = field(default_factory=dict)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    hierarchical: list[ProcessGroup] = field(default_factory=list)
    created: list[ProcessGroup] = field(default_factory=list)
    dense_mesh: DeviceMesh = field(init=False)
    expert_mesh: DeviceMesh = field(init=False)
    _shareable: dict[_GroupKey, ProcessGroup | None] = field(default_factory=dict)

    def add(self, name: str, rank_lists: RankLists, backend: str | None = None) -> ProcessGroup | None:
        """Create (or share) the groups of one kind and keep this rank's own; all ranks must call it alike."""
        key = (backend, tuple(tuple(ranks) for ranks in rank_lists))
        mine = next((ranks for ranks in rank_lists if dist.get_rank() in ranks), None)
        if key not in self._shareable or name in _UNSHARED_KINDS:
            # Every rank walks through every group: names and communicators stay in step on all of them.
            made = [dist.new_group(ranks, self.timeout, backend, group_desc=name) for ranks in rank_lists]
            own = made[rank_lists.index(mine)] if mine is not None else None
            if own is not None:
                self.created.append(own)
            self._shareable[key] = own
        if mine is not None:
            self.ranks[name] = mine
        self.groups[name] = self._shareable[key]
        return self.groups[name]

    def destroy(self) -> None:
        """Destroy the groups made here, unless torch.distributed is gone already."""
        if dist.is_initialized():
            for group in self.created:
                dist.destroy_process_group(group)


def make_parallel_groups(
    layout: ParallelLayout,
    timeout: timedelta,
    *,
    pipeline_backend: str | None,
    hierarchical_sizes: list[int] | None,
    get_embedding_ranks: EmbeddingRanks,
    get_position_embedding_ranks: EmbeddingRanks,
    gloo: bool,
) -> ParallelGroups:
    """All groups and meshes of `layout`; every rank of the world calls it with the same arguments.

    Raises:
        ParallelLayoutError: hierarchical sizes that do not multiply to the context parallel size.
    """
    made = ParallelGroups(layout, timeout)
    for name, rank_lists in layout.groups().items():
        made.add(name, rank_lists, pipeline_backend if name == "pp" else None)
    pipelines = layout.dense.get_ranks("pp")
    made.add("embd", [get_embedding_ranks(ranks) for ranks in pipelines])
    made.add("pos_embd", [get_position_embedding_ranks(ranks) for ranks in pipelines])
    _add_hierarchical_groups(made, hierarchical_sizes)
    _add_gloo_groups(made, gloo)
    made.dense_mesh = _mesh(
        made, layout.dense_mesh(), pp="pp", dp_replicate="inter_dp_cp", dp_shard="intra_dp_cp", tp="tp"
    )
    made.expert_mesh = _mesh(
        made,
        layout.expert_mesh(),
        pp="pp",
        edp_replicate="inter_dist_opt",
        edp_shard="intra_expt_dp",
        ep="ep",
        etp="expt_tp",
    )
    return made


def _add_hierarchical_groups(made: ParallelGroups, sizes: list[int] | None) -> None:
    if sizes is None:
        return
    per_group = [hierarchical_ranks(ranks, sizes) for ranks in made.layout.dense.get_ranks("cp")]
    for level in range(len(sizes)):
        own = made.add(f"hcp_{level}", [ranks for levels in per_group for ranks in levels[level]])
        assert own is not None
        made.hierarchical.append(own)


def _add_gloo_groups(made: ParallelGroups, wanted: bool) -> None:
    needs_own = dist.get_backend() == "nccl"
    rank_lists = made.layout.groups()
    for name in ("dp", "dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp"):
        if not needs_own:
            made.groups[f"{name}_gloo"] = made.groups[name]
        elif wanted:
            made.add(f"{name}_gloo", rank_lists[name], "gloo")


def _mesh(made: ParallelGroups, ranks: Any, **kind_of_dimension: str) -> DeviceMesh:
    own = (made.groups[kind] for kind in kind_of_dimension.values())
    groups = [group for group in own if group is not None]
    device_type = device_type_of()
    names = tuple(kind_of_dimension)
    return DeviceMesh.from_group(groups, device_type, mesh=torch.tensor(ranks), mesh_dim_names=names)
