"""Blocks and attentions with the parts of ALBEF's that compute something else, and towers of them."""

from __future__ import annotations

import torch
from torch import nn

from .albef import Attention, Block, Vit


class ScaledByParameters(Block):
    """LayerScale as a parameter of the block, which no list of children shows."""

    def __init__(self, width, num_heads, scale=0.1):
        super().__init__(width, num_heads)
        self.gamma = nn.Parameter(scale * torch.ones(width))

    def forward(self, x, register_hook=False):
        x = x + self.gamma * self.attn(self.norm1(x), register_hook=register_hook)
        return x + self.gamma * self.mlp(self.norm2(x))


class ShowsAttention(Block):
    """facebookresearch/dino: the attention returns its map too."""

    def forward(self, x, return_attention=False):
        y, attn = self.attn(self.norm1(x)), None
        if return_attention:
            return attn
        x = x + self.drop_path(y[0])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ReturnsAttention(Block):
    """dandelin/ViLT: the block returns the map too, and takes a mask."""

    def forward(self, x, mask=None):
        y, attn = self.attn(self.norm1(x))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))), attn


def tower_of(kind, **options):
    model = Vit()
    for index, block in enumerate(model.blocks):
        own = kind(32, block.attn.num_heads, **options)
        own.load_state_dict(block.state_dict(), strict=False)
        if kind in (ShowsAttention, ReturnsAttention):
            plain = type(own.attn)
            shown = lambda self, x, plain=plain: (plain.forward(self, x), None)  # noqa: E731
            own.attn.__class__ = type("Attention", (plain,), {"forward": shown})
        model.blocks[index] = own
    return model.eval()


class Interleaved(Attention):
    """Queries, keys and values of a head beside each other, as other code bases pack them."""

    def forward(self, x, register_hook=False):
        query, key, value = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Sharper(Attention):
    """Scores that its scale does not tell of."""

    def forward(self, x, register_hook=False):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * 3 * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))
