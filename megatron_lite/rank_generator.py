"""Which rank belongs to which group: pure arithmetic, no process group needed.

Ranks are the cells of a grid. An `order` such as "tp-cp-ep-dp-pp" names its axes from the fastest varying to the
slowest; a group of a kind is a set of ranks that differ only in the axes of that kind. The same ranks carry two
grids: the dense one (tp, cp, dp, pp) and the one experts see (their own tp, ep, dp and the same pp).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lite.errors import ConfigError

AXES = ("tp", "cp", "ep", "dp", "pp")

RankLists = list[list[int]]


class ParallelLayoutError(ConfigError, RuntimeError):
    """Parallel sizes that do not fit the number of ranks (a RuntimeError too, as scripts for Megatron expect)."""


class RankGenerator:
    """The grid of ranks spanned by the parallel axes.

    Args:
        tp, ep, dp, pp, cp: sizes of the axes.
        order: axis names joined by "-", the fastest varying first; an axis of size 1 may be left out.
        rank_offset: added to every rank.

    Raises:
        ParallelLayoutError: `order` names an unknown axis, one twice, or leaves out one larger than 1.
    """

    def __init__(self, tp: int, ep: int, dp: int, pp: int, cp: int, order: str, rank_offset: int = 0) -> None:
        if ep > 1 and cp > 1:
            raise ParallelLayoutError(
                f"ep is {ep} and cp is {cp}, but one grid of ranks has either expert or context parallelism; "
                "describe experts by a second RankGenerator with cp=1."
            )
        self.tp, self.ep, self.dp, self.pp, self.cp = tp, ep, dp, pp, cp
        self.rank_offset = rank_offset
        self.name_to_size = {"tp": tp, "cp": cp, "ep": ep, "dp": dp, "pp": pp}
        self.world_size = math.prod(self.name_to_size.values())
        self.order = self._complete(order)

    def _complete(self, order: str) -> str:
        names = _axis_names(order.lower())
        for name, size in self.name_to_size.items():
            if name not in names:
                if size != 1:
                    raise ParallelLayoutError(
                        f"The size of {name} is {size}, but the order ({order}) does not name it; "
                        f"write for example {order}-{name}."
                    )
                names.append(name)
        return "-".join(names)

    def grid(self) -> npt.NDArray[np.int64]:
        """All ranks as an array whose axes are those of `order` reversed: the slowest first."""
        sizes = [self.name_to_size[name] for name in reversed(self.order.split("-"))]
        return np.arange(self.world_size).reshape(sizes) + self.rank_offset

    def spread(self, *tokens: str) -> npt.NDArray[np.int64]:
        """The grid with one array axis per token, for example `spread("pp", "dp-cp", "tp")`: [pp, dp*cp, tp].

        Axes joined in one token keep the grid's order among themselves; axes in no token must have size 1.
        """
        slowest_first = self.order.split("-")[::-1]
        wanted = [[name for name in slowest_first if name in _axis_names(token)] for token in tokens]
        named = [name for names in wanted for name in names]
        left_out = [name for name in slowest_first if name not in named]
        axes = [slowest_first.index(name) for name in [*named, *left_out]]
        shape = [math.prod(self.name_to_size[name] for name in names) for names in wanted]
        return self.grid().transpose(axes).reshape(shape)

    def get_ranks(self, token: str) -> RankLists:
        """All groups that span the axes of `token`, such as "tp" or "dp-cp" (the order within the token is free)."""
        inside = _axis_names(token)
        outside = "-".join(name for name in self.order.split("-") if name not in inside)
        groups = self.spread(outside, token) if outside else self.grid().reshape(1, -1)
        return groups.tolist()  # type: ignore[no-any-return]


def _axis_names(token: str) -> list[str]:
    names = token.split("-") if token else []
    for name in names:
        if name not in AXES:
            raise ParallelLayoutError(f"{name!r} in {token!r} is not a parallel axis; the axes are {', '.join(AXES)}.")
        if names.count(name) > 1:
            raise ParallelLayoutError(f"{token!r} names the axis {name!r} twice; name it once.")
    return names


@dataclass(frozen=True)
class ParallelLayout:
    """The dense and the expert grid of one world, and every kind of group they define."""

    dense: RankGenerator
    expert: RankGenerator
    num_distributed_optimizer_instances: int = 1
    num_expert_instances: int = 1

    @classmethod
    def from_sizes(
        cls,
        world_size: int,
        *,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int = 1,
        etp: int | None = None,
        num_distributed_optimizer_instances: int = 1,
        order: str = "tp-cp-ep-dp-pp",
        virtual_pp: int | None = None,
    ) -> "ParallelLayout":
        """Check the sizes against the world and against each other.

        Raises:
            ParallelLayoutError: with every rule the sizes break.
        """
        etp = tp if etp is None else etp
        sizes = {"tensor": tp, "pipeline": pp, "context": cp, "expert": ep, "expert tensor": etp}
        too_small = {name: size for name, size in sizes.items() if size < 1}
        found = [f"The {name} parallel size is {size}, but must be at least 1." for name, size in too_small.items()]
        if found:
            raise ParallelLayoutError.from_violations(found)
        found = _world_violations(world_size, {"tensor": tp, "pipeline": pp, "context": cp})
        found += _world_violations(world_size, {"expert tensor": etp, "expert": ep, "pipeline": pp})
        if virtual_pp is not None and pp == 1:
            found.append(
                f"virtual_pipeline_model_parallel_size is {virtual_pp}, but the pipeline-model-parallel size should be "
                "greater than 1 with interleaved schedule; raise it or leave virtual stages out."
            )
        if found:
            raise ParallelLayoutError.from_violations(found)
        dp, edp = world_size // (tp * pp * cp), world_size // (etp * ep * pp)
        dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
        expert = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order=order)
        instances = num_distributed_optimizer_instances
        # As many instances as ranks: nothing is split, so neither are the experts, whatever their number of ranks.
        expert_instances = edp if instances == dp * cp > 1 else instances
        for what, size, count in (("data x context", dp * cp, instances), ("expert data", edp, expert_instances)):
            if size % count:
                found.append(
                    f"num_distributed_optimizer_instances is {count}, but must divide the {what} parallel "
                    f"size ({size}); use {_divisor_near(size, count)}."
                )
        if dense.get_ranks("pp") != expert.get_ranks("pp"):
            found.append(
                f"With order {order} the pipeline groups of the dense layers (data parallel size {dp}) and of the "
                f"experts ({edp}) differ, but a rank holds the same stage of both; put pp last in the order, "
                f"or choose etp * ep = tp * cp (here {etp * ep} and {tp * cp})."
            )
        if found:
            raise ParallelLayoutError.from_violations(found)
        return cls(dense, expert, instances, expert_instances)

    def groups(self) -> dict[str, RankLists]:
        """Every kind of group by its name in ProcessGroupCollection, in the order they are created."""
        dense, expert = self.dense.get_ranks, self.expert.get_ranks
        dense_mesh, expert_mesh = self.dense_mesh(), self.expert_mesh()
        return {
            "tp": dense("tp"),
            "expt_tp": expert("tp"),
            "ep": expert("ep"),
            "pp": dense("pp"),
            "cp": dense("cp"),
            "dp": dense("dp"),
            "dp_cp": dense("dp-cp"),
            "intra_dp_cp": _along(dense_mesh, 2),
            "inter_dp_cp": _along(dense_mesh, 1),
            "mp": dense("tp-pp"),
            "tp_cp": dense("tp-cp"),
            "tp_dp": dense("tp-dp"),
            "tp_dp_cp": dense("tp-dp-cp"),
            "tp_ep": expert("tp-ep"),
            "tp_ep_pp": expert("tp-ep-pp"),
            "expt_dp": expert("dp"),
            "intra_expt_dp": _along(expert_mesh, 2),
            "inter_dist_opt": _along(expert_mesh, 1),
            "intra_dist_opt": np.sort(np.moveaxis(dense_mesh, 1, 0).reshape(dense_mesh.shape[1], -1)).tolist(),
        }

    def dense_mesh(self) -> npt.NDArray[np.int64]:
        """Ranks as [pp, dp_replicate, dp_shard, tp]; dp_replicate * dp_shard = dp * cp, the shards being neighbours."""
        return _with_replicas(self.dense.spread("pp", "dp-cp", "tp"), self.num_distributed_optimizer_instances)

    def expert_mesh(self) -> npt.NDArray[np.int64]:
        """Ranks as [pp, edp_replicate, edp_shard, ep, etp]."""
        return _with_replicas(self.expert.spread("pp", "dp", "ep", "tp"), self.num_expert_instances)


def _with_replicas(ranks: npt.NDArray[np.int64], replicas: int) -> npt.NDArray[np.int64]:
    stages, copies, *rest = ranks.shape
    return ranks.reshape(stages, replicas, copies // replicas, *rest)


def _along(mesh: npt.NDArray[np.int64], axis: int) -> RankLists:
    return np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis]).tolist()  # type: ignore[no-any-return]


def _world_violations(world_size: int, sizes: dict[str, int]) -> list[str]:
    model_size = math.prod(sizes.values())
    if world_size % model_size == 0:
        return []
    product = " x ".join(f"{name} ({size})" for name, size in sizes.items())
    below = world_size // model_size * model_size
    worlds = f"{below} or {below + model_size}" if below else f"{model_size}"
    return [
        f"world_size ({world_size}) is not divisible by {model_size} = {product}; "
        f"start {worlds} processes, or choose sizes whose product divides {world_size}."
    ]


def _divisor_near(size: int, wanted: int) -> int:
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - wanted))


def hierarchical_ranks(ranks: list[int], sizes: list[int]) -> list[RankLists]:
    """Groups of each level of a hierarchy over one group: level 0 joins neighbours, the last the farthest ranks.

    Raises:
        ParallelLayoutError: the sizes do not multiply to the size of the group.
    """
    if math.prod(sizes) != len(ranks):
        raise ParallelLayoutError(
            f"hierarchical_context_parallel_sizes is {sizes}, but must multiply to the context parallel size "
            f"({len(ranks)}); write for example [{len(ranks)}, 1]."
        )
    grid = np.array(ranks).reshape(sizes[::-1])
    return [_along(grid, len(sizes) - 1 - level) for level in range(len(sizes))]
