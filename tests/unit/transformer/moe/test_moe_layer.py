"""MoELayer in one process: the dense formula, capacity, recomputation, names, and a host that never waits."""

import gc
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.errors import ConfigError
from megatron_lite.process_groups import ProcessGroupCollection
from megatron_lite.training.setup import compile_layer
from megatron_lite.transformer import moe
from megatron_lite.transformer.mlp import MLP
from megatron_lite.transformer.moe import auxiliary_losses, flex_dispatcher
from megatron_lite.transformer.moe.capacity import expert_capacity, pairs_within_capacity
from megatron_lite.transformer.moe.moe_layer import MoELayer
from megatron_lite.transformer.moe.statistics import SUMS
from megatron_lite.transformer.moe.token_dispatcher import build_token_dispatcher
from megatron_lite.transformer.transformer_block import TransformerBlock
from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer
from tests.requirements import needs_compiler

CAPACITIES: list[dict[str, Any]] = [
    {},
    {"moe_expert_capacity_factor": 0.6},
    {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "position"},
    {"moe_expert_capacity_factor": 1.0},
    {"moe_expert_capacity_factor": 2.5},
    {"moe_expert_capacity_factor": 0.6, "moe_pad_expert_input_to_capacity": True},
    {"moe_expert_capacity_factor": 2.5, "moe_pad_expert_input_to_capacity": True},
]
KINDS = pytest.mark.parametrize("kind", ["allgather", "alltoall"])


def config(**settings: Any) -> TransformerConfig:
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "fp64": True, "init_method_std": 0.3}
    experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 12, "moe_router_topk": 2, "add_bias_linear": False}
    return TransformerConfig(**{**shape, **experts, **settings})


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


