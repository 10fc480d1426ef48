"""A GPT in plain torch, written from the papers and not from the package: whole tensors, one head at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ReferenceGPT:
    """Reads parameters by the package's names and computes logits [b, s, V]; settings as in TransformerConfig."""

    parameters: Mapping[str, Tensor]
    num_layers: int
    heads: int
    groups: int
    vocab_size: int
    rms_norm: bool = False
    zero_centered: bool = False
    activation: str = "gelu_tanh"
    gated: bool = False
    rotary_base: float | None = None
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    window: int | None = None
    post_layernorm_residual: bool = False
    eps: float = 1e-5

    def logits(self, ids: Tensor, positions: Tensor, forbidden: Tensor | None = None) -> Tensor:
        p = self.parameters
        x = p["embedding.word_embeddings.weight"][ids]
        if "embedding.position_embeddings.weight" in p:
            x = x + p["embedding.position_embeddings.weight"][positions]
        length = ids.size(1)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        if self.window is not None:
            mask |= torch.ones(length, length, dtype=torch.bool).tril(-self.window - 1)
        mask = mask.expand(ids.size(0), length, length)
        if forbidden is not None:
            mask = mask | forbidden
        for index in range(self.num_layers):
            layer = f"decoder.layers.{index}."
            normed = self._norm(x, layer + "input_layernorm")
            attended = self._attention(normed, layer + "self_attention.", positions, mask)
            x = (normed if self.post_layernorm_residual else x) + attended
            normed = self._norm(x, layer + "pre_mlp_layernorm")
            x = (normed if self.post_layernorm_residual else x) + self._mlp(normed, layer + "mlp.")
        x = self._norm(x, "decoder.final_layernorm")
        output = p.get("output_layer.weight", p["embedding.word_embeddings.weight"])
        return x @ output[: self.vocab_size].t()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.parameters[name + ".weight"].t()
        return y + self.parameters[name + ".bias"] if name + ".bias" in self.parameters else y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.parameters[name + ".weight"] + (1 if self.zero_centered else 0)
        if self.rms_norm:
            return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return scaled * weight + self.parameters[name + ".bias"]

    def _attention(self, x: Tensor, name: str, positions: Tensor, mask: Tensor) -> Tensor:
        mixed = self._linear(x, name + "linear_qkv")
        per_group = self.heads // self.groups
        width = mixed.size(-1) // (self.groups * (per_group + 2))
        outputs = []
        for head in range(self.heads):
            start = (head // per_group) * (per_group + 2)

            def part(slot: int, first: int = start) -> Tensor:
                return mixed[..., (first + slot) * width : (first + slot + 1) * width]

            query, key, value = part(head % per_group), part(per_group), part(per_group + 1)
            if name + "q_layernorm.weight" in self.parameters:
                query, key = self._norm(query, name + "q_layernorm"), self._norm(key, name + "k_layernorm")
            if self.rotary_base is not None:
                query, key = self._rotate(query, positions), self._rotate(key, positions)
            scores = query @ key.transpose(1, 2) / math.sqrt(width)
            outputs.append(scores.masked_fill(mask, -torch.inf).softmax(-1) @ value)
        return self._linear(torch.cat(outputs, -1), name + "linear_proj")

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Each pair as a complex number, times exp(i angle)."""
        assert self.rotary_base is not None
        dim = int(x.size(-1) * self.rotary_percent)
        angles = positions[..., None] * self.rotary_base ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
        turn = torch.polar(torch.ones_like(angles), angles)
        turned, rest = x[..., :dim], x[..., dim:]
        if self.rotary_interleaved:
            pairs = torch.complex(turned[..., 0::2], turned[..., 1::2]) * turn
            return torch.cat((torch.view_as_real(pairs).flatten(-2), rest), -1)
        pairs = torch.complex(turned[..., : dim // 2], turned[..., dim // 2 :]) * turn
        return torch.cat((pairs.real, pairs.imag, rest), -1)

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        y = self._linear(x, name + "linear_fc1")
        functions = {
            "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
            "gelu": F.gelu,
            "silu": F.silu,
            "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
            "squared_relu": lambda t: t.clamp(min=0) ** 2,
        }
        function = functions[self.activation]
        y = function(y[..., 0::2]) * y[..., 1::2] if self.gated else function(y)
        return self._linear(y, name + "linear_fc2")
