"""A BERT that can run its text half, its fusion half, or both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn


class Output(dict):
    """A model output as transformers has them: a dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Layer(nn.Module):
    def __init__(self, width: int, fused: bool, dropout: float, image_width: int | None = None) -> None:
        super().__init__()
        seen = dict(kdim=image_width, vdim=image_width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        if fused:
            self.crossattention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True, **seen)
            self.cross_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor, hidden: Tensor, image: Tensor | None, image_hidden: Tensor | None) -> Tensor:
        self.calls += 1
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0])
        if hasattr(self, "crossattention") and image is not None:
            seen = self.crossattention(x, image, image, key_padding_mask=image_hidden, need_weights=False)[0]
            x = self.cross_norm(x + seen)
        return x + self.dropout(self.output(x).tanh())


class Embeddings(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(32, width) * 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.word_embeddings(ids) + self.positions[: ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int, fused_from: int, dropout: float, image_width: int | None) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, i >= fused_from, dropout, image_width) for i in range(depth))


class Bert(nn.Module):
    """`mode="text"`: the layers without an image; `"fusion"`: the others; `"multi_modal"`: all of them.

    `config.gradient_checkpointing` is a switch, and its checkpoints say nothing of being reentrant, as in ALBEF.
    """

    def __init__(
        self, width: int = 32, depth: int = 4, fused_from: int = 2, dropout: float = 0.1, image_width: int | None = None
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(99, width)
        self.encoder = Encoder(width, depth, fused_from, dropout, image_width)
        self.fused_from = fused_from
        self.config = SimpleNamespace(gradient_checkpointing=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | list[Tensor] | None = None,
        encoder_attention_mask: Tensor | list[Tensor] | None = None,
        return_dict: bool | None = None,
        mode: str = "multi_modal",
    ) -> Output:
        x = self.embeddings(input_ids) if encoder_embeds is None else encoder_embeds
        depth = len(self.encoder.layer)
        span = {"text": (0, self.fused_from), "fusion": (self.fused_from, depth), "multi_modal": (0, depth)}[mode]
        for index in range(*span):
            image, mask = encoder_hidden_states, encoder_attention_mask
            if isinstance(image, list):
                image, mask = image[index % len(image)], mask[index % len(image)]
            given = x, attention_mask == 0, image, None if mask is None else mask == 0
            layer = self.encoder.layer[index]
            again = self.config.gradient_checkpointing and self.training
            x = torch.utils.checkpoint.checkpoint(layer, *given) if again else layer(*given)
        return Output(last_hidden_state=x)


class TextBert(Bert):
    """A text encoder alone, without modes."""

    def __init__(self, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__(width, 2, 2, dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Output:
        return super().forward(input_ids, attention_mask, encoder_embeds, mode="text")


class MixedBert(Bert):
    """BLIP's text encoder: every layer reads the image, and none does in `mode="text"`."""

    def __init__(self, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__(width, 2, 0, dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        mode: str = "multimodal",
    ) -> Output:
        image = (None, None) if mode == "text" else (encoder_hidden_states, encoder_attention_mask)
        return super().forward(input_ids, attention_mask, encoder_embeds, *image, mode="fusion")


class FusionBert(Bert):
    """Fusion layers alone (also a decoder: it reads states through cross-attention in every layer)."""

    def __init__(self, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__(width, 2, 0, dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Output:
        return super().forward(
            input_ids, attention_mask, encoder_embeds, encoder_hidden_states, encoder_attention_mask, mode="fusion"
        )


def sentences(count: int, seed: int = 0, length: int = 6) -> SimpleNamespace:
    """What a tokenizer gives: ids and mask, the second sentence shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (count, length), generator=generator)
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    mask[1:2, length - 2 :] = 0
    return SimpleNamespace(input_ids=ids, attention_mask=mask)


def pictures(count: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
