"""A Llama or a Mixtral in plain torch, the way small training repositories write it, with their weights' names.

As plain_gpt.py, with RMSNorm, rotary positions, a gated MLP and fewer key heads than query heads; with experts, each
expert takes the tokens that chose it out of the batch and adds what it makes of them. This file imports torch only.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainLlamaConfig:
    """The shape of the model; no biases, no dropout. Without experts (0) every layer has one MLP."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_heads: int
    head_size: int
    ffn_hidden_size: int
    vocab_size: int
    rope_theta: float
    tied: bool
    norm_epsilon: float
    num_experts: int = 0
    experts_per_token: int = 0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: [b, n, s, d] with tables [s, d]; channel i is paired with i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention, [b, s, h] -> [b, s, h]."""

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_size = config.num_heads, config.num_key_heads, config.head_size
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.key_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.key_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.heads, self.head_size).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, self.key_heads, self.head_size).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, self.key_heads, self.head_size).transpose(1, 2)
        query, key = rotate(query, cos, sin).to(value.dtype), rotate(key, cos, sin).to(value.dtype)
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.heads != self.key_heads
        )
        return self.o_proj(context.transpose(1, 2).contiguous().view(batch, length, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), [..., h] -> [..., h]."""

    def __init__(self, config: PlainLlamaConfig, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        gate, up, down = names
        self.add_module(gate, nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False))
        self.add_module(up, nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False))
        self.add_module(down, nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


class Experts(nn.Module):
    """The experts_per_token best experts of each token, weighted by the softmax over them; [b, s, h] -> [b, s, h]."""

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config, ("w1", "w3", "w2")) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        tokens = x.view(-1, x.size(-1))
        scores, chosen = self.gate(tokens).topk(self.experts_per_token, dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(tokens.dtype)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            result = expert(tokens[token]) * weights[token, place, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output.view_as(x)


class Block(nn.Module):
    """x + self_attn(norm(x)), then x + mlp(norm(x)); [b, s, h] -> [b, s, h]."""

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.mlp_name = "block_sparse_moe" if config.num_experts else "mlp"
        mlp = Experts(config) if config.num_experts else MLP(config, ("gate_proj", "up_proj", "down_proj"))
        self.add_module(self.mlp_name, mlp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.get_submodule(self.mlp_name)(self.post_attention_layernorm(x))


class PlainLlama(nn.Module):
    """Tokens and labels [b, s] -> mean loss."""

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.config = config
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embedding,
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "norm": nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over all tokens, a scalar."""
        parts: Any = self.model
        cos, sin = self.rotary_tables(tokens.size(1), tokens.device)
        x = parts.embed_tokens(tokens)
        for block in parts.layers:
            x = block(x, cos, sin)
        logits = self.lm_head(parts.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))

    def rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [s, d]."""
        size = self.config.head_size
        frequencies = self.config.rope_theta ** -(torch.arange(0, size, 2, device=device) / size)
        angles = torch.arange(length, device=device)[:, None] * torch.cat((frequencies, frequencies))
        return angles.cos(), angles.sin()
