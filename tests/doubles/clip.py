"""The structure of OpenAI CLIP and of mPLUG's copy of its tower: sequence-first blocks of four parts."""

from __future__ import annotations

import inspect
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

KINDS = inspect.signature(torch.utils.checkpoint.checkpoint).parameters
REENTRANT = {"use_reentrant": True} if "use_reentrant" in KINDS else {}


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, dropout=dropout)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 2 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def attention(self, x: Tensor, text_mask: Tensor | None = None) -> Tensor:
        return self.attn(x, x, x, need_weights=False, attn_mask=text_mask)[0]

    def forward(self, x: Tensor, text_mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.ln_1(x), text_mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class CheckpointedTransformer(nn.Module):
    """As mPLUG has it: reentrant checkpointing of every block, on unless it is turned off."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, 4, dropout=0.1) for _ in range(depth)))

    def forward(self, x: Tensor, text_mask: Tensor | None = None, use_checkpoint: bool = True) -> Tensor:
        for block in self.resblocks:
            if use_checkpoint:
                x = torch.utils.checkpoint.checkpoint(block, x, text_mask, **REENTRANT)
            else:
                x = block(x, text_mask=text_mask)
        return x


class VisualTower(nn.Module):
    def __init__(self, width: int = 32, depth: int = 6, patch: int = 8, joint: int = 24) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((32 // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer: nn.Module = Transformer(width, depth)
        self.proj = nn.Parameter(torch.randn(width, joint) * 0.2)

    def embed(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(image), 1, -1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.transformer(self.embed(image).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(tokens[:, 0]) @ self.proj


class BareTower(VisualTower):
    """As LAVIS' `clip_vit`: all tokens as they leave the last block, without norm and projection."""

    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__(width, depth)
        del self.ln_post, self.proj

    def forward(self, image: Tensor) -> Tensor:
        return self.transformer(self.embed(image).transpose(0, 1)).transpose(0, 1)


class CheckpointedTower(VisualTower):
    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__(width, depth)
        self.transformer = CheckpointedTransformer(width, depth)

    def forward(self, image: Tensor, skip_last_layer: bool = False, use_checkpoint: bool = True) -> Tensor:
        tokens = self.transformer(self.embed(image).transpose(0, 1), use_checkpoint=use_checkpoint).transpose(0, 1)
        return self.ln_post(tokens) if skip_last_layer else tokens @ self.proj


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = VisualTower()
        self.token_embedding = nn.Embedding(99, 24)
        self.calls = 0

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        self.calls += 1
        return self.token_embedding(text).mean(dim=1)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        images, texts = F.normalize(self.encode_image(image), dim=-1), F.normalize(self.encode_text(text), dim=-1)
        return images @ texts.T, texts @ images.T
