"""Parameters: what is declared, and that initial values depend on seed and name alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.tensor_parallel import (
    ParameterSpec,
    create_parameter,
    declare_parameter,
    initialize_parameters,
    named_parameter_specs,
)
from megatron_lite.tensor_parallel.parameters import create_expert_parameter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        create_parameter(self, "weight", (4, 6), init_method=nn.init.normal_, dtype=torch.float32)
        create_parameter(
            self, "scale", (6,), init_method=nn.init.ones_, dtype=torch.float32, partial_over_tp=True, is_expert=True
        )


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    parallel_state.shutdown()


def test_specs_go_by_the_names_of_the_parameters_and_count_tied_ones_once() -> None:
    model = nn.ModuleDict({"first": Block(), "second": Block()})
    model["second"].weight = model["first"].weight
    specs = named_parameter_specs(model)
    assert (
        list(specs) == ["first.weight", "first.scale", "second.scale"] == [name for name, _ in model.named_parameters()]
    )
    assert specs["second.scale"] == ParameterSpec(nn.init.ones_, partial_over_tp=True, is_expert=True)


def test_an_undeclared_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Parameter 0\.weight has no declaration"):
        named_parameter_specs(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    declare_parameter(model[0], "weight", ParameterSpec(nn.init.zeros_))
    initialize_parameters(model, seed=1)
    assert not model[0].weight.any()


def test_initial_values_depend_on_seed_and_name_only() -> None:
    one = nn.ModuleDict({"a": Block(), "b": Block()})
    other = nn.ModuleDict({"b": Block(), "a": Block()})
    initialize_parameters(one, seed=3)
    torch.manual_seed(99)
    initialize_parameters(other, seed=3)
    assert torch.equal(one["a"].weight, other["a"].weight)
    assert not torch.equal(one["a"].weight, one["b"].weight)
    initialize_parameters(other, seed=4)
    assert not torch.equal(one["a"].weight, other["a"].weight)


def test_a_parameter_split_over_any_group_is_a_dtensor() -> None:
    parallel_state.initialize_model_parallel()
    group = torch.distributed.new_group([0])
    module = nn.Module()
    parameter = create_parameter(
        module, "weight", (4, 6), init_method=nn.init.ones_, dtype=torch.float32, shard_dim=0, group=group
    )
    assert parameter.placements[0].is_shard(0)  # type: ignore[attr-defined]
    assert parameter.device_mesh.get_group() is group  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group(group)


def create_stack(module: nn.Module, groups: ProcessGroupCollection) -> nn.Parameter:
    return create_expert_parameter(
        module,
        "weight",
        (4, 6, 8),
        init_method=nn.init.xavier_normal_,
        dtype=torch.float32,
        shard_dim=1,
        ep_group=groups.ep,
        etp_group=groups.expt_tp,
        tp_ep_group=groups.tp_ep,
    )


def test_stacked_experts_lie_on_the_mesh_of_their_groups_whoever_made_them() -> None:
    torch.manual_seed(1)
    plain = create_stack(nn.Module(), ProcessGroupCollection())
    assert plain.shape == (4, 6, 8)
    assert len(plain.unique()) == plain.numel()
    parallel_state.initialize_model_parallel()
    made = [torch.distributed.new_group([0]) for _ in range(3)]
    foreign = ProcessGroupCollection(ep=made[0], expt_tp=made[1], tp_ep=made[2])
    for groups in (ProcessGroupCollection.use_mpu_process_groups(), foreign):
        torch.manual_seed(1)
        parameter = create_stack(nn.Module(), groups)
        assert parameter.device_mesh.mesh_dim_names == ("ep", "etp")  # type: ignore[attr-defined]
        assert [placement.dim for placement in parameter.placements] == [0, 1]  # type: ignore[attr-defined]
        assert torch.equal(parameter.full_tensor(), plain)  # type: ignore[attr-defined]
    for group in made:
        torch.distributed.destroy_process_group(group)


def test_experts_that_do_not_fit_their_groups_are_refused() -> None:
    class Two:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

    two = Two()
    with pytest.raises(ConfigError, match=r"groups of 2 \(ep\) and 1 \(expt_tp\)"):
        create_stack(nn.Module(), ProcessGroupCollection(ep=two))  # type: ignore[arg-type]
    two.size = lambda: 3  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="4 is not divisible by 3"):
        create_stack(nn.Module(), ProcessGroupCollection(ep=two))  # type: ignore[arg-type]
