"""Multi-latent attention (DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1): keys and values of a latent vector."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.context_parallel import PackedSeqParams
from megatron_lite.process_groups import ProcessGroupCollection, group_size
from megatron_lite.tensor_parallel.checkpoint_without_output import CheckpointWithoutOutput
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear
from megatron_lite.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron_lite.tensor_parallel.replicated_linear import ReplicatedLinear
from megatron_lite.transformer.attention import Attention
from megatron_lite.transformer.enums import AttnMaskType
from megatron_lite.transformer.inference_context import InferenceContext
from megatron_lite.transformer.norms import LayerNorm, RMSNorm, build_norm
from megatron_lite.transformer.rope import RotaryTables, YarnScaling, apply_rotary_pos_emb, yarn_temperature
from megatron_lite.transformer.transformer_config import TransformerConfig


def latent_softmax_scale(config: TransformerConfig, yarn: YarnScaling | None) -> float:
    """1 / sqrt(width of a query), times YaRN's temperature of all channels, rotated or not, for query and key."""
    temperature = 1.0 if yarn is None else yarn_temperature(yarn, yarn.mscale_all_dim)
    return temperature**2 / math.sqrt(config.query_channels)


class MLASelfAttention(Attention):
    """Self-attention whose queries, keys and values are made of latent vectors, [s, b, h] -> [s, b, h].

    With c_q = norm(x W_dq) and c_kv = norm(x W_dkv), of widths q_lora_rank and kv_lora_rank, head i has

        query  [c_q W_uq,i ; rope(c_q W_qr,i)]
        key    [c_kv W_uk,i ; rope(x W_kr)]      the rotated part is one for all heads
        value  c_kv W_uv,i

    of widths qk_head_dim + qk_pos_emb_head_dim, the same, and v_head_dim. Without q_lora_rank queries are made of x.
    The norms are there with qk_layernorm. Rotated pairs are neighbouring channels, as in DeepSeek's weights.

    Every tensor parallel rank holds the down-projections and the norms of the latents whole, and the up-projections of
    its own heads. Under sequence parallelism it computes the latents of its own positions, which the up-projections
    gather; the rotated part of the keys, which no matrix follows, is gathered by itself.

    Args:
        config: as in Attention, and the widths above, qk_layernorm and softmax_scale (default
            1 / sqrt(qk_head_dim + qk_pos_emb_head_dim)). "mla_up_proj" in recompute_modules frees queries, keys and
            values after the core attention and makes them again of the latents in backward.
        layer_number, attn_mask_type, cp_comm_type, pg_collection: as in Attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, cp_comm_type, pg_collection)
        if config.softmax_scale is None:
            # Said here, because core attention gets queries and values filled up to one width.
            self.core_attention.softmax_scale = latent_softmax_scale(config, None)
        selective = config.recompute_granularity == "selective"
        self.recompute_up_projection = selective and "mla_up_proj" in (config.recompute_modules or ())
        self.heads_per_partition = config.num_attention_heads // group_size(self.tp_group)
        self.q_layernorm = self.kv_layernorm = None
        if config.q_lora_rank is None:
            self.linear_q_proj = self._up_projection(config.hidden_size, config.query_channels)
        else:
            self.linear_q_down_proj = ReplicatedLinear(config.hidden_size, config.q_lora_rank, config=config)
            self.q_layernorm = self._norm_of_latent(config.q_lora_rank)
            self.linear_q_up_proj = self._up_projection(config.q_lora_rank, config.query_channels)
        self.linear_kv_down_proj = ReplicatedLinear(
            config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim, config=config
        )
        self.kv_layernorm = self._norm_of_latent(config.kv_lora_rank)
        self.linear_kv_up_proj = self._up_projection(config.kv_lora_rank, config.qk_head_dim + config.v_head_dim)

    def _norm_of_latent(self, width: int) -> LayerNorm | RMSNorm | None:
        return build_norm(self.config, width) if self.config.qk_layernorm else None

    def _up_projection(self, input_size: int, width: int) -> ColumnParallelLinear:
        """A projection to `width` channels of each head."""
        config = self.config
        return ColumnParallelLinear(
            input_size,
            config.num_attention_heads * width,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        inference_context: InferenceContext | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        latents = self._latents(hidden_states)
        length, batch = latents[-1].shape[:2]
        # Core attention would make a row of packed documents itself, and keep that copy for its backward pass.
        as_row = packed_seq_params is not None and packed_seq_params.is_packed and batch > 1
        project = functools.partial(self._queries_keys_values, rotary=rotary, as_row=as_row)
        recomputed = None
        if self.recompute_up_projection and self.training and torch.is_grad_enabled():
            recomputed = CheckpointWithoutOutput()
            query, key, value = recomputed.checkpoint(project, *latents)
        else:
            query, key, value = project(*latents)
        context = self._core(query, key, value, attention_mask, inference_context, packed_seq_params)
        if recomputed is not None:
            recomputed.discard_output_and_register_recompute(context)
        if as_row:
            context = context.view(batch, length, -1).transpose(0, 1)
        heads = context.unflatten(-1, (self.heads_per_partition, -1))
        return heads[..., : self.config.v_head_dim].flatten(-2)

    def _latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries (or the input), of keys and values [s, b, rank], and the keys' part to be rotated [s, b, r].

        Under sequence parallelism [s/tp, b, rank] for the first two.
        """
        config = self.config
        query_latent = hidden_states if config.q_lora_rank is None else self.linear_q_down_proj(hidden_states)
        if self.q_layernorm is not None:
            query_latent = self.q_layernorm(query_latent)
        sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        latent, key_positions = self.linear_kv_down_proj(hidden_states).split(sizes, dim=-1)
        if self.kv_layernorm is not None:
            latent = self.kv_layernorm(latent)
        if config.sequence_parallel:
            key_positions = gather_from_sequence_parallel_region(key_positions, group=self.tp_group)
        else:
            # Each rank's heads read it, so the gradient of the down-projection is the sum over the ranks.
            key_positions = copy_to_tensor_model_parallel_region(key_positions, self.tp_group)
        return query_latent, latent, key_positions

    def _queries_keys_values(
        self, query_latent: Tensor, latent: Tensor, key_positions: Tensor, rotary: RotaryTables | None, as_row: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, n, width] each for this rank's heads: of one width, as kernels want, and with memory of its own.

        With `as_row` the sequences are one behind the other, [b s, 1, n, width].
        """
        config = self.config
        project = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        query = project(query_latent).unflatten(-1, (self.heads_per_partition, -1))
        keys_values = self.linear_kv_up_proj(latent).unflatten(-1, (self.heads_per_partition, -1))
        key, value = keys_values.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        key_positions = key_positions.unsqueeze(2)
        if rotary is not None:
            query, rotated = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
            query = torch.cat((query, apply_rotary_pos_emb(rotated, rotary, rotary_interleaved=True)), dim=-1)
            key_positions = apply_rotary_pos_emb(key_positions, rotary, rotary_interleaved=True)
        key = torch.cat((key, key_positions.expand(*key.shape[:3], -1)), dim=-1)
        missing = key.size(-1) - value.size(-1)
        if missing < 0:
            query, key = F.pad(query, (0, -missing)), F.pad(key, (0, -missing))
        value = F.pad(value, (0, missing)) if missing > 0 else value.contiguous()
        if not as_row:
            return query, key, value
        query, key, value = (x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in (query, key, value))
        return query, key, value