WHOLE: list[dict[str, Any]] = [
    {},
    {"gated_linear_unit": True, "moe_grouped_gemm": True, "fp64": False},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_num_groups": 2,
     "moe_router_group_topk": 1, "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True,
     "moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "seq_aux_loss", "moe_z_loss_coeff": 0.1},
    {"moe_router_type": "gmlp", "add_bias_linear": True, "moe_aux_loss_coeff": 0.1},
    {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    {"moe_expert_capacity_factor": 0.6},
    {"moe_expert_capacity_factor": 2.5, "moe_pad_expert_input_to_capacity": True},
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        pytest.param(WHOLE[1], "inductor", marks=needs_compiler),
        *((settings, "aot_eager") for settings in WHOLE),
    ],
    ids=str,
)
def test_a_compiled_layer_is_one_region(settings: dict[str, Any], backend: str) -> None:
    """Output, gradients and what its router counts are those of the layer as it is, for other tokens too.

    Nothing is compiled again when a step begins.

    Mutations: another grad_weight; a fake result of another shape; the losses' scale of the first step for ever; the
    number of the step on the host.
    """
    torch._dynamo.reset()
    layers = [filled(TransformerLayer(config(num_layers=1, **settings), layer_number=1)) for _ in range(2)]
    assert all(layer.mlp.is_one_region for layer in layers)
    layers[1].compile(fullgraph=True, backend=backend)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if settings.get("fp64") is False else {"rtol": 1e-11, "atol": 1e-11}
    dtype = layers[0].config.params_dtype
    for seed in (1, 2, 3):
        if seed != 2:
            auxiliary_losses.begin_step(torch.tensor(float(seed)))
        torch.manual_seed(seed)
        x = torch.randn(6, 2, 16, dtype=dtype)
        found = []
        for layer in layers:
            given = x.clone().requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=seed > 1):
                output = layer(given)
            layer.zero_grad()
            output.square().sum().backward()
            found.append([output, given.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, **tolerance)
    auxiliary_losses.begin_step(None)
    (*_, sums) = layers[1].buffers()
    assert sums[SUMS.index("tokens")] == 36


@pytest.mark.parametrize(("settings", "regions"), [({}, 1), ({"moe_input_jitter_eps": 0.1}, 2)], ids=str)
def test_all_layers_share_what_is_compiled(settings: dict[str, Any], regions: int) -> None:
    """Torch compiles a function 8 times at most. Mutation: a region that reads its layer's number."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def keep(graph: Any, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(4, 2, 16, dtype=torch.float64, requires_grad=True)
    for number in range(1, 11):
        layer = filled(TransformerLayer(config(num_layers=10, moe_aux_loss_coeff=0.1, **settings), number))
        compile_layer(layer, keep)  # type: ignore[arg-type]
        x = layer(x)
    assert len(graphs) == regions


def test_many_kinds_of_layers_compile() -> None:
    """More than torch's 8 versions of a function: kinds of layers, in training and in evaluation.

    Mutation: torch's own limit, which fails at the first evaluation.
    """
    torch._dynamo.reset()
    kinds = [config(moe_aux_loss_coeff=0.1, window_size=window) for window in (None, (1, 0), (2, 0), (3, 0), (4, 0))]
    layers = [filled(TransformerLayer(kind, 1)) for kind in kinds]
    x = torch.randn(4, 2, 16, dtype=torch.float64, requires_grad=True)
    wanted = [layer(x) for layer in layers]
    for layer in layers:
        compile_layer(layer, backend="eager")
    for layer, output in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer(x), output)
    with torch.no_grad():
        for layer, output in zip(layers, wanted, strict=True):
            torch.testing.assert_close(layer.eval()(x), output)


def dense(layer: MoELayer, x: Tensor) -> Tensor:
    """sum over the chosen experts of p * fc2(gelu(fc1(x))), every expert computed for every token."""
    probs, indices = layer.router(x)
    settings, experts = layer.config, layer.experts
    if settings.moe_expert_capacity_factor is not None:
        flat, chosen = probs.flatten(0, 1), indices.flatten(0, 1)
        capacity = expert_capacity(len(flat), 2, 4, settings.moe_expert_capacity_factor)
        kept = pairs_within_capacity(flat, chosen, 4, capacity, settings.moe_token_drop_policy)
        probs = probs * kept.view_as(probs)
    hidden = torch.nn.functional.gelu(torch.einsum("sbh,efh->sbef", x, experts.weight1), approximate="tanh")
    of_all = torch.einsum("sbef,ehf->sbeh", hidden, experts.weight2)
    chosen = of_all.gather(2, indices[..., None].expand(-1, -1, -1, x.size(-1)))
    return (chosen * probs[..., None]).sum(2)


@KINDS
def test_dropped_tokens_meet_no_expert(kind: str) -> None:
    """An expert that nobody chose, and that would overflow. Mutation: rows that drops leave over hold real tokens."""
    layer = filled(MoELayer(config(moe_token_dispatcher_type=kind, moe_expert_capacity_factor=0.5), 1))
    assert isinstance(layer, MoELayer)
    layer.experts.weight1.data[3] = torch.inf
    tokens, indices = torch.randn(16, 16, dtype=torch.float64), torch.tensor([[0, 1]]).expand(16, 2)
    assert layer.experts(tokens, torch.rand(16, 2, dtype=torch.float64), indices).isfinite().all()


@KINDS
@pytest.mark.parametrize("settings", CAPACITIES, ids=str)
def test_the_layer_is_the_sum_over_the_chosen_experts(kind: str, settings: dict[str, Any]) -> None:
    """Output and all gradients. Fails with the rows that drops leave over given to real tokens."""
    layer = filled(MoELayer(config(moe_token_dispatcher_type=kind, **settings), 1))
    assert isinstance(layer, MoELayer)
    x = torch.randn(6, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    ours, expected = layer(x), dense(layer, x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    of_ours = torch.autograd.grad((ours * weight).sum(), inputs)
    of_dense = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(of_ours, of_dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_dropped_pairs_are_recorded() -> None:
    layer = filled(MoELayer(config(moe_expert_capacity_factor=0.5), 1))
    recorded: list[Tensor] = []
    layer.router.record_dropped = recorded.append
    layer(torch.randn(6, 3, 16, dtype=torch.float64))
    capacity = expert_capacity(18, 2, 4, 0.5)
    assert [int(one) for one in recorded] == [36 - 4 * capacity], "every expert is over its capacity"


class NoWaiting(TorchDispatchMode):
    """Forbids what makes the host wait for the device."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(one) for one in self.forbidden), f"{name} waits for the device"
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            assert all(one is None or one.dtype != torch.bool for one in args[1]), "picking by a mask waits"
        return func(*args, **(kwargs or {}))


@KINDS
@pytest.mark.parametrize("settings", CAPACITIES, ids=str)
def test_one_rank_never_waits_for_the_device(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not by tolist, which no operator shows. Fails with kept pairs picked by a mask."""

    def refuse(self: Tensor) -> Any:
        raise AssertionError("the host reads a tensor")

    dispatcher = build_token_dispatcher(config(moe_token_dispatcher_type=kind, **settings), 4)
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    tokens, probs = torch.randn(6, 16, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    for name in ("tolist", "item", "__int__", "__bool__", "__index__", "__float__"):
        monkeypatch.setattr(Tensor, name, refuse)
    with NoWaiting():
        rows, row_probs, _, state = dispatcher.dispatch(tokens, probs, indices)
        out = dispatcher.combine(rows * row_probs[:, None], state)
        out.backward(torch.ones_like(out))


@KINDS
@pytest.mark.parametrize("settings", CAPACITIES, ids=str)
def test_sizes_follow_from_shapes_alone(kind: str, settings: dict[str, Any]) -> None:
    """On the meta device there is no data to look at."""
    dispatcher = build_token_dispatcher(config(moe_token_dispatcher_type=kind, **settings), 4)
    tokens, probs = torch.empty(6, 16, device="meta"), torch.empty(6, 2, device="meta")
    rows, row_probs, counts, state = dispatcher.dispatch(tokens, probs, probs.long())
    assert (rows.shape[0], counts.shape) == (row_probs.shape[0], (4,))
    assert dispatcher.combine(rows, state).shape == (6, 16)


@pytest.mark.parametrize("module", ["moe", "moe_act"])
def test_recomputing_changes_nothing(module: str) -> None:
    """Gradients and recorded statistics. Fails with checkpoint() left out, by the number of calls of the router."""
    x = torch.randn(6, 3, 16, dtype=torch.float64)
    found = []
    for settings in ({}, {"recompute_granularity": "selective", "recompute_modules": [module]}):
        layer = filled(TransformerLayer(config(moe_aux_loss_coeff=0.1, **settings), 1))
        calls: list[Any] = []
        layer.mlp.router.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        inner = x.clone().requires_grad_()
        layer(inner).square().sum().backward()
        statistics = [layer.mlp.router.tokens_per_expert.clone(), layer.mlp.router.sums.clone()]
        found.append([inner.grad, *(one.grad for one in layer.parameters()), *statistics])
        assert len(calls) == (2 if settings and module == "moe" else 1)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_recomputing_mlp_means_dense_layers_and_moe_the_others() -> None:
    settings = {"moe_layer_freq": [0, 1], "recompute_granularity": "selective"}
    for modules, expected in ((["mlp"], [True, False]), (["moe"], [False, True]), (["mlp", "moe"], [True, True])):
        block = TransformerBlock(config(recompute_modules=modules, **settings))
        assert [layer.recompute_mlp for layer in block.layers.values()] == expected


def test_the_frequency_decides_which_layers_have_experts() -> None:
    def kinds(frequency: Any) -> list[type]:
        block = TransformerBlock(config(moe_layer_freq=frequency, num_layers=4))
        return [type(layer.mlp) for layer in block.layers.values()]

    assert kinds(1) == [MoELayer] * 4
    assert kinds(2) == [MoELayer, MLP, MoELayer, MLP]
    assert kinds([0, 1, 1, 0]) == [MLP, MoELayer, MoELayer, MLP]


def test_names() -> None:
    layer = TransformerLayer(config(moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True), 1)
    assert [name for name, _ in layer.mlp.named_parameters()] == [
        "router.weight",
        "experts.weight1",
        "experts.weight2",
        "shared_experts.gate_weight",
        "shared_experts.linear_fc1.weight",
        "shared_experts.linear_fc2.weight",
    ]


def test_public_names_are_found() -> None:
    assert all(getattr(moe, name) is not None for name in moe.__all__)
    with pytest.raises(AttributeError, match="Unknown"):
        moe.Unknown  # noqa: B018


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="num_moe_experts is None"):
        MoELayer(config(num_moe_experts=None))
    with pytest.raises(ConfigError, match=r"moe_token_dispatcher_type is 'pigeon', .* alltoall"):
        build_token_dispatcher(config(moe_token_dispatcher_type="pigeon"), 4)


@pytest.fixture
def two_ranks() -> Iterator[ProcessGroupCollection]:
    """Two expert parallel ranks that send nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    everybody, alone = dist.new_group([0, 1]), dist.new_group([0])
    yield ProcessGroupCollection(ep=everybody, tp_ep=everybody, expt_tp=alone)
    dist.destroy_process_group()


def test_flex_says_what_to_install(monkeypatch: pytest.MonkeyPatch, two_ranks: ProcessGroupCollection) -> None:
    """The remedy must not break another rule. Mutation: alltoall alone, beside --moe-enable-deepep."""
    monkeypatch.setattr(flex_dispatcher, "deep_ep_is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"deep_ep .* not installed; build it .* alltoall\.$"):
        build_token_dispatcher(config(moe_token_dispatcher_type="flex"), 4, two_ranks)
    with pytest.raises(ConfigError, match=r"alltoall and leave out --moe-enable-deepep\.$"):
        build_token_dispatcher(config(moe_enable_deepep=True), 4, two_ranks)


def test_flex_on_one_rank_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent. Mutation: require the package at every size."""
    monkeypatch.setattr(flex_dispatcher, "deep_ep_is_installed", lambda: False)
    x = torch.randn(5, 2, 16, dtype=torch.float64)
    outputs = []
    for kind in ("flex", "alltoall"):
        outputs.append(filled(MoELayer(config(moe_token_dispatcher_type=kind)))(x))
    assert torch.equal(*outputs)


class Buffer:
    """As DeepEP's: holds its group."""

    def __init__(self, group: ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(ranks: int) -> SimpleNamespace:
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: hidden_bytes * ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, *_: object) -> None:
        raise InterruptedError("there is no network")


def test_layers_share_a_buffer_which_goes_with_them(
    monkeypatch: pytest.MonkeyPatch, two_ranks: ProcessGroupCollection
) -> None:
    """Mutations: a dict of buffers (or one with weak keys, the groups, which its values hold); a buffer for each."""
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=Buffer))
    monkeypatch.setattr(flex_dispatcher, "deep_ep_is_installed", lambda: True)
    dispatchers = [build_token_dispatcher(config(moe_token_dispatcher_type="flex"), 4, two_ranks) for _ in range(2)]
    for dispatcher, width in zip(dispatchers, (16, 15), strict=True):
        with pytest.raises(InterruptedError):
            dispatcher.dispatch(torch.zeros(1, width), torch.zeros(1, 2), torch.tensor([[0, 1]]))
    buffer = weakref.ref(dispatchers[0]._buffer)
    assert dispatchers[1]._buffer is buffer() is not None
    del dispatcher, dispatchers
    gc.collect()
    assert buffer() is None
