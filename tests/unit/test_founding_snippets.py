"""The usage snippets this package was asked to support: calls written for Megatron Core, with the package renamed.

Each test is one snippet at a small size, tensor parallel size 2, and what it promises. `.cuda()` is left out.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite import parallel_state
from megatron_lite.context_parallel import get_packed_seq_params, get_padding, split_sequence
from megatron_lite.errors import ConfigError
from megatron_lite.model_parallel_config import ModelParallelConfig
from megatron_lite.parallel_state import (
    get_context_parallel_group,
    get_context_parallel_rank,
    get_context_parallel_world_size,
    get_data_parallel_group,
    get_data_parallel_world_size,
    get_expert_model_parallel_group,
    get_expert_model_parallel_rank,
    get_expert_model_parallel_world_size,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    initialize_model_parallel,
)
from megatron_lite.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron_lite.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron_lite.transformer.dot_product_attention import DotProductAttention
from megatron_lite.transformer.module import MegatronModule
from megatron_lite.transformer.moe.experts import GroupedMLP
from megatron_lite.transformer.moe.router import MoERouter
from megatron_lite.transformer.transformer_config import TransformerConfig
from tests.parallel.pool import WorkerPool

BATCH, SEQUENCE, HIDDEN, FFN = 2, 6, 16, 48


def column_then_row(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sections 1.3: input [batch, seq_len, hidden_size], output [..., output_size_per_partition], then whole again."""
    initialize_model_parallel(tensor_model_parallel_size=2)
    config = ModelParallelConfig(tensor_model_parallel_size=2, sequence_parallel=False)
    layer = ColumnParallelLinear(
        input_size=HIDDEN,
        output_size=FFN,
        config=config,
        init_method=torch.nn.init.xavier_uniform_,
        bias=False,
    )
    input = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(1))
    output = layer(input)
    back = RowParallelLinear(
        input_size=FFN,
        output_size=HIDDEN,
        config=config,
        init_method=torch.nn.init.xavier_uniform_,
        bias=False,
    )
    result = back(output)
    reference = F.linear(F.linear(input, layer.weight.full_tensor()), back.weight.full_tensor())
    return output.detach(), result.detach(), reference.detach()


