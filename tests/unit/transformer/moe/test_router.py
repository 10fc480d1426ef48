"""TopKRouter in one process: logits, dtypes, attached losses, jitter, expert bias, recomputation and buffers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lite.errors import ConfigError
from megatron_lite.tensor_parallel.parameters import named_parameter_specs
from megatron_lite.transformer.moe import auxiliary_losses, statistics
from megatron_lite.transformer.moe.router import MoERouter, TopKRouter
from megatron_lite.transformer.transformer_config import TransformerConfig

S, B, H, E, K = 6, 2, 8, 4, 2
ALL_LOSSES: dict[str, Any] = dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
    moe_aux_loss_coeff=[0.5, 0.25, 0.125],
    moe_z_loss_coeff=0.0625,
)


@pytest.fixture(autouse=True)
def scale_of_one() -> Iterator[None]:
    torch.manual_seed(0)
    auxiliary_losses.begin_step(None)
    yield
    auxiliary_losses.begin_step(None)


def build(dtype: torch.dtype = torch.float64, **settings: Any) -> TopKRouter:
    config = TransformerConfig(
        **(
            dict(num_layers=1, hidden_size=H, num_attention_heads=2, num_moe_experts=E, moe_router_topk=K)
            | dict(params_dtype=dtype, add_bias_linear=False, init_method_std=0.5)
            | settings
        )
    )
    return TopKRouter(config, layer_number=1)


def hidden_states(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """[S, B, H]; the two sequences prefer different experts."""
    x = torch.randn(S, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += 1.0
    return x.to(dtype)


def naive_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Balance loss of tokens [t, E] with given counts [E] of t tokens."""
    tokens = logits.size(0)
    return (E / (K * tokens * tokens) * counts * logits.softmax(-1).sum(0)).sum()


def chosen(logits: Tensor) -> Tensor:
    return F.one_hot(logits.topk(K).indices, E).sum((0, 1)).double()


def naive_total(weight: Tensor, x: Tensor, earlier: list[Tensor]) -> Tensor:
    """All losses of one micro-batch with the coefficients above; `earlier` are the step's micro-batches before it."""
    logits = x @ weight.t()
    flat = logits.flatten(0, 1)
    aux = naive_loss(flat, chosen(flat))
    sequences = sum(naive_loss(logits[:, b], chosen(logits[:, b])) for b in range(B)) / B
    average = sum(chosen((one @ weight.t()).flatten(0, 1)) for one in [*earlier, x]) / (len(earlier) + 1)
    return (
        0.5 * aux
        + 0.25 * sequences
        + 0.125 * naive_loss(flat, average)
        + 0.0625 * flat.exp().sum(-1).log().square().mean()
    )


def test_attached_losses_equal_their_definition() -> None:
    """Two micro-batches of a step, scaled; the next step's global counts begin anew. Mutations: attach one loss twice;

    ignore the scale; swap coefficients; do not average, or never reset, the global counts; z-loss by its sum.
    """
    router = build(**ALL_LOSSES)
    assert router.weight is not None
    reference = router.weight.detach().clone().requires_grad_()
    for step in range(2):
        router.weight.grad = reference.grad = None
        auxiliary_losses.begin_step(torch.tensor(0.3, dtype=torch.float64))
        batches = [hidden_states(10 * step + 1), hidden_states(10 * step + 2)]
        for number, x in enumerate(batches):
            weights, _ = router(x)
            (0.0 * weights).sum().backward()
            (0.3 * naive_total(reference, x, batches[:number])).backward()
        torch.testing.assert_close(router.weight.grad, reference.grad, rtol=1e-11, atol=1e-14)


def test_losses_leave_the_main_gradient_alone() -> None:
    """Mutation: attach's backward without the gradient of x."""
    plain, with_losses = build(), build(**ALL_LOSSES)
    with_losses.load_state_dict(plain.state_dict())
    auxiliary_losses.begin_step(torch.tensor(0.0))
    for router in (plain, with_losses):
        router(hidden_states())[0].square().sum().backward()
    assert plain.weight is not None
    assert with_losses.weight is not None
    torch.testing.assert_close(plain.weight.grad, with_losses.weight.grad)


def test_no_losses_in_evaluation() -> None:
    """Mutation: do not ask for `training`."""
    router = build(**ALL_LOSSES).eval()
    (0.0 * router(hidden_states())[0]).sum().backward()
    assert router.weight is not None
    assert router.weight.grad is not None
    assert not router.weight.grad.any()


