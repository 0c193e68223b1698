"""Transformers with random weights: language models with gated or plain MLPs, and a ViT."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block; a gated MLP or one of two projections."""

    def __init__(self, width: int, gated: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = width // 32, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 4 * width, bias=False)})
        if gated:
            self.mlp["gate"] = nn.Linear(width, 4 * width, bias=False)
        self.mlp["down"] = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, t, width]`` to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        up = self.mlp["up"](h)
        return x + self.mlp["down"](F.silu(self.mlp["gate"](h)) * up if "gate" in self.mlp else F.gelu(up))


class Network(nn.Module):
    """Blocks between an embedding and a head; logits are ``[rows, classes]``, so that all three libraries read them."""

    def __init__(self, kind: str, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.image, classes = kind == "vit", 10 if kind == "vit" else 2048
        self.embed = nn.Linear(48, width, bias=False) if self.image else nn.Embedding(classes, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, kind == "gated", not self.image) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids ``[b, t]``, or patches ``[b, t, 48]``, to logits."""
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0]) if self.image else self.head(x).flatten(0, 1)
