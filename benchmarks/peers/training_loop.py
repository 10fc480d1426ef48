"""The training step that the peers share, as plain torch loops have it: clip_grad_norm_ and torch's fused AdamW.

Under bf16 the weights stay float32 and torch.autocast casts what each matrix product reads, as such loops and the
Trainer of `transformers` (bf16=True) do. This file imports torch only.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
    loss_of: Callable[[Tensor, Tensor], Tensor],
    parameters: list[nn.Parameter],
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
            loss = loss_of(tokens, labels) / len(micro_batches)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
    optimizer.step()
    return total
