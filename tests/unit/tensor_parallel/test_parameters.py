"""Parameters: what is declared, and that initial values depend on seed and name alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from megatron_lite import parallel_state
from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel import (
    ParameterSpec,
    create_parameter,
    declare_parameter,
    initialize_parameters,
    named_parameter_specs,
)


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
