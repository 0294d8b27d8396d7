"""What `score_pairs` asks of a host: how to encode images and texts apart, and what a pair of them scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .adapter import Tower


@dataclass(frozen=True)
class Texts:
    """Encoded texts, one a row."""

    features: Tensor
    """`(M, D_text)`: what `guide` takes."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """What a fusion encoder reads besides, each with M rows: hidden states `(M, L, D)`, mask `(M, L)`."""

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, rows: Any) -> Texts:
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Texts:
        return self._each(lambda tensor: tensor.to(device))

    def repeat(self, times: int) -> Texts:
        """All texts, `times` times over: the rows of `pairing="all"`."""
        return self._each(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Texts:
        return Texts(change(self.features), {name: change(state) for name, state in self.states.items()})

    @classmethod
    def cat(cls, parts: Sequence[Texts]) -> Texts:
        """Batches below each other; shorter ones are padded with zeros, which a mask reads as padding."""
        if len(parts) == 1:
            return parts[0]
        states = {}
        for name in parts[0].states:
            length = max(part.states[name].shape[1] for part in parts)
            states[name] = torch.cat([_padded(part.states[name], length) for part in parts])
        return cls(torch.cat([part.features for part in parts]), states)


def _padded(state: Tensor, length: int) -> Tensor:
    return F.pad(state, (0, 0) * (state.dim() - 2) + (0, length - state.shape[1]))


class Scoring:
    """The questions, with the answers of a dual encoder. Part of `Adapter`."""

    name: str

    def encode_images(self, model: nn.Module, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        """What `score` reads of the images, under whatever text guides them: one row per image, or per pair."""
        found = tower.module(images, **kwargs)
        return found if isinstance(found, Tensor) else found[0]

    def encode_texts(self, model: nn.Module, tower: Tower, texts: Any) -> Texts:
        """A batch of token ids `(M, L)`, or of what a tokenizer returns, through the host's own text encoder."""
        raise ValueError(
            f"{type(model).__name__} has no text encoder that is known here: give score_pairs the text features, "
            "(texts, width) in floating point"
        )

    def score(self, model: nn.Module, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        """The score `(R,)` of row i of the images with text i: here the cosine of their features."""
        if rows.dim() != 2 or rows.shape[1] != texts.features.shape[1]:
            raise ValueError(
                f"the image side of {type(model).__name__} gave {tuple(rows.shape)}, which cannot be compared with "
                f"text features of width {texts.features.shape[1]}: score_pairs needs one feature of that width per "
                "image, or a host with a fusion encoder"
            )
        wide = torch.promote_types(rows.dtype, torch.float32)
        return F.cosine_similarity(rows.to(wide), texts.features.to(wide), dim=-1)


def named(texts: Any, ids: str = "input_ids") -> dict[str, Any]:
    """Token ids, or a tokenizer's output, as keyword arguments."""
    return dict(texts) if isinstance(texts, Mapping) else {ids: texts}


def pooled(output: Any) -> Tensor:
    """The features in what a host returns: a tensor, a tuple, or an object of one transformers release or another."""
    for name in ("image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return output if isinstance(output, Tensor) else output[0]


def matching_probability(logits: Tensor) -> Tensor:
    """`(R, 2)` logits of an image-text matching head to the probability of a match, `(R,)`."""
    return logits.float().softmax(dim=-1)[:, 1]
