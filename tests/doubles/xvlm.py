"""X-VLM's ViT (zengyan-97/X-VLM): ALBEF's, whose last blocks attend within a region of the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import albef


class RegionAttention(albef.Attention):
    def forward(self, x: Tensor, register_hook: bool = False, image_atts: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = query @ key.transpose(-1, -2) * self.scale
        weights = (logits if image_atts is None else logits + image_atts).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class RegionBlock(albef.Block):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.attn = RegionAttention(width, num_heads)

    def forward(self, x: Tensor, register_hook: bool = False, image_atts: Tensor | None = None) -> Tensor:
        attended = self.attn(self.norm1(x), register_hook=register_hook, image_atts=image_atts)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class RegionVit(albef.Vit):
    """With `idx_to_group_img` and `image_atts` it returns each region and each image."""

    def __init__(self, depth: int = 6, local: int = 1) -> None:
        super().__init__(depth=depth)
        self.blocks = torch.nn.ModuleList(RegionBlock(32, 4) for _ in range(depth))
        self.local = local

    def forward(
        self, image: Tensor, register_blk: int = -1, idx_to_group_img: Tensor | None = None,
        image_atts: Tensor | None = None,
    ) -> Any:  # fmt: skip
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), self.patch_embed(image)], dim=1) + self.pos_embed
        masks = None
        for index, block in enumerate(self.blocks):
            if index == len(self.blocks) - self.local and idx_to_group_img is not None and image_atts is not None:
                masks = (1 - torch.cat([image_atts, image_atts.new_ones(x.shape[:2])]))[:, None, None] * -10000.0
                x = torch.cat([x[idx_to_group_img], x])
            x = block(x, register_blk == index, image_atts=masks)
        x = self.norm(x)
        return (
            x if idx_to_group_img is None else torch.split(x, [len(idx_to_group_img), len(x) - len(idx_to_group_img)])
        )
