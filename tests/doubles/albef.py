"""The structure of ALBEF: a ViT with a hook flag per block, heads with momentum twins."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import Bert, FusionBert


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.shown: Tensor | None = None

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(dim=-1)
        if register_hook:
            self.shown = weights
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads)
        self.drop_path = nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), register_hook=register_hook))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    def __init__(self, width: int, size: int, patch: int) -> None:
        super().__init__()
        self.num_patches = (size // patch) ** 2
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    def __init__(self, width: int = 32, depth: int = 6, num_heads: int = 4, size: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.patch_embed = Patches(width, size, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + 1, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, register_blk: int = -1) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), self.patch_embed(image)], dim=1) + self.pos_embed
        for index, block in enumerate(self.blocks):
            x = block(x, register_blk == index)
        return self.norm(x)


def _mask(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:-1], dtype=torch.long)


class Head(nn.Module):
    """Towers and their momentum twins under other names than ALBEF's."""

    def __init__(self, depth: int = 4, twins: bool = True, width: int = 32) -> None:
        super().__init__()
        self.eyes, self.words = Vit(width), Bert(32, depth, image_width=width)
        self.text_proj, self.vision_proj = nn.Linear(32, 16), nn.Linear(width, 16)
        self.score = nn.Linear(32, 2)
        if twins:
            self.eyes_slow, self.words_slow = copy.deepcopy(self.eyes), copy.deepcopy(self.words)
            for weight in (*self.eyes_slow.parameters(), *self.words_slow.parameters()):
                weight.requires_grad = False


class Retrieval(Head):
    """Text half of its own, momentum pair, fusion of the pairs and of pairs with another image of the batch."""

    def forward(self, picture: Tensor, caption: SimpleNamespace, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
        states = self.eyes(picture)
        read = dict(attention_mask=caption.attention_mask, return_dict=True)
        embeds = self.words(caption.input_ids, **read, mode="text").last_hidden_state
        with torch.no_grad():
            slow = self.vision_proj(self.eyes_slow(picture)[:, 0])
            slow_text = self.text_proj(self.words_slow(caption.input_ids, **read, mode="text").last_hidden_state[:, 0])
        similarity = F.normalize(self.vision_proj(states[:, 0]), dim=-1) @ F.normalize(slow_text, dim=-1).T
        similarity = similarity + F.normalize(self.text_proj(embeds[:, 0]), dim=-1) @ F.normalize(slow, dim=-1).T
        labels = torch.arange(len(picture))
        both = torch.cat([states, states.roll(1, dims=0)])
        fused = self.words(
            encoder_embeds=torch.cat([embeds, embeds]),
            attention_mask=caption.attention_mask.repeat(2, 1),
            encoder_hidden_states=both,
            encoder_attention_mask=_mask(both),
            return_dict=True,
            mode="fusion",
        )
        matched = torch.cat([torch.ones_like(labels), torch.zeros_like(labels)])
        matching = F.cross_entropy(self.score(fused.last_hidden_state[:, 0]), matched)
        return F.cross_entropy(similarity, labels), matching


class Answering(Head):
    """Both halves in one call, a momentum pair, and a decoder with several answers a question."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = FusionBert()

    def forward(
        self, picture: Tensor, question: SimpleNamespace, answer: SimpleNamespace, train: bool = True
    ) -> Tensor:
        states = self.eyes(picture)
        mask = _mask(states)
        read = dict(attention_mask=question.attention_mask, encoder_attention_mask=mask, return_dict=True)
        asked = self.words(question.input_ids, encoder_hidden_states=states, **read).last_hidden_state
        if train:
            with torch.no_grad():
                slow = self.eyes_slow(picture)
                self.words_slow(question.input_ids, encoder_hidden_states=slow, **read)
        answered = self.decoder(
            answer.input_ids,
            attention_mask=answer.attention_mask,
            encoder_hidden_states=asked,
            encoder_attention_mask=question.attention_mask,
        )
        return self.score(answered.last_hidden_state[:, 0]).square().mean()


class Pairs(Head):
    """Two images a sentence in one batch: all first images, then all second ones."""

    def forward(self, pictures: Tensor, sentence: SimpleNamespace, targets: Tensor) -> Tensor:
        first, second = torch.split(self.eyes(pictures), targets.shape[0])
        read = self.words(
            sentence.input_ids,
            attention_mask=sentence.attention_mask,
            encoder_hidden_states=[first, second],
            encoder_attention_mask=[_mask(first), _mask(second)],
            return_dict=True,
        )
        return F.cross_entropy(self.score(read.last_hidden_state[:, 0]), targets)
