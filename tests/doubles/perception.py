"""The structure of perception_models' PE: blocks whose attention holds one rotary object of the tower, and pooling."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rope:
    """Angles of a grid, no module: x in the first half of each head, y in the second; prefix tokens have none."""

    def __init__(self, width: int, prefix: int) -> None:
        self.frequencies = 100.0 ** -torch.arange(0, 1, 4 / width)
        self.prefix, self.grid_size, self.freq = prefix, None, torch.zeros(0)

    def update_grid(self, device: torch.device, height: int, width: int) -> None:
        if self.grid_size == (height, width):
            return
        self.grid_size = (height, width)
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1) + self.prefix
        angles = (places[:, :, None] * self.frequencies).repeat_interleave(2, dim=2).flatten(1)
        self.freq = torch.cat([torch.zeros(self.prefix, angles.shape[1]), angles])[None].to(device)

    def __call__(self, *heads: Tensor) -> tuple[Tensor, ...]:
        turned = []
        for x in heads:
            other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
            turned.append((x * self.freq[:, None].cos() + other * self.freq[:, None].sin()).to(x.dtype))
        return tuple(turned)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, rope: Rope) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * 0.1)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width) * 0.1)
        self.out_proj = nn.Linear(width, width)
        self.num_heads, self.rope, self.scale = num_heads, rope, (width // num_heads) ** -0.5

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        q, k = self.rope(q, k)
        read = (q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1) @ v
        return F.linear(read.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, rope: Rope) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads, rope)
        self.ls_1, self.ls_2 = nn.Identity(), nn.Identity()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()
        self.mlp = mlp(width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls_1(self.attn(self.ln_1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls_2(self.mlp(self.ln_2(x))))


def mlp(width: int) -> nn.Sequential:
    layers = [("c_fc", nn.Linear(width, 2 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * width, width))]
    return nn.Sequential(OrderedDict(layers))


class Pool(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.attn, self.layernorm = nn.MultiheadAttention(width, 4, batch_first=True), nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        read = self.attn(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return read + self.mlp(self.layernorm(read))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, rope: Rope) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, 4, rope) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask=None)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 32, depth: int = 6, patch: int = 8, joint: int = 24) -> None:
        super().__init__()
        self.width, self.use_cls_token, self.pool_type, self.patch_size = width, True, "attn", patch
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((32 // patch) ** 2 + 1, width))
        self.rope = Rope(width // 4, 1)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, self.rope)
        self.attn_pool = Pool(width)
        self.proj = nn.Parameter(torch.randn(width, joint) * 0.2)

    def forward_features(self, x: Tensor, norm: bool = False) -> Tensor:
        patches = self.conv1(x)
        self.rope.update_grid(x.device, *patches.shape[-2:])
        first = self.class_embedding.expand(len(x), 1, -1)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + self.positional_embedding
        tokens = self.transformer(self.ln_pre(tokens))
        return self.ln_post(tokens) if norm else tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.attn_pool(self.forward_features(x, norm=True)).squeeze(1) @ self.proj


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTransformer()
        self.token_embedding = nn.Embedding(99, 24)
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        found = self.visual(image)
        return F.normalize(found, dim=-1) if normalize else found

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        found = self.token_embedding(text).mean(dim=1)
        return F.normalize(found, dim=-1) if normalize else found

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        return image, text, self.logit_scale.exp()
