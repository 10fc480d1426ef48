"""A GPT-2 and its training step in plain torch, the way nanoGPT and many course notes write it.

One device, no parallelism: nn.Linear, F.scaled_dot_product_attention, F.cross_entropy on whole logits, clip_grad_norm_
and torch's fused AdamW. Under bf16 the weights stay float32 and torch.autocast casts what each matrix product reads.
This file imports torch only, so that it shows what a user would write without this framework.
"""

from dataclasses import dataclass

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


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); [b, s, h] -> [b, s, h]."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_heads
        self.attention_norm = nn.LayerNorm(hidden, eps=config.norm_epsilon)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden, eps=config.norm_epsilon)
        self.up = nn.Linear(hidden, config.ffn_hidden_size)
        self.down = nn.Linear(config.ffn_hidden_size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        """Causal self-attention, [b, s, h] -> [b, s, h]."""
        batch, length, hidden = x.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, hidden // self.num_heads).transpose(1, 2)
            for part in self.qkv(x).split(hidden, dim=2)
        )
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(context.transpose(1, 2).contiguous().view(batch, length, hidden))


class PlainGPT(nn.Module):
    """Tokens and labels [b, s] -> mean loss."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over all tokens, a scalar."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


def build_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Fused AdamW; matrices and embeddings are decayed, biases and norms are not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[Tensor, Tensor]],
    *,
    bf16: bool,
    clip_grad: float,
) -> Tensor:
    """One update from pairs of tokens and labels [b, s]; returns the mean loss, on the device."""
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=micro_batches[0][0].device)
    for tokens, labels in micro_batches:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = model(tokens, labels) / len(micro_batches)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return total
