"""The structure of mPLUG: CLIP's tower with checkpointed blocks, a text encoder of its own, fusion and decoder."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CheckpointedTower
from .text import FusionBert, TextBert


class Eyes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual = CheckpointedTower(width)


class Fusion(FusionBert):
    """Gives back what became of the image tokens, and of the text, whatever `return_dict` says."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **given: Tensor,
    ) -> list[Tensor]:
        fused = super().forward(input_ids, encoder_embeds=encoder_embeds, **given).last_hidden_state
        return [given["encoder_hidden_states"], fused]


class Head(nn.Module):
    """`large`: the tower is wider than the text, and a linear layer leads from the one to the other."""

    def __init__(
        self, large: bool = False, twins: bool = False, reads: bool = True, use_checkpoint: bool = True
    ) -> None:
        super().__init__()
        width = 48 if large else 32
        self.large, self.use_checkpoint = large, use_checkpoint
        if large:
            self.narrow, self.narrow_norm = nn.Linear(width, 32), nn.LayerNorm(32)
        self.eyes = Eyes(width)
        if reads:
            self.words = TextBert()
        self.fusion, self.score = Fusion(), nn.Linear(32, 2)
        if twins:
            self.eyes_slow, self.words_slow = copy.deepcopy(self.eyes), copy.deepcopy(self.words)
            if large:
                self.narrow_slow, self.narrow_norm_slow = copy.deepcopy(self.narrow), copy.deepcopy(self.narrow_norm)
            for name, weight in self.named_parameters():
                weight.requires_grad = "slow" not in name

    def see(self, image: Tensor) -> Tensor:
        states = self.eyes.visual(image, skip_last_layer=True, use_checkpoint=self.use_checkpoint)
        return self.narrow_norm(self.narrow(states)) if self.large else states

    def see_slow(self, image: Tensor) -> Tensor:
        states = self.eyes_slow.visual(image, skip_last_layer=True, use_checkpoint=self.use_checkpoint)
        return self.narrow_norm_slow(self.narrow_slow(states)) if self.large else states

    def fuse(self, embeds: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        seen = torch.ones(states.shape[:-1], dtype=torch.long)
        read = dict(attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=seen)
        _, fused = self.fusion(encoder_embeds=embeds, **read, return_dict=False)
        return self.score(fused[:, 0])


class Retrieval(Head):
    """Matching of the pairs and of pairs with another image of the batch, and a contrast with a momentum pair.

    The momentum twin of the fusion encoder runs nowhere and is not frozen; here it even comes first.
    """

    def __init__(self, large: bool = False, use_checkpoint: bool = True) -> None:
        super().__init__(large, twins=True, use_checkpoint=use_checkpoint)
        fusion = self._modules.pop("fusion")
        self.fusion_slow, self.fusion = Fusion(), fusion

    def forward(self, image: Tensor, text: SimpleNamespace) -> tuple[Tensor, Tensor]:
        states = self.see(image)
        read = dict(attention_mask=text.attention_mask, return_dict=True)
        embeds = self.words(text.input_ids, **read).last_hidden_state
        with torch.no_grad():
            slow = self.see_slow(image)[:, 0]
            slow_text = self.words_slow(text.input_ids, **read).last_hidden_state[:, 0]
        contrast = (states[:, 0] - slow_text).square().mean() + (embeds[:, 0] - slow).square().mean()
        matched = self.fuse(embeds, text.attention_mask, states)
        other = self.fuse(embeds, text.attention_mask, states.roll(1, dims=0))
        labels = torch.arange(2 * len(image)) < len(image)
        return contrast, F.cross_entropy(torch.cat([matched, other]), labels.long())


class Answering(Head):
    def __init__(self, large: bool = False, use_checkpoint: bool = True) -> None:
        super().__init__(large, twins=True, use_checkpoint=use_checkpoint)

    def forward(self, image: Tensor, question: SimpleNamespace, answer: SimpleNamespace | None = None) -> Tensor:
        states = self.see(image)
        read = dict(attention_mask=question.attention_mask, return_dict=True)
        embeds = self.words(question.input_ids, **read).last_hidden_state
        with torch.no_grad():
            slow = self.see_slow(image)
            slow_embeds = self.words_slow(question.input_ids, **read).last_hidden_state
            aim = self.fuse(slow_embeds, question.attention_mask, slow)
        return (self.fuse(embeds, question.attention_mask, states) - aim - 1).square().mean()


class Grounding(Head):
    """Images and texts come as nested tensors: `.tensors` and `.mask`."""

    def forward(self, image_data: SimpleNamespace, text_data: SimpleNamespace) -> Tensor:
        states = self.see(image_data.tensors)
        embeds = self.words(text_data.tensors, attention_mask=text_data.mask, return_dict=True).last_hidden_state
        return self.fuse(embeds, text_data.mask, states).square().mean()


class Captioning(Head):
    """Its text encoder never runs: `question` is ignored and `answer` is the label."""

    def forward(self, image: Tensor, question: SimpleNamespace | None, answer: SimpleNamespace) -> Tensor:
        states = self.see(image)
        embeds = self.fusion.embeddings(answer.input_ids)
        return self.fuse(embeds, answer.attention_mask, states).square().mean()


class VideoCaptioning(Head):
    """Frames are folded into the batch, and the tokens of a video follow each other. There is no text encoder."""

    def __init__(self, large: bool = False) -> None:
        super().__init__(large, reads=False)

    def forward(self, image: Tensor, question: SimpleNamespace | None, answer: SimpleNamespace) -> Tensor:
        videos, frames = image.shape[:2]
        states = self.see(image.flatten(0, 1)).unflatten(0, (videos, frames)).flatten(1, 2)
        embeds = self.fusion.embeddings(answer.input_ids)
        return self.fuse(embeds, answer.attention_mask, states).square().mean()
