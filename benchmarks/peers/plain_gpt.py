"""A GPT-2 in plain torch, the way nanoGPT and many course notes write it, with the names that GPT-2's weights have.

nn.Linear, F.scaled_dot_product_attention, F.cross_entropy on whole logits. This file imports torch only, so that it
shows what a user would write without this framework.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainGPTConfig:
    """The shape of the model: LayerNorm before each block, learned positions, tanh gelu, biases, no dropout."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    vocab_size: int
    max_length: int
    tied: bool = True
    norm_epsilon: float = 1e-5


class Attention(nn.Module):
    """Causal self-attention, [b, s, h] -> [b, s, h]."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        batch, length, hidden = x.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, hidden // self.num_heads).transpose(1, 2)
            for part in self.c_attn(x).split(hidden, dim=2)
        )
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(context.transpose(1, 2).contiguous().view(batch, length, hidden))


class MLP(nn.Module):
    """[b, s, h] -> [b, s, h]."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.c_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)); [b, s, h] -> [b, s, h]."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """Tokens and labels [b, s] -> mean loss."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding,
                "wpe": nn.Embedding(config.max_length, config.hidden_size),
                "h": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "ln_f": nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over all tokens, a scalar."""
        parts: Any = self.transformer
        x = parts.wte(tokens) + parts.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))