def test_gmlp_equals_its_definition() -> None:
    """Mutations: gate without silu; gate and up exchanged."""
    router = build(moe_router_type="gmlp", add_bias_linear=True)
    assert sorted(dict(router.named_parameters())) == ["bias", "down.weight", "gate.weight", "up.weight"]
    with torch.no_grad():
        assert router.bias is not None
        router.bias.copy_(torch.arange(E))
    x = hidden_states()
    gate, up = x @ router.gate.weight.t(), x @ router.up.weight.t()
    expected = (gate / (1 + (-gate).exp()) * up) @ router.down.weight.t() + torch.arange(E)
    torch.testing.assert_close(router._logits(x), expected)


def test_bias_is_added_to_the_logits() -> None:
    """Mutation: no bias with add_bias_linear."""
    router = build(add_bias_linear=True)
    assert router.weight is not None
    assert router.bias is not None
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 50.0]))
    assert set(router(hidden_states())[1].flatten().tolist()) == {1, 3}


@pytest.mark.parametrize(("given", "router_dtype", "expected"), [
    (torch.bfloat16, None, torch.float32),
    (torch.float32, None, torch.float32),
    (torch.float64, None, torch.float64),
    (torch.bfloat16, "fp64", torch.float64),
    (torch.float64, "fp32", torch.float32),
])  # fmt: skip
def test_dtype(given: torch.dtype, router_dtype: str | None, expected: torch.dtype) -> None:
    """T42, under autocast too: two experts whose logits differ by less than a bfloat16 stay apart.

    Mutations: compute in the dtype of the input; let autocast have its way.
    """
    router = build(given, moe_router_dtype=router_dtype, moe_router_topk=1, moe_router_pre_softmax=True)
    with torch.no_grad():
        assert router.weight is not None
        router.weight.zero_()
        router.weight[:2] = 1.0
        router.weight[1, 0] += 2.0**-7  # bfloat16 has this weight, but not its sum with seven ones
    x = torch.ones(3, 1, H, dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        weights, indices = router(x)
    assert weights.dtype == expected
    assert indices.tolist() == [[[1]]] * 3
    assert weights[0].item() > 0.4 + 1e-3


def test_a_router_in_bfloat16_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """T42, a mutation that is run: compute in the dtype of the input."""
    monkeypatch.setattr(TopKRouter, "_compute_dtype", lambda self, hidden: hidden.dtype)
    with pytest.raises(AssertionError):
        test_dtype(torch.bfloat16, None, torch.float32)


def test_a_bfloat16_input_is_kept_as_it_is() -> None:
    """Not in float32, which would be twice the hidden states. Mutation: F.linear of the cast input."""
    router, kept = build(torch.bfloat16, moe_aux_loss_coeff=0.1), set()
    x = hidden_states(dtype=torch.bfloat16).repeat(1, 50, 1).requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        kept.add((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weights, _ = router(x)
    assert (torch.bfloat16, x.numel()) in kept
    assert (torch.float32, x.numel()) not in kept
    weights.square().sum().backward()
    exact = build(add_bias_linear=False, moe_aux_loss_coeff=0.1)
    assert router.weight is not None
    assert exact.weight is not None
    exact.weight.data.copy_(router.weight.data.bfloat16())
    y = x.detach().double().requires_grad_()
    exact(y)[0].square().sum().backward()
    for found, wanted in [(x.grad, y.grad), (router.weight.grad, exact.weight.grad)]:
        assert found is not None
        assert wanted is not None
        assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


def test_master_weights_are_rounded_as_under_fsdp() -> None:
    """In bfloat16 choices do not depend on whether there are data parallel ranks. Mutation: use the masters."""
    config = TransformerConfig(
        num_layers=1, hidden_size=H, num_attention_heads=2, num_moe_experts=E, add_bias_linear=False, bf16=True
    )
    router = TopKRouter(config, layer_number=1)
    assert router.weight is not None
    assert router.weight.dtype == torch.float32
    x = hidden_states(dtype=torch.bfloat16)
    before = router(x)[0]
    router.weight.data.copy_(router.weight.data.bfloat16())
    assert torch.equal(router(x)[0], before)


def test_jitter_multiplies_in_training_only() -> None:
    """Mutations: jitter in evaluation; noise in [0, 2 eps]."""
    router = build(moe_input_jitter_eps=0.25)
    x = torch.ones(200, 1, H, dtype=torch.float64)
    assert router.weight is not None
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, H))
        noise = router._logits(x)
    assert noise.min() < 0.78
    assert noise.max() > 1.22
    assert 0.75 <= noise.min() <= noise.max() <= 1.25
    assert torch.equal(router.eval()._logits(x), x[..., :E])


def test_forced_balance_ignores_the_input_and_has_a_gradient() -> None:
    """T55: not in evaluation, which draws nothing. Mutations: always; noise without straight-through gradients."""
    router = build(moe_router_force_load_balancing=True)
    weights, indices = router(torch.ones(400, 1, H, dtype=torch.float64))
    loads = indices.flatten().bincount(minlength=E)
    assert loads.min() > 150
    weights.select(-1, 0).sum().backward()
    assert router.weight is not None
    assert router.weight.grad is not None
    assert router.weight.grad.any()
    before = torch.get_rng_state()
    assert len(router.eval()(torch.ones(400, 1, H, dtype=torch.float64))[1].unique(dim=0)) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_sinkhorn_balances_in_training_only() -> None:
    """Mutation: balance in evaluation."""
    router = build(moe_router_load_balancing_type="sinkhorn", moe_router_topk=1, add_bias_linear=True)
    with torch.no_grad():
        assert router.bias is not None
        router.bias[2] = 6.0
    x = hidden_states()
    assert router(x)[1].flatten().bincount(minlength=E).max() <= S * B // E + 1
    assert (router.eval()(x)[1] == 2).float().mean() > 0.8


@pytest.mark.parametrize("dim", [2, 4])
def test_sequences_must_be_told_apart(dim: int) -> None:
    """Mutation: take [t, h] for one sequence."""
    router = build(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1)
    x = hidden_states()
    with pytest.raises(ConfigError, match=f"with {dim} dimensions"):
        router(x.flatten(0, 1) if dim == 2 else x.unsqueeze(0))
    with pytest.raises(ConfigError, match="chooses 1 to"):
        build(moe_router_topk=E + 1)


def test_shapes_are_kept() -> None:
    """One token [h], [t, h], [s, b, h] and more dimensions. Mutations: give back flattened tensors; flatten(0, -2)."""
    router = build()
    for shape in [(), (5,), (3, 2), (2, 3, 2)]:
        weights, indices = router(torch.randn(*shape, H, dtype=torch.float64))
        assert weights.shape == indices.shape == (*shape, K)


@pytest.mark.parametrize("shape", [(0, B), (S, 0)])
def test_losses_of_no_tokens_are_zero(shape: tuple[int, int]) -> None:
    """Mutations: divide by the number of tokens, or of sequences, as it is; leave sizes of empty views to guess."""
    kinds = ["aux_loss", "seq_aux_loss", "global_aux_loss"]
    router = build(moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=[0.1, 0.1, 0.1], moe_z_loss_coeff=0.1)
    scores, indices = router(torch.randn(*shape, H, dtype=torch.float64))
    assert scores.shape == indices.shape == (*shape, K)
    loss = router.compute_aux_loss(scores, indices)
    assert loss.item() == 0.0
    (scores.sum() + loss).backward()
    assert router.weight is not None
    torch.testing.assert_close(router.weight.grad, torch.zeros_like(router.weight))


def test_compute_aux_loss_of_a_router_alone() -> None:
    """From what forward returned, and nothing else. Mutations: chosen scores in place of all; lose the gradient."""
    router = build()
    x = hidden_states()
    scores, indices = router(x)
    assert router.weight is not None
    reference = router.weight.detach().clone().requires_grad_()
    loss = router.compute_aux_loss(scores, indices)
    logits = (x @ reference.t()).flatten(0, 1)
    expected = naive_loss(logits, chosen(logits))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(router.weight.grad, reference.grad)
    with pytest.raises(ConfigError, match="call it with what forward returned"):
        router.compute_aux_loss(scores.flatten(0, 1), indices.flatten(0, 1))


def test_expert_bias_moves_towards_balance_and_starts_counting_anew() -> None:
    """T45. Mutations: the sign turned round; counts kept after a step; update by the difference instead of its sign."""
    router = build(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    assert router.expert_bias is not None
    assert router.expert_bias.dtype == torch.float32
    assert router.step_tokens_per_expert is not None
    assert router.step_tokens_per_expert.dtype == torch.int64
    _, indices = router(hidden_states())
    counts = indices.flatten().bincount(minlength=E)
    assert torch.equal(router.step_tokens_per_expert, counts)
    statistics.update_expert_bias(router, None)
    mean = S * B * K / E
    expected = torch.tensor([1e-3 if count < mean else -1e-3 if count > mean else 0.0 for count in counts.tolist()])
    torch.testing.assert_close(router.expert_bias, expected)
    assert expected.any()
    statistics.update_expert_bias(router, None)  # nothing was routed since
    torch.testing.assert_close(router.expert_bias, expected)


def test_expert_bias_balances_within_steps() -> None:
    """Fifty steps at a high rate level an unequal load. Mutation: choose without the bias."""
    router = build(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.02
    )
    for _ in range(50):
        statistics.collect(router, None)
        router(hidden_states().repeat(1, 20, 1) + 0.3 * torch.randn(S, B * 20, H, dtype=torch.float64))
        statistics.update_expert_bias(router, None)
    assert statistics.collect(router, None)["moe_balance"] < 1.2


def test_aux_loss_looks_at_plain_choices_despite_a_bias() -> None:
    """Mutation: count the biased choices."""
    settings: dict[str, Any] = dict(moe_router_score_function="sigmoid", moe_aux_loss_coeff=1.0)
    plain, biased = build(**settings), build(moe_router_enable_expert_bias=True, **settings)
    biased.load_state_dict(plain.state_dict(), strict=False)
    assert biased.expert_bias is not None
    biased.expert_bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    for router in (plain, biased):
        (0.0 * router(hidden_states())[0]).sum().backward()
    assert set(biased(hidden_states())[1].flatten().tolist()) == {0, 1}
    assert plain.weight is not None
    assert biased.weight is not None
    torch.testing.assert_close(plain.weight.grad, biased.weight.grad)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_recomputation_repeats_and_counts_nothing(micro_batches: int) -> None:
    """T37, T45: all forwards of a step before all backwards, as in a pipeline. Mutations: record in recomputation too;

    never record; average the global counts anew when computed again; take the last average for all.
    """
    plain = build(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid", **ALL_LOSSES)
    again = build(
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        recompute_granularity="selective",
        recompute_modules=["moe"],
        **ALL_LOSSES,
    )
    again.load_state_dict(plain.state_dict())
    batches = [hidden_states(seed) for seed in range(micro_batches)]
    for _ in range(2):
        auxiliary_losses.begin_step(torch.tensor(0.5))
        outputs = [plain(x)[0].square().sum() for x in batches]
        outputs_again = [checkpoint(lambda x: again(x)[0].square(), x, use_reentrant=False).sum() for x in batches]
        for one in outputs + outputs_again:
            one.backward()
    assert plain.weight is not None
    assert again.weight is not None
    torch.testing.assert_close(plain.weight.grad, again.weight.grad, rtol=1e-12, atol=1e-14)
    assert plain.step_tokens_per_expert is not None
    assert plain.step_tokens_per_expert.sum() == 2 * micro_batches * S * B * K
    for (name, buffer), (_, other) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_buffers_keep_their_dtype_and_survive_meta() -> None:
    """Mutations: leave _apply out; a buffer that reset_buffers forgets; save the counts with the weights."""
    with torch.device("meta"):
        router = build(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, **ALL_LOSSES)
    router.to_empty(device="cpu")
    for buffer in router.buffers():
        buffer.fill_(7)
    router.reset_buffers()
    assert not any(buffer.any() for buffer in router.buffers())
    assert router.expert_bias is not None
    router.expert_bias.fill_(0.1)
    router.bfloat16()
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, torch.full((E,), 0.1))
    assert router.sums.dtype == torch.float64
    assert sorted(router.state_dict()) == ["expert_bias", "weight"]


def test_parameters_are_declared() -> None:
    """Mutation: create a parameter by hand."""
    assert MoERouter is TopKRouter
    for kind in ("linear", "gmlp"):
        specs = named_parameter_specs(build(moe_router_type=kind, add_bias_linear=True))
        assert not any(spec.partial_over_tp or spec.is_expert for spec in specs.values())