def test_column_and_row_parallel_linear(pool: WorkerPool) -> None:
    """Fails without the all-reduce in RowParallelLinear's forward."""
    for output, result, reference in pool.run(column_then_row, world_size=2):
        assert output.shape == (BATCH, SEQUENCE, FFN // 2)
        assert result.shape == (BATCH, SEQUENCE, HIDDEN)
        torch.testing.assert_close(result, reference)


def communicate(rank: int, world_size: int) -> dict[str, Tensor]:
    """Section 1.4, the mappings called with `tp_group=` and, as Megatron spells it, `group=`."""
    initialize_model_parallel(tensor_model_parallel_size=2)
    group = get_tensor_model_parallel_group()
    part = torch.full((SEQUENCE, BATCH, HIDDEN), float(rank + 1))
    found = {}
    for name, keywords in {"tp_group": {"tp_group": group}, "group": {"group": group}, "default": {}}.items():
        arguments: dict[str, Any] = keywords
        found[f"reduce {name}"] = reduce_from_tensor_model_parallel_region(part, **arguments)
        found[f"gather {name}"] = gather_from_sequence_parallel_region(part, **arguments)
        found[f"reduce-scatter {name}"] = reduce_scatter_to_sequence_parallel_region(part, **arguments)
    with pytest.raises(ConfigError, match="two spellings"):
        reduce_from_tensor_model_parallel_region(part, group, tp_group=torch.distributed.group.WORLD)
    with pytest.raises(ConfigError, match="tp_group="):
        gather_from_sequence_parallel_region(part, group)  # type: ignore[arg-type]
    return found


def test_mappings_by_group_keyword(pool: WorkerPool) -> None:
    """Fails if a keyword is ignored: the ranks' tensors then stay as they were."""
    whole = torch.cat([torch.full((SEQUENCE, BATCH, HIDDEN), value) for value in (1.0, 2.0)])
    for found in pool.run(communicate, world_size=2):
        for spelling in ("tp_group", "group", "default"):
            assert torch.equal(found[f"reduce {spelling}"], torch.full((SEQUENCE, BATCH, HIDDEN), 3.0))
            assert torch.equal(found[f"gather {spelling}"], whole)
            assert torch.equal(found[f"reduce-scatter {spelling}"], torch.full((SEQUENCE // 2, BATCH, HIDDEN), 3.0))


def mapping_of_a_smaller_group(rank: int, world_size: int) -> float:
    """A group given by keyword is the one that is used, not the tensor parallel group of 4."""
    initialize_model_parallel(tensor_model_parallel_size=4)
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    return float(reduce_from_tensor_model_parallel_region(torch.tensor([float(rank)]), tp_group=pairs[rank // 2])[0])


def test_mapping_uses_the_group_it_is_given(pool: WorkerPool) -> None:
    """Fails if `tp_group` falls back to the tensor parallel group: the sum would be 6 everywhere."""
    assert pool.run(mapping_of_a_smaller_group, world_size=4) == [1.0, 1.0, 5.0, 5.0]


def test_configurations_name_any_cluster() -> None:
    """Sections 1.5, 2.4 and 5.3: a config is a description; it needs no process group and no such cluster."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
    )
    assert (config.tensor_model_parallel_size, config.expert_tensor_parallel_size) == (8, 8)
    hierarchical = ModelParallelConfig(
        context_parallel_size=4,
        hierarchical_context_parallel_sizes=[2, 2],
        tensor_model_parallel_size=8,
        sequence_parallel=True,
    )
    assert hierarchical.hierarchical_context_parallel_sizes == [2, 2]
    assert hierarchical.violations() == []
    full = TransformerConfig(
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        tensor_model_parallel_size=8,
        context_parallel_size=4,
        expert_model_parallel_size=2,
        sequence_parallel=True,
    )
    assert (full.kv_channels, full.ffn_hidden_size) == (128, 16384)


def test_a_config_larger_than_the_world_builds_plain_layers() -> None:
    """ModelParallelConfig(tensor_model_parallel_size=8) in one process: the group decides, and there is none."""
    layer = ColumnParallelLinear(HIDDEN, FFN, config=ModelParallelConfig(tensor_model_parallel_size=8))
    assert layer(torch.randn(BATCH, SEQUENCE, HIDDEN)).shape == (BATCH, SEQUENCE, FFN)


def too_many_for_the_world(rank: int, world_size: int) -> str:
    with pytest.raises(ConfigError) as raised:
        initialize_model_parallel(tensor_model_parallel_size=8, pipeline_model_parallel_size=1, context_parallel_size=1)
    return str(raised.value)


def test_a_world_too_small_is_explained(pool: WorkerPool) -> None:
    for message in pool.run(too_many_for_the_world, world_size=2):
        assert "world_size (2) is not divisible by 8" in message


def initialize_and_ask(rank: int, world_size: int) -> tuple[int, ...]:
    """Section 1.6 and the queries of 5.2."""
    initialize_model_parallel(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
    )
    groups = (
        get_tensor_model_parallel_group(),
        get_context_parallel_group(),
        get_expert_model_parallel_group(),
        get_data_parallel_group(),
    )
    sizes = tuple(group.size() for group in groups if group is not None)
    return (
        get_tensor_model_parallel_world_size(),
        get_tensor_model_parallel_rank(),
        get_context_parallel_world_size(),
        get_context_parallel_rank(),
        get_expert_model_parallel_world_size(),
        get_expert_model_parallel_rank(),
        get_data_parallel_world_size(),
        *sizes,
    )


def test_initialize_and_query(pool: WorkerPool) -> None:
    assert pool.run(initialize_and_ask, world_size=2) == [(2, rank, 1, 0, 1, 0, 1, 2, 1, 1, 1) for rank in (0, 1)]


@pytest.fixture
def imagined_world() -> Any:
    """A function that makes this process rank 0 of a world of the given size."""

    def begin(size: int) -> None:
        torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())

    yield begin
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_combination_of_four_axes_on_128_ranks(imagined_world: Any) -> None:
    """Section 4.1. The 128 ranks are tp 8 x cp 4 x pp 2 x dp 2, and for experts etp 8 x ep 2 x pp 2 x edp 4."""
    imagined_world(8 * 4 * 2 * 2)
    initialize_model_parallel(
        tensor_model_parallel_size=8,
        context_parallel_size=4,
        expert_model_parallel_size=2,
        pipeline_model_parallel_size=2,
    )
    assert get_tensor_model_parallel_world_size() == 8
    assert get_context_parallel_world_size() == 4
    assert get_expert_model_parallel_world_size() == 2
    assert get_data_parallel_world_size() == 2
    assert parallel_state.get_expert_data_parallel_world_size() == 4


def test_context_parallel_preparation(imagined_world: Any) -> None:
    """Sections 2.4 to 2.6 at their own sizes: 32 ranks, 8-way tensor and 4-way context parallelism.

    8192 tokens fit, so no padding is needed; of the snippet's next length that does not, tokens and padding are packed
    apart. Fails if get_padding forgets the tensor parallel size, or the padding counts as tokens.
    """
    imagined_world(32)
    initialize_model_parallel(tensor_model_parallel_size=8, context_parallel_size=4, pipeline_model_parallel_size=1)
    assert (get_context_parallel_world_size(), get_context_parallel_rank()) == (4, 0)
    group = get_context_parallel_group()
    assert group is not None
    assert torch.distributed.get_process_group_ranks(group) == [0, 8, 16, 24]
    config = TransformerConfig(
        hidden_size=4096,
        num_attention_heads=32,
        kv_channels=128,
        tensor_model_parallel_size=8,
        context_parallel_size=4,
        sequence_parallel=True,
    )
    assert DotProductAttention(config=config, layer_number=1).context.size == 4
    cp_size = get_context_parallel_world_size()
    assert get_padding(seq_len=8192, cp_size=cp_size, tp_size=8, has_sp=True) == 0
    padding = get_padding(seq_len=8200, cp_size=cp_size, tp_size=8, has_sp=True)
    assert padding == 56
    tokens = torch.randint(0, 50000, (2, 8200 + padding))
    packed_params = get_packed_seq_params(tokens=tokens, img_seq_len=0, padding_needed=padding, cp_size=cp_size)
    assert packed_params.qkv_format == "thd"
    assert packed_params.layout.documents == ((0, 8200), (8256, 16456))


def long_sequence(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Section 6.2. Attention takes query, key and value, not token ids; each rank brings its heads of its tokens."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    config = TransformerConfig(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        kv_channels=HIDDEN // 4,
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        sequence_parallel=True,
    )
    attn = DotProductAttention(config=config, layer_number=1)
    seq_len = 30
    padding = get_padding(
        seq_len=seq_len,
        cp_size=parallel_state.get_context_parallel_world_size(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        has_sp=True,
    )
    # [s, b, n, d]. Padding at the end is seen by no real token, as attention is causal.
    whole = torch.randn(3, seq_len + padding, BATCH, 4, HIDDEN // 4, generator=torch.Generator().manual_seed(4))
    tp_rank, cp_rank = get_tensor_model_parallel_rank(), get_context_parallel_rank()
    query, key, value = split_sequence(whole.chunk(2, dim=3)[tp_rank], 1, 2, cp_rank)
    output = attn(query, key, value, attention_mask=None)
    first = (x.permute(1, 2, 0, 3) for x in whole)
    reference = F.scaled_dot_product_attention(*first, is_causal=True).permute(2, 0, 1, 3)
    mine = split_sequence(reference.chunk(2, dim=2)[tp_rank], 0, 2, cp_rank)
    return output, mine.flatten(2)


def test_long_sequence_under_tensor_and_context_parallelism(pool: WorkerPool) -> None:
    """Fails if a rank attends to its own keys only, or splits the sequence into contiguous parts."""
    for output, reference in pool.run(long_sequence, world_size=4):
        assert output.shape == (16, BATCH, HIDDEN // 2)  # 30 tokens and 2 of padding on two ranks
        torch.testing.assert_close(output, reference)


def test_experts_with_their_own_tensor_parallel_size(imagined_world: Any) -> None:
    """Section 3.6: eight ranks hold 2-way split experts over four expert parallel ranks."""
    imagined_world(8)
    initialize_model_parallel(tensor_model_parallel_size=8, expert_model_parallel_size=4, expert_tensor_parallel_size=2)
    assert get_expert_model_parallel_world_size() == 4
    assert parallel_state.get_expert_tensor_parallel_world_size() == 2


def test_configuration_of_experts() -> None:
    """Section 3.5: it describes a mixture over any cluster, and breaks no rule."""
    config = TransformerConfig(
        hidden_size=4096,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_pre_softmax=False,
        expert_model_parallel_size=4,
        tensor_model_parallel_size=8,
        expert_tensor_parallel_size=2,
        moe_grouped_gemm=True,
        moe_aux_loss_coeff=0.01,
    )
    assert config.violations() == []


class MoEBlock(torch.nn.Module):
    """Sections 3.7 and 6.3."""

    def __init__(self, config: TransformerConfig, num_local_experts: int) -> None:
        super().__init__()
        self.router = MoERouter(config)
        self.experts = GroupedMLP(
            num_local_experts=num_local_experts,
            config=config,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, indices = self.router(x)
        output = self.experts(x, scores, indices)
        aux_loss = self.router.compute_aux_loss(scores, indices)
        return output, aux_loss


def experts_on_four_ranks(rank: int, world_size: int) -> dict[str, Any]:
    initialize_model_parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    config = TransformerConfig(
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_aux_loss_coeff=0.01,
        tensor_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=2,
        bias_gelu_fusion=False,
        init_method_std=0.3,
    )
    assert config.num_moe_experts is not None
    num_local_experts = config.num_moe_experts // config.expert_model_parallel_size
    torch.manual_seed(6)
    model = MoEBlock(config, num_local_experts)
    # The tensor parallel ranks of a replica have the same sequences, as the snippet does it; so each expert sees them
    # twice, and a block that is to be trained splits them first: scripts/examples/moe_block.py.
    input = torch.randn(
        BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    )
    output, aux_loss = model(input)

    assert model.router.weight is not None
    logits = F.linear(input, model.router.weight)
    best, indices = logits.topk(2, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, indices, best.softmax(-1))
    by_expert = [
        F.linear(F.gelu(F.linear(input, first)), second)
        for first, second in zip(model.experts.weight1.full_tensor(), model.experts.weight2.full_tensor(), strict=True)
    ]
    load = F.one_hot(indices, 4).float().sum(2).mean((0, 1)) / 2
    return {
        "output": (output, torch.einsum("bse,ebsh->bsh", weights, torch.stack(by_expert))),
        "balance loss": (aux_loss, 4 * (load * logits.softmax(-1).mean((0, 1))).sum()),
        "local experts": (torch.tensor(model.experts.num_local_experts), torch.tensor(2)),
        "expert parallel rank": (torch.tensor(get_expert_model_parallel_rank()), torch.tensor(rank // 2)),
        "stored": (torch.tensor(model.experts.weight1.to_local().shape), torch.tensor((2, FFN // 2, HIDDEN))),
    }


def test_block_of_router_and_grouped_mlp(pool: WorkerPool) -> None:
    """Biases are zero at first. Fails, for example, if the two halves of an expert are not added, or if the balance
    loss counts the tokens of two tensor parallel ranks but divides by those of one.
    """
    for rank, compared in enumerate(pool.run(experts_on_four_ranks, world_size=4)):
        for name, (ours, reference) in compared.items():
            torch.testing.assert_close(ours, reference, msg=lambda text, at=f"rank {rank}, {name}": f"{at}: {text}")


class MyAttention(MegatronModule):
    """Section 1.7. The attention that the snippet leaves to the reader ("...") is filled in: one head a rank."""

    def __init__(self, config: TransformerConfig, attends: bool = True) -> None:
        super().__init__(config)
        self.attends = attends
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            3 * config.kv_channels,
            config=config,
        )
        self.proj = RowParallelLinear(
            config.kv_channels,
            config.hidden_size,
            config=config,
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.attends:
            query, key, value = qkv.chunk(3, dim=-1)
            qkv = F.scaled_dot_product_attention(query, key, value)
        return self.proj(qkv)


def complete_example(rank: int, world_size: int) -> tuple[Tensor, Tensor, str]:
    initialize_model_parallel(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
    )
    config = TransformerConfig(
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    model = MyAttention(config)
    # Under sequence parallelism dim 0 is the sequence, of which each rank passes its part.
    input = torch.randn(SEQUENCE // 2, BATCH, HIDDEN, generator=torch.Generator().manual_seed(rank))
    output = model(input)
    parts = [torch.randn(SEQUENCE // 2, BATCH, HIDDEN, generator=torch.Generator().manual_seed(r)) for r in (0, 1)]
    # One row block of qkv's weight a rank: the query, key and value of that rank's head.
    heads = []
    for block in model.qkv.weight.full_tensor().chunk(2):
        query, key, value = F.linear(torch.cat(parts), block).chunk(3, dim=-1)
        heads.append(F.scaled_dot_product_attention(query, key, value))
    reference = F.linear(torch.cat(heads, dim=-1), model.proj.weight.full_tensor())
    with pytest.raises(ConfigError) as raised:
        MyAttention(config, attends=False)(input)
    return output.detach(), reference.chunk(2)[rank].detach(), str(raised.value)


def test_complete_example(pool: WorkerPool) -> None:
    """Fails if RowParallelLinear all-reduces instead of reduce-scattering under sequence parallelism.

    Passed straight to `proj`, without the attention between, 3 * kv_channels / tp features fit neither the whole input
    nor a part of it, and the error says so.
    """
    for output, reference, message in pool.run(complete_example, world_size=2):
        assert output.shape == (SEQUENCE // 2, BATCH, HIDDEN)
        torch.testing.assert_close(output, reference)
        assert "last dimension is 12" in message
        assert "takes 4 or 8" in message


class SimpleMLP(torch.nn.Module):
    """Section 6.1."""

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(input_size=HIDDEN, output_size=4 * HIDDEN, config=config)
        self.fc2 = RowParallelLinear(input_size=4 * HIDDEN, output_size=HIDDEN, config=config)
        self.act = torch.nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.fc2(x)
        return x


def simple_mlp(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    config = ModelParallelConfig(tensor_model_parallel_size=world_size, sequence_parallel=False)
    torch.manual_seed(5)
    model = SimpleMLP(config)
    input = torch.randn(BATCH, SEQUENCE, HIDDEN, requires_grad=True)
    output = model(input)
    output.square().sum().backward()
    assert parallel_state.get_tensor_model_parallel_rank() == rank
    assert input.grad is not None
    return output.detach(), input.grad, model.fc1.weight.full_tensor().detach(), model.fc1.weight.grad.full_tensor()


def test_simple_mlp(pool: WorkerPool) -> None:
    """Fails without the all-reduce of the input's gradient in ColumnParallelLinear's backward."""
    one = pool.run(simple_mlp, world_size=1)[0]
    for two in pool.run(simple_mlp, world_size=2):
        for ours, reference in zip(two, one, strict=True):
            torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("tp", [1, 2])
def test_row_parallel_linear_tells_whether_its_input_is_split(pool: WorkerPool, tp: int) -> None:
    """The snippets feed RowParallelLinear whole and split inputs without saying which."""
    for whole, split in pool.run(both_forms, world_size=tp):
        torch.testing.assert_close(whole, split)


def both_forms(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    initialize_model_parallel(tensor_model_parallel_size=world_size)
    layer = RowParallelLinear(FFN, HIDDEN, config=ModelParallelConfig(tensor_model_parallel_size=world_size))
    input = torch.randn(BATCH, SEQUENCE, FFN, generator=torch.Generator().manual_seed(3))
    return layer(input).detach(), layer(input.chunk(world_size, dim=-1)[rank]).detach()
