"""A host of your own in one file: a plain pre-norm ViT, and the adapter that teaches patchselect to patch it.

python examples/plain_vit.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import patchselect
from patchselect.adapter import Attended, Tower
from patchselect.weights import Projections


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.after(x))


class PlainViT(nn.Module):
    def __init__(self, width: int = 48, heads: int = 4, depth: int = 6, size: int = 64, patch: int = 8) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainViTAdapter(patchselect.Adapter):
    """What patchselect asks of `PlainViT`; texts are vectors of its width."""

    name = "plain-vit"
    default_relevance = "values"

    def towers(self, model: nn.Module) -> list[Tower]:
        if not isinstance(model, PlainViT):
            return []
        return [Tower(self, model, list(model.blocks), 1, True, model.width, final_norm=model.norm)]

    def attend(self, tower: Tower, block: Any, x: Tensor) -> Attended:
        normed = block.before(x)
        return Attended(x + block.attention(normed), normed)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        return tokens + block.mlp(block.after(tokens))

    def projections(self, block: Any) -> Projections:
        scale = (block.query.out_features // block.heads) ** -0.5
        layers = (block.query, block.key, block.value, block.out)
        return Projections.separate(*layers, num_heads=block.heads, scale=scale, norm=block.before)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        return tower.module.norm(patches)

    def grid(self, tower: Tower, images: Tensor) -> tuple[int, int]:
        height, width = tower.module.embed.stride
        return images.shape[-2] // height, images.shape[-1] // width


def main() -> None:
    torch.manual_seed(0)
    model = PlainViT().eval()
    images, text = torch.randn(1, 3, 64, 64), torch.randn(1, model.width)
    with torch.no_grad():
        print("tokens without selection:", model(images).shape[1])
        rate = patchselect.keep_rate_for_budget(patched(model), 0.6)
        handle = patchselect.apply(model, rate, adapter=PlainViTAdapter())
        with patchselect.guide(model, text):
            print(f"tokens at 60 % of the cost (keep rate {rate}):", model(images).shape[1])
        handle.remove()


def patched(model: nn.Module) -> nn.Module:
    patchselect.apply(model, adapter=PlainViTAdapter())
    return model


if __name__ == "__main__":
    main()
